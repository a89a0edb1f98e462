// Command replicate copies snapshots (of ZFS, of btrfs, or immutable files such as database dumps) between hosts, over
// mutual TLS or ssh, and goes on where a broken transfer stopped.
//
// It is also the tour of package rpc: the passive side is in serve.go and service.go, the active side in peer.go and
// transfer.go. What both of them work on is a [Store], and that is an rpc.Handler; an *rpc.Client has the methods of one
// too, so replicating from here to there and from there to here is the same code.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() { // ends with the process
		<-signals
		stop() // asks everything to come to its end
		<-signals
		os.Exit(statusFailed) // at once: what is half done is resumed by the next run
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// The exit statuses.
const (
	statusDone   = 0
	statusFailed = 1 // something failed; the rest was done
	statusUsage  = 2
)

// output is where a command writes: results to out, progress, warnings and errors to status.
type output struct{ out, status io.Writer }

// command is one of the things that replicate does.
type command struct {
	name     string
	synopsis string // the arguments
	brief    string // one line, for the overview
	about    string // the rest of the help
	run      func(ctx context.Context, o output, flags *flag.FlagSet, args []string) error
}

func commands() []command {
	return []command{demoCommand, certsCommand, serveCommand, listCommand, pushCommand, pullCommand}
}

// usageError is bad input: exit status 2.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// errReported ends a command whose failures have been shown already.
var errReported = errors.New("something failed")

// run is the program without its process: it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		overview(stderr)
		return statusUsage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		return help(args[1:], stdout, stderr)
	}
	for _, c := range commands() {
		if c.name == args[0] {
			return c.invoke(ctx, args[1:], stdout, stderr)
		}
	}
	fmt.Fprintf(stderr, "replicate: unknown command %q; \"replicate help\" lists them\n", args[0])
	return statusUsage
}

func (c command) invoke(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors are shown below, and help goes to stdout
	err := c.run(ctx, output{out: stdout, status: stderr}, flags, args)
	var usage usageError
	switch {
	case err == nil:
		return statusDone
	case errors.Is(err, flag.ErrHelp):
		c.help(stdout, flags)
		return statusDone
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "replicate %s: %v\n\"replicate %s -h\" shows its flags\n", c.name, err, c.name)
		return statusUsage
	case errors.Is(err, errReported):
	case ctx.Err() != nil:
		fmt.Fprintf(stderr, "replicate %s: %v\n", c.name, errInterrupted)
	default:
		fmt.Fprintf(stderr, "replicate %s: %v\n", c.name, err)
	}
	return statusFailed
}

// parse reads the flags; what is wrong with them is the user's.
func parse(flags *flag.FlagSet, args []string) error {
	err := flags.Parse(args)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		return usageError{err.Error()}
	}
	return err
}

// noArguments refuses what stands after the flags.
func noArguments(flags *flag.FlagSet) error {
	if flags.NArg() > 0 {
		return usagef("unexpected argument %q", flags.Arg(0))
	}
	return nil
}

func overview(w io.Writer) {
	fmt.Fprint(w, "replicate copies snapshots of ZFS, of btrfs, or as files, between hosts, and resumes what breaks off.\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  replicate %-6s %s\n", c.name, c.brief)
	}
	fmt.Fprint(w, aboutStores)
	fmt.Fprint(w, "\n\"replicate COMMAND -h\" explains a command. Exit status: 0 all done, 1 something failed (the rest was\n"+
		"still done), 2 wrong usage.\n")
}

// help shows the overview, or what "replicate COMMAND -h" shows.
func help(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		overview(stdout)
		return statusDone
	}
	return run(context.Background(), []string{args[0], "-h"}, stdout, stderr)
}

func (c command) help(w io.Writer, flags *flag.FlagSet) {
	fmt.Fprintf(w, "usage: replicate %s %s\n\n%s", c.name, c.synopsis, c.about)
	any := false
	flags.VisitAll(func(*flag.Flag) { any = true })
	if any {
		fmt.Fprint(w, "\nFlags:\n")
		flags.SetOutput(w)
		flags.PrintDefaults()
	}
}
