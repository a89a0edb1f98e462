package main

import (
	"errors"
	"fmt"
	"slices"

	"example.org/rpc"
)

// step brings one version to the sink.
type step struct {
	from   *rpc.FilesystemVersion // what an increment starts from; nil: the whole version is sent
	to     rpc.FilesystemVersion
	token  string // what the sink has of it already; "" nothing
	offset uint64 // how many bytes that is
	clear  bool   // the sink is to drop what it has of something else
	size   uint64 // how much is to be sent; 0 if that is not known
}

// plan is what one filesystem needs.
type plan struct {
	filesystem string
	both       *rpc.FilesystemVersion // what increments start from; nil: there is nothing
	steps      []step                 // in the order in which they are to be done
	conflict   error                  // what cannot be replicated; the steps can
}

// sinkState is what the sink has of a filesystem.
type sinkState struct {
	versions []rpc.FilesystemVersion
	token    string // of what broke off; "" nothing did
}

// makePlan finds the versions that the sink does not have, the oldest first, and before them the one that broke off.
// Versions are the same if their GUIDs are. They are independent of each other, so all of them are sent whole.
func makePlan(filesystem string, source []rpc.FilesystemVersion, sink sinkState, parse func(token string) (ResumePoint, error)) plan {
	there, named := make(map[uint64]bool), make(map[string]rpc.FilesystemVersion)
	for _, v := range sink.versions {
		if v.Type == rpc.VersionSnapshot {
			there[v.GUID], named[v.Name] = true, v
		}
	}
	p := plan{filesystem: filesystem}
	var conflicts []error
	for _, v := range slices.SortedFunc(slices.Values(source), byAge) {
		other, taken := named[v.Name]
		switch {
		case v.Type != rpc.VersionSnapshot || there[v.GUID]:
		case taken:
			conflicts = append(conflicts, conflict(v, other))
		default:
			p.steps = append(p.steps, step{to: v})
		}
	}
	p.conflict = errors.Join(conflicts...)
	p.resume(sink.token, parse)
	return p
}

// makeChain finds the versions that are newer than the newest one that both sides have, and how to send each from the one
// before it; without any at the sink, the oldest is sent whole. A bookmark can be sent from, but not itself.
func makeChain(filesystem string, source []rpc.FilesystemVersion, sink sinkState, l lineage, parse func(token string) (ResumePoint, error)) plan {
	p := plan{filesystem: filesystem}
	there := slices.SortedFunc(slices.Values(snapshots(sink.versions)), byAge)
	sorted := slices.SortedFunc(slices.Values(source), byAge)
	from, newer := common(sorted, there)
	p.both = from
	switch newer = snapshots(newer); {
	case len(newer) == 0:
		return p
	case len(there) > 0 && (from == nil || l == linear && from.GUID != there[len(there)-1].GUID):
		p.conflict = diverged(from, newer[len(newer)-1], there[len(there)-1])
		return p
	}
	for i, v := range newer {
		if j := slices.IndexFunc(there, func(other rpc.FilesystemVersion) bool { return other.Name == v.Name }); j >= 0 {
			p.conflict = conflict(v, there[j])
			break
		}
		p.steps = append(p.steps, step{from: from, to: v})
		from = &newer[i]
	}
	p.resumeChain(sink.token, parse)
	return p
}

func snapshots(versions []rpc.FilesystemVersion) []rpc.FilesystemVersion {
	return slices.DeleteFunc(slices.Clone(versions), func(v rpc.FilesystemVersion) bool { return v.Type != rpc.VersionSnapshot })
}

// common is the newest version of the source that the sink has too, and those that are newer than it. Of a snapshot and a
// bookmark of it, the snapshot.
func common(source, sink []rpc.FilesystemVersion) (from *rpc.FilesystemVersion, newer []rpc.FilesystemVersion) {
	guids := make(map[uint64]bool)
	for _, v := range sink {
		guids[v.GUID] = true
	}
	newer = source
	for i, v := range source {
		if !guids[v.GUID] {
			continue
		}
		if from == nil || from.GUID != v.GUID || v.Type == rpc.VersionSnapshot {
			from = &source[i]
		}
		newer = source[i+1:]
	}
	return from, newer
}

func diverged(both *rpc.FilesystemVersion, source, sink rpc.FilesystemVersion) error {
	last := "they have none in common"
	if both != nil {
		last = fmt.Sprintf("the last that both have is %q (%016x)", both.Name, both.GUID)
	}
	return fmt.Errorf("diverged: the newest version is %q (%016x of %v) at the source, but %q (%016x of %v) at the sink; %s; nothing is destroyed: roll back or rename the one at the sink",
		source.Name, source.GUID, source.Creation, sink.Name, sink.GUID, sink.Creation, last)
}

// resumeChain goes on with what broke off if it is the first step, as it is unless the source has been changed. What the
// sink has of anything else is dropped: it takes nothing else before.
func (p *plan) resumeChain(token string, parse func(string) (ResumePoint, error)) {
	if token == "" || len(p.steps) == 0 {
		return
	}
	first := &p.steps[0]
	point, err := parse(token)
	if err != nil || point.GUID != first.to.GUID || point.From != first.fromGUID() {
		first.clear = true
		return
	}
	first.token, first.offset = token, point.Offset
}

func (s step) fromGUID() uint64 {
	if s.from == nil {
		return 0
	}
	return s.from.GUID
}

func conflict(source, sink rpc.FilesystemVersion) error {
	return fmt.Errorf("conflict: version %q is %016x of %v at the source, but %016x of %v at the sink; nothing is overwritten",
		source.Name, source.GUID, source.Creation, sink.GUID, sink.Creation)
}

// resume puts the step first that broke off. What the sink has of a version that is not wanted any more is dropped.
func (p *plan) resume(token string, parse func(string) (ResumePoint, error)) {
	if token == "" || len(p.steps) == 0 {
		return
	}
	point, err := parse(token)
	i := slices.IndexFunc(p.steps, func(s step) bool {
		return err == nil && s.to.GUID == point.GUID && s.to.Name == point.Name
	})
	if i < 0 {
		p.steps[0].clear = true
		return
	}
	s := p.steps[i]
	s.token, s.offset = token, point.Offset
	p.steps = slices.Insert(slices.Delete(p.steps, i, i+1), 0, s)
}

// further tells whether the sink has got on since the plan before was made.
func (p plan) further(before plan) bool {
	return len(p.steps) < len(before.steps) || p.resumedBytes() > before.resumedBytes()
}

func (p plan) resumedBytes() uint64 {
	if len(p.steps) == 0 {
		return 0
	}
	return p.steps[0].offset
}
