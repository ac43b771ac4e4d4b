// SPDX-License-Identifier: GPL-3.0-or-later

package imports

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	waLog "go.mau.fi/whatsmeow/util/log"

	"warren/engine/internal/state"
)

// countedTables are what a report tells of a whatsmeow store, by table.
var countedTables = []struct{ table, kind string }{
	{"whatsmeow_device", "device"},
	{"whatsmeow_pre_keys", "pre_keys"},
	{"whatsmeow_sessions", "sessions"},
	{"whatsmeow_identity_keys", "identity_keys"},
	{"whatsmeow_sender_keys", "sender_keys"},
	{"whatsmeow_app_state_sync_keys", "app_state_keys"},
	{"whatsmeow_app_state_version", "app_state_versions"},
	{"whatsmeow_contacts", "contacts"},
	{"whatsmeow_chat_settings", "chat_settings"},
	{"whatsmeow_message_secrets", "message_secrets"},
	{"whatsmeow_privacy_tokens", "privacy_tokens"},
	{"whatsmeow_lid_map", "lid_mappings"},
	{"whatsmeow_event_buffer", "unhandled_messages"},
	{"whatsmeow_retry_buffer", "sent_messages"},
}

func readWhatsmeow(ctx context.Context, options Options, work string, report *Report) error {
	private := filepath.Join(work, "source")
	if err := os.Mkdir(private, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(private)
	copied := filepath.Join(private, "source.db")
	if err := copyFiles(options.From, copied); err != nil {
		return err
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		if _, err := os.Lstat(options.From + suffix); err == nil {
			report.warn("%s is there: if a program still uses this database, end it before the session starts here: two clients with the same keys throw each other out",
				filepath.Base(options.From)+suffix)
			break
		}
	}
	var jids []string
	pick := func(found []string) (string, error) {
		jids = found
		return pickDevice(found, options.JID)
	}
	made := filepath.Join(work, state.FileName)
	foreign, err := state.CopyOne(ctx, copied, made, pick)
	if err != nil {
		return sourceError("%w", err)
	}
	report.leave("other_tables", foreign, "not whatsmeow's")
	if others := len(jids) - 1; others > 0 {
		report.leave("devices", others, "a session is one device: import the others on their own, with --jid")
	}
	return describeStore(ctx, work, report)
}

// copyFiles copies the database and its journals byte by byte, because SQLite itself would write beside a source that it opens. Nobody may write meanwhile.
func copyFiles(from, to string) error {
	before, err := stamps(from)
	if err != nil {
		return sourceError("%w", err)
	}
	for suffix := range before {
		if suffix == "-shm" {
			continue // an index of the journal, which SQLite makes anew
		}
		if err := copyFile(from+suffix, to+suffix); err != nil {
			return sourceError("%w", err)
		}
	}
	after, err := stamps(from)
	if err != nil {
		return sourceError("%w", err)
	}
	delete(before, "-shm")
	delete(after, "-shm")
	if fmt.Sprint(before) != fmt.Sprint(after) {
		return sourceError("%s is being written to: end the program that uses it", from)
	}
	return nil
}

// stamps tells which files belong to a database, and their sizes and times.
func stamps(path string) (map[string]string, error) {
	list := map[string]string{}
	for _, suffix := range []string{"", "-wal", "-journal", "-shm"} {
		info, err := os.Stat(path + suffix)
		switch {
		case err == nil && info.Mode().IsRegular():
			list[suffix] = fmt.Sprint(info.Size(), " ", info.ModTime().UnixNano())
		case err == nil:
			return nil, fmt.Errorf("%s is not a regular file", path+suffix)
		case suffix == "" || !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
	}
	return list, nil
}

func copyFile(from, to string) (err error) {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	_, err = io.Copy(target, source)
	return err
}

func pickDevice(found []string, wanted string) (string, error) {
	fitting := slices.DeleteFunc(slices.Clone(found), func(jid string) bool { return !isOf(jid, wanted) })
	switch {
	case len(found) == 0:
		return "", errors.New("it holds no paired device")
	case len(fitting) == 0:
		return "", fmt.Errorf("it holds no device of %s, but %s", wanted, strings.Join(found, ", "))
	case len(fitting) > 1:
		return "", fmt.Errorf("it holds %d devices: choose one with --jid: %s", len(fitting), strings.Join(fitting, ", "))
	}
	return fitting[0], nil
}

// describeStore opens what was made, which also proves that it opens, and counts.
func describeStore(ctx context.Context, work string, report *Report) (err error) {
	s, err := state.Open(ctx, work, state.Options{Log: waLog.Noop})
	if err != nil {
		return sourceError("%w", err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	d := s.Device
	if err := checkAccount(d.Account, d.IdentityKey); err != nil {
		return sourceError("%w", err)
	}
	report.identify(*d.ID, d.LID)
	report.Name, report.Platform = d.PushName, d.Platform
	for _, counted := range countedTables {
		count, err := s.Count(ctx, counted.table)
		if err != nil {
			return sourceError("%w", err)
		}
		report.carry(counted.kind, count)
	}
	return s.MarkCopy(ctx) // nobody knows how old the source is
}
