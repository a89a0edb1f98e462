package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"example.org/rpc"
)

// service is what the passive side's peers may do: push into a part of the sink that is theirs, pull from the source.
type service struct {
	rpc.UnimplementedHandler
	sink, source Store // nil: it has none
	log          *slog.Logger
}

func (s *service) open(sink, source string) error {
	var err error
	if sink != "" {
		if s.sink, err = openStore(sink, s.log); err != nil {
			return fmt.Errorf("-sink: %w", err)
		}
	}
	if source != "" {
		if s.source, err = openStore(source, s.log); err != nil {
			return fmt.Errorf("-source: %w", err)
		}
	}
	return nil
}

func (s *service) close() {
	for _, store := range []Store{s.sink, s.source} {
		if store != nil {
			store.Close()
		}
	}
}

// server makes the server, with the two calls that are not of the replication service.
func (s *service) server() *rpc.Server {
	server := rpc.NewServer(s, rpc.ServerConfig{Logger: s.log, Intercept: s.logCall})
	if s.sink != nil {
		rpc.HandleCall(server, sinkFilesystemsCall, s.sinkFilesystems)
		rpc.HandleCall(server, sinkVersionsCall, s.sinkVersions)
	}
	return server
}

// logCall stands around every call and stream.
func (s *service) logCall(ctx context.Context, call rpc.CallInfo, handle func(context.Context)) {
	start := time.Now()
	handle(ctx)
	s.log.DebugContext(ctx, "call", "method", call.Method, "client", call.Identity, "addr", call.RemoteAddr.String(),
		"duration", time.Since(start).Round(time.Microsecond))
}

// own opens the caller's part of the sink. The caller closes it.
func (s *service) own(ctx context.Context) (Store, error) {
	if s.sink == nil {
		return nil, rpc.Errorf(rpc.PermissionDenied, "this server takes nothing: it is read only")
	}
	return s.sink.Sub(rpc.ClientIdentity(ctx))
}

func (s *service) readable() (Store, error) {
	if s.source == nil {
		return nil, rpc.Errorf(rpc.PermissionDenied, "this server serves no pulls: it has no source")
	}
	return s.source, nil
}

func (s *service) ListFilesystems(ctx context.Context, req *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	if s.source == nil {
		return s.sinkFilesystems(ctx, req)
	}
	return s.source.ListFilesystems(ctx, req)
}

func (s *service) ListFilesystemVersions(ctx context.Context, req *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	if s.source == nil {
		return s.sinkVersions(ctx, req)
	}
	return s.source.ListFilesystemVersions(ctx, req)
}

func (s *service) sinkFilesystems(ctx context.Context, req *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	own, err := s.own(ctx)
	if err != nil {
		return nil, err
	}
	defer own.Close()
	return own.ListFilesystems(ctx, req)
}

func (s *service) sinkVersions(ctx context.Context, req *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	own, err := s.own(ctx)
	if err != nil {
		return nil, err
	}
	defer own.Close()
	return own.ListFilesystemVersions(ctx, req)
}

// DestroySnapshots is refused: a client that was broken into must not be able to destroy its backups.
func (s *service) DestroySnapshots(context.Context, *rpc.DestroySnapshotsReq) (*rpc.DestroySnapshotsRes, error) {
	return nil, rpc.Errorf(rpc.PermissionDenied, "this server destroys nothing")
}

func (s *service) SendDry(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, error) {
	source, err := s.readable()
	if err != nil {
		return nil, err
	}
	return source.SendDry(ctx, req)
}

func (s *service) SendCompleted(ctx context.Context, req *rpc.SendCompletedReq) (*rpc.SendCompletedRes, error) {
	source, err := s.readable()
	if err != nil {
		return nil, err
	}
	return source.SendCompleted(ctx, req)
}

func (s *service) ReplicationCursor(ctx context.Context, req *rpc.ReplicationCursorReq) (*rpc.ReplicationCursorRes, error) {
	source, err := s.readable()
	if err != nil {
		return nil, err
	}
	return source.ReplicationCursor(ctx, req)
}

func (s *service) Send(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	source, err := s.readable()
	if err != nil {
		return nil, nil, err
	}
	res, stream, err := source.Send(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	s.log.InfoContext(ctx, "sending", "client", rpc.ClientIdentity(ctx), "filesystem", req.Filesystem,
		"version", versionName(req.To), "bytes", res.ExpectedSize, "resumed", res.UsedResumeToken)
	return res, stream, nil
}

func (s *service) Receive(ctx context.Context, req *rpc.ReceiveReq, r io.Reader) (*rpc.ReceiveRes, error) {
	own, err := s.own(ctx)
	if err != nil {
		return nil, err
	}
	defer own.Close()
	log := s.log.With("client", rpc.ClientIdentity(ctx), "filesystem", req.Filesystem, "version", versionName(req.To))
	start := time.Now()
	res, err := own.Receive(ctx, req, r) // not wrapped: what r can do besides Read makes it faster
	if err != nil {
		log.WarnContext(ctx, "not received", "error", err)
		return nil, err
	}
	log.InfoContext(ctx, "received", "duration", time.Since(start).Round(time.Millisecond))
	return res, nil
}

func versionName(v *rpc.FilesystemVersion) string {
	if v == nil {
		return ""
	}
	return v.Name
}
