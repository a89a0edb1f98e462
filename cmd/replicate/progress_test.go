package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// reporting is a reporter with a transfer on its way that has sent half of its bytes in two seconds. The clock stands still: the
// tests are on synctest's.
func reporting(t *testing.T, live, asJSON bool) (r *reporter, x *transfer, out, status *strings.Builder) {
	out, status = new(strings.Builder), new(strings.Builder)
	r = newReporter(output{out, status}, asJSON)
	r.live = live
	t.Cleanup(r.close)
	x = r.start("db/main", step{to: version("dump", 1, 1), offset: 1 << 20}, 2<<20)
	x.done.Store(1 << 20)
	x.begun = time.Now().Add(-2 * time.Second)
	out.Reset()
	return r, x, out, status
}

func TestProgressLineHasBytesPercentRateAndTimeLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, x, out, status := reporting(t, false, false)
		r.showActive()
		line := status.String()
		for _, part := range []string{"db/main dump", "2.0 MiB of 3.0 MiB", "66%", "KiB/s", "2s left"} {
			if !strings.Contains(line, part) {
				t.Errorf("%q does not have %q", line, part)
			}
		}
		if strings.Contains(line, "\x1b") || out.Len() > 0 {
			t.Errorf("not for a terminal: %q, %q", line, out)
		}
		r.finish(x, nil)
		if got := out.String(); !strings.Contains(got, "db/main dump: 1.0 MiB in 2s") || !strings.Contains(got, "resumed at 1.0 MiB") {
			t.Errorf("finished: %q", got)
		}
	})
}

func TestProgressOnATerminalKeepsOneLineAndTakesItAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, x, _, status := reporting(t, true, false)
		r.showActive()
		status.Reset()
		r.showActive()
		if got := status.String(); !strings.HasPrefix(got, "\x1b[1A\r\x1b[J") || strings.Count(got, "\n") != 1 {
			t.Errorf("drawn again: %q", got)
		}
		status.Reset()
		r.retrying("db/main", errors.New("lost"), time.Second)
		lines := strings.Split(status.String(), "\n")
		if !strings.HasSuffix(lines[0], "db/main: lost; trying again in 1s") || !strings.Contains(lines[1], "66%") {
			t.Errorf("a message: %q", lines)
		}
		status.Reset()
		if r.Write([]byte("warning\n")); !strings.HasPrefix(status.String(), "\x1b[1A\r\x1b[Jwarning\n") {
			t.Errorf("a warning: %q", status)
		}
		status.Reset()
		r.finish(x, errors.New("lost"))
		if got := status.String(); got != "\x1b[1A\r\x1b[J" {
			t.Errorf("finished: %q", got)
		}
	})
}

func TestProgressForMachines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, x, out, _ := reporting(t, false, true)
		r.showActive()
		r.finish(x, errors.New("lost"))
		r.failed("db/main", errors.New("lost"))
		if err := r.summary(1, false); !errors.Is(err, errReported) {
			t.Errorf("error is %v", err)
		}
		var kinds []string
		for line := range strings.Lines(out.String()) {
			var e event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatal(err)
			}
			kinds = append(kinds, e.Event)
			if e.Event == "progress" && (e.Bytes != 1<<20 || e.Offset != 1<<20 || e.Size != 2<<20 || e.Seconds < 1) {
				t.Errorf("progress is %+v", e)
			}
		}
		if got := strings.Join(kinds, " "); got != "progress broken failed summary" {
			t.Errorf("events are %s", got)
		}
	})
}

func TestTimeLeftThatNobodyCanTellIsNotTold(t *testing.T) {
	r := newReporter(output{new(strings.Builder), new(strings.Builder)}, false)
	defer r.close()
	x := r.start("db", step{to: version("v", 1, 1)}, 4<<40)
	x.done.Store(312) // the first record of a ZFS stream, and then it takes its time
	x.begun = time.Now().Add(-10 * time.Second)
	if line := x.line(); !strings.Contains(line, ", ? left") {
		t.Errorf("%q", line)
	}
}
