// Command warren-sim is a simulated WhatsApp with virtual phones. Its contract is docs/simulator.md.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"warren/engine/internal/sim"
)

func main() {
	if err := run(); err != nil {
		slog.Error("warren-sim failed", "action", "failed", "error", err)
		os.Exit(1)
	}
}

type options struct {
	listen, control, caFile string
	seed                    *uint64
	level                   slog.Level
}

func parse(args []string) (options, error) {
	var o options
	o.level = slog.LevelWarn
	flags := flag.NewFlagSet("warren-sim", flag.ContinueOnError)
	flags.StringVar(&o.listen, "listen", "127.0.0.1:0", "address for clients, loopback only")
	flags.StringVar(&o.control, "control", "127.0.0.1:0", "address of the control API, loopback only")
	flags.StringVar(&o.caFile, "ca-file", "", "where to write the CA certificate (default: a new temporary directory)")
	flags.Func("seed", "makes keys and ids repeat themselves at every run with the same number", func(text string) error {
		seed, err := strconv.ParseUint(text, 10, 64)
		o.seed = &seed
		return err
	})
	flags.TextVar(&o.level, "log-level", o.level, "debug, info, warn or error")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return o, nil
}

func run() error {
	// Signals are taken before anything is announced: whoever reads the line may stop us at once.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	o, err := parse(os.Args[1:])
	if err == flag.ErrHelp {
		return nil
	} else if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: o.level}))
	slog.SetDefault(log)
	simulator, err := sim.Start(sim.Config{Listen: o.listen, Control: o.control, Seed: o.seed, Log: log})
	if err != nil {
		return err
	}
	caFile, cleanup, err := writeCA(o.caFile, simulator.CAPEM())
	if err != nil {
		return err
	}
	defer cleanup()
	if err := announce(simulator, caFile); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-parentGone():
	}
	return simulator.Close()
}

// announce prints the one line that stdout ever gets.
func announce(s *sim.Simulator, caFile string) error {
	return json.NewEncoder(os.Stdout).Encode(struct {
		Endpoint string `json:"endpoint"`
		Control  string `json:"control"`
		RootKey  string `json:"root_key"`
		CAFile   string `json:"ca_file"`
	}{s.Endpoint(), s.ControlURL(), s.RootKeyHex(), caFile})
}

// writeCA writes the certificate; cleanup removes what only this process needed.
func writeCA(path string, pem []byte) (written string, cleanup func(), err error) {
	cleanup = func() {}
	if path == "" {
		dir, err := os.MkdirTemp("", "warren-sim-")
		if err != nil {
			return "", cleanup, err
		}
		cleanup = func() { _ = os.RemoveAll(dir) } // a leftover in the temporary directory harms nobody
		path = filepath.Join(dir, "ca.pem")
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", cleanup, err
	}
	return path, cleanup, os.WriteFile(path, pem, 0o644)
}

// parentGone is closed when standard input, if it is a pipe, ends: so the simulator never outlives who started it.
func parentGone() <-chan struct{} {
	gone := make(chan struct{})
	info, err := os.Stdin.Stat()
	if err != nil || info.Mode()&os.ModeNamedPipe == 0 {
		return gone
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // however it ends, nobody is there any more
		close(gone)
	}()
	return gone
}
