module example.org/rpc/bench

go 1.25

require example.org/rpc v0.0.0

require google.golang.org/protobuf v1.36.12

replace example.org/rpc => ../
