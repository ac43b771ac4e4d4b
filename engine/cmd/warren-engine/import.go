// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"syscall"

	"warren/engine/internal/engine"
	"warren/engine/internal/imports"
	"warren/engine/internal/logs"
)

// Exit statuses of import, of those that sysexits.h knows.
const (
	exitSource = 65 // the source is not what it should be
	exitTarget = 73 // the target is taken, or cannot be written
	exitFailed = 70
)

// runImport makes a session's state of another program's. It prints a report in JSON, or one line that says why not.
func runImport(words []string, out, errs io.Writer) int {
	var options imports.Options
	flags := flag.NewFlagSet("warren-engine import", flag.ContinueOnError)
	flags.SetOutput(errs)
	flags.StringVar(&options.Format, "format", "", "baileys (a multi-file auth directory) or whatsmeow (an SQLite database)")
	flags.StringVar(&options.From, "from", "", "what to import; it is only read")
	flags.StringVar(&options.To, "to", "", "the session's new state directory")
	flags.BoolVar(&options.DryRun, "dry-run", false, "read and check everything, write nothing")
	flags.StringVar(&options.JID, "jid", "", "the JID or the number of one device, where there are several")
	err := flags.Parse(words)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return engine.ExitOK
	case err != nil:
		return exitUsage
	case flags.NArg() > 0 || options.From == "" || options.To == "" || (options.Format != imports.FormatBaileys && options.Format != imports.FormatWhatsmeow):
		fmt.Fprintln(errs, "warren-engine import: --format baileys or whatsmeow, --from and --to are needed, and nothing else")
		return exitUsage
	}
	syscall.Umask(0o077)
	logs.SetupLibsignal(slog.New(slog.DiscardHandler))
	if options.To, err = filepath.Abs(options.To); err == nil {
		var report *imports.Report
		if report, err = imports.Run(context.Background(), options); err == nil {
			err = json.NewEncoder(out).Encode(report)
		}
	}
	if err == nil {
		return engine.ExitOK
	}
	fmt.Fprintln(errs, "warren-engine import:", err)
	switch {
	case errors.Is(err, imports.ErrSource):
		return exitSource
	case errors.Is(err, imports.ErrTarget):
		return exitTarget
	}
	return exitFailed
}
