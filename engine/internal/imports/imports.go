// SPDX-License-Identifier: GPL-3.0-or-later

// Package imports makes a session's state of what another program has: a Baileys multi-file auth directory, or a whatsmeow database. The source is only read.
package imports

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.mau.fi/whatsmeow/types"

	"warren/engine/internal/state"
)

// Formats of a source.
const (
	FormatBaileys   = "baileys"
	FormatWhatsmeow = "whatsmeow"
)

var (
	// ErrSource means that the source is not what it should be. The error says what is wrong with it.
	ErrSource = errors.New("the source cannot be imported")
	// ErrTarget means that the target is taken, or cannot be written.
	ErrTarget = errors.New("the target cannot be used")
)

func sourceError(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrSource, fmt.Errorf(format, args...))
}

// Options of an import.
type Options struct {
	Format string
	From   string
	To     string // the session's state directory; it is created if it is missing
	DryRun bool   // everything is read and checked, nothing is kept
	JID    string // picks a device of several, by its whole JID or its number
}

// Report says what an import did, or would do.
type Report struct {
	Format   string `json:"format"`
	JID      string `json:"jid"`
	LID      string `json:"lid,omitempty"`
	Name     string `json:"name,omitempty"`
	Platform string `json:"platform,omitempty"`
	DryRun   bool   `json:"dry_run"`
	// Carried counts what is in the new state, by kind.
	Carried    map[string]int `json:"carried"`
	NotCarried []Left         `json:"not_carried"`
	Warnings   []string       `json:"warnings"`
	Bytes      int64          `json:"bytes"`
}

// Left is what stays behind.
type Left struct {
	Kind   string `json:"kind"`
	Count  int    `json:"count"`
	Reason string `json:"reason"`
}

func (r *Report) carry(kind string, count int) {
	if count > 0 {
		r.Carried[kind] += count
	}
}

func (r *Report) leave(kind string, count int, reason string) {
	if count > 0 {
		r.NotCarried = append(r.NotCarried, Left{kind, count, reason})
	}
}

func (r *Report) warn(format string, args ...any) {
	r.Warnings = append(r.Warnings, fmt.Sprintf(format, args...))
}

func (r *Report) identify(jid, lid types.JID) {
	r.JID = jid.String()
	if !lid.IsEmpty() {
		r.LID = lid.String()
	}
}

// Run imports. Without an error state.db is in the target, whole and synced; with one the target is as it was before.
func Run(ctx context.Context, options Options) (*Report, error) {
	read := map[string]func(context.Context, Options, string, *Report) error{FormatBaileys: readBaileys, FormatWhatsmeow: readWhatsmeow}[options.Format]
	report := &Report{Format: options.Format, DryRun: options.DryRun, Carried: map[string]int{}, NotCarried: []Left{}, Warnings: []string{}}
	if options.DryRun {
		return report, dryRun(ctx, options, report, read)
	}
	made, err := makeDirectory(options.To)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTarget, err)
	}
	err = state.Fill(ctx, options.To, func(ctx context.Context, work string) error { return read(ctx, options, work, report) })
	if err == nil {
		var info fs.FileInfo
		if info, err = os.Stat(filepath.Join(options.To, state.FileName)); err == nil {
			report.Bytes = info.Size()
			return report, nil
		}
	}
	if made {
		_ = os.RemoveAll(options.To)
	}
	if !errors.Is(err, ErrSource) {
		err = fmt.Errorf("%w: %w", ErrTarget, err)
	}
	return nil, err
}

// makeDirectory reports whether the directory is new.
func makeDirectory(path string) (made bool, err error) {
	if _, err := os.Stat(path); err == nil {
		return false, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return false, err
	}
	return true, os.Mkdir(path, 0o700)
}

// dryRun makes the state in a temporary place.
func dryRun(ctx context.Context, options Options, report *Report, read func(context.Context, Options, string, *Report) error) error {
	if err := state.Vacant(options.To); err != nil {
		return fmt.Errorf("%w: %w", ErrTarget, err)
	}
	work, err := os.MkdirTemp("", "warren-import-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := read(ctx, options, work, report); err != nil {
		return err
	}
	info, err := os.Stat(filepath.Join(work, state.FileName))
	if err == nil {
		report.Bytes = info.Size()
	}
	return err
}
