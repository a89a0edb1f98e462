// Package chaos tests the rpc library from outside, as a bad network and hostile peers would: with a proxy that cuts,
// stalls and corrupts, with peers that break the protocol in every way, and with processes that are killed. It has tests
// only. Each property is counted; go test -v ./chaos/ prints the figures at its end, and -soak makes all of it longer.
package chaos
