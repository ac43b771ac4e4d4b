// SPDX-License-Identifier: GPL-3.0-or-later

// Command warren-engine speaks WhatsApp for warren's daemon, which starts it. See docs/engine-protocol.md.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"go.mau.fi/whatsmeow/store"

	"warren/engine/internal/endpoint"
	"warren/engine/internal/engine"
	"warren/engine/internal/frames"
	"warren/engine/internal/logs"
	"warren/engine/internal/waversion"
)

// version is the engine's; a release build sets it with -ldflags "-X main.version=…".
var version = "0.1.0"

const (
	exitUsage = 64
	// maxMemoryLimitMB keeps the limit in bytes within 64 bits.
	maxMemoryLimitMB = 1 << 40
	pipeFD           = 3
	logFlush         = time.Second
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "import" {
		os.Exit(runImport(os.Args[2:], os.Stdout, os.Stderr))
	}
	os.Exit(run(os.Args[1:]))
}

// arguments are the command line's.
type arguments struct {
	address, rootKey, caFile string
	versionCache             string
	waVersion                store.WAVersionContainer
	maxSessions              int
	memoryLimitMB            int64
	level                    slog.Level
	version                  bool
}

func parseArguments(words []string) (a arguments, err error) {
	flags := flag.NewFlagSet("warren-engine", flag.ContinueOnError)
	flags.StringVar(&a.address, "endpoint", "", "connect to a simulator at wss://127.0.0.1:PORT instead of WhatsApp")
	flags.StringVar(&a.rootKey, "root-key", "", "the simulator's root key, 64 hexadecimal digits (only with --endpoint)")
	flags.StringVar(&a.caFile, "ca-file", "", "the simulator's CA certificate (only with --endpoint)")
	flags.StringVar(&a.versionCache, "version-cache", "", "file in which the version of WhatsApp Web is kept over restarts")
	flags.Func("wa-version", "claim to be this version of WhatsApp Web, such as 2.3000.1045649367, instead of asking for the current one", func(text string) (err error) {
		a.waVersion, err = waversion.Parse(text)
		return err
	})
	flags.IntVar(&a.maxSessions, "max-sessions", 250, "how many sessions may be open at one time")
	flags.Int64Var(&a.memoryLimitMB, "memory-limit-mb", 0, "how much memory Go should keep to, in MiB; 0 for no limit")
	flags.TextVar(&a.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	flags.BoolVar(&a.version, "version", false, "print the versions as JSON and exit")
	if err := flags.Parse(words); err != nil {
		return a, err
	}
	switch {
	case flags.NArg() > 0:
		return a, errors.New("no arguments are expected")
	case a.maxSessions < 1:
		return a, errors.New("--max-sessions must be positive")
	case a.memoryLimitMB < 0 || a.memoryLimitMB > maxMemoryLimitMB:
		return a, fmt.Errorf("--memory-limit-mb must be between 0 and %d", maxMemoryLimitMB)
	}
	return a, nil
}

func run(words []string) int {
	given, err := parseArguments(words)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return engine.ExitOK
	case err != nil:
		return usage(err)
	case given.version:
		return printVersion()
	}
	// Session state is secret: no file of this process is readable by others.
	syscall.Umask(0o077)
	ignoreSignals()
	if given.memoryLimitMB > 0 {
		debug.SetMemoryLimit(given.memoryLimitMB << 20)
	}
	where, err := endpoint.Parse(given.address, given.rootKey, given.caFile)
	if err != nil {
		return usage(err)
	}
	pipe, err := openPipe()
	if err != nil {
		return usage(err)
	}
	output := logs.NewOutput(os.Stderr)
	defer output.Close(logFlush)
	log := logs.New(output, given.level)
	logs.SetupLibsignal(log)
	return engine.Run(engine.Options{
		Pipe: pipe, Endpoint: where, Log: log, MaxSessions: given.maxSessions,
		Version: version, Whatsmeow: whatsmeowVersion(), Stop: stopSignal(),
		WAVersion: given.waVersion, VersionCache: given.versionCache,
	})
}

// printVersion tells what the hello frame tells, for `warren version` and for people.
func printVersion() int {
	err := json.NewEncoder(os.Stdout).Encode(struct {
		Engine    string `json:"engine"`
		Whatsmeow string `json:"whatsmeow"`
		Protocol  int    `json:"protocol"`
	}{version, whatsmeowVersion(), frames.Version})
	if err != nil {
		return usage(err)
	}
	return engine.ExitOK
}

func usage(err error) int {
	fmt.Fprintln(os.Stderr, "warren-engine:", err)
	return exitUsage
}

// ignoreSignals leaves the ones of a terminal to the daemon, which ends us in order, and turns a broken stderr into an error instead of a death.
func ignoreSignals() {
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
}

func stopSignal() <-chan struct{} {
	signals, stop := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, syscall.SIGTERM)
	go func() {
		<-signals
		close(stop)
	}()
	return stop
}

// openPipe takes over the socket that the daemon passed as file descriptor 3.
func openPipe() (net.Conn, error) {
	file := os.NewFile(pipeFD, "daemon")
	if file == nil {
		return nil, errors.New("file descriptor 3 is not open: this program is started by warrend")
	}
	defer file.Close()
	pipe, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("file descriptor 3 is not a socket: this program is started by warrend (%w)", err)
	}
	return pipe, nil
}

func whatsmeowVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, dependency := range info.Deps {
		if dependency.Path == "go.mau.fi/whatsmeow" {
			return dependency.Version
		}
	}
	return ""
}
