// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.mau.fi/whatsmeow/util/keys"
	waLog "go.mau.fi/whatsmeow/util/log"
)

// FileName is the store in a session's directory.
const FileName = fileName

// Vacant says why dir cannot take a new state.db; nil if it can, also when it is not there.
func Vacant(dir string) error {
	for _, name := range []string{fileName, fileName + "-wal", fileName + "-journal"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			if err == nil {
				err = fs.ErrExist
			}
			return fmt.Errorf("%s in %s: %w", name, dir, err)
		}
	}
	return nil
}

// Fill gives dir a state.db, in one step: make writes a store into the folder it is given, under the name of FileName, and closes it. dir is locked meanwhile.
func Fill(ctx context.Context, dir string, make func(ctx context.Context, work string) error) error {
	lock, err := lockDirectory(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := Vacant(dir); err != nil {
		return err
	}
	work, err := os.MkdirTemp(dir, "import-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := make(ctx, work); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(work, fileName), filepath.Join(dir, fileName)); err != nil {
		return err
	}
	return syncDirectory(dir)
}

// PutPreKeys stores pre-keys that were made elsewhere. Those below firstLocal have been uploaded.
func (s *Store) PutPreKeys(ctx context.Context, list []*keys.PreKey, firstLocal uint32) error {
	transaction, err := s.raw.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer transaction.Rollback() //nolint:errcheck // after a commit there is nothing to take back
	for _, key := range list {
		_, err := transaction.ExecContext(ctx, "INSERT INTO whatsmeow_pre_keys (jid, key_id, key, uploaded) VALUES (?, ?, ?, ?)",
			s.Device.ID.String(), key.KeyID, key.Priv[:], key.KeyID < firstLocal)
		if err != nil {
			return err
		}
	}
	return transaction.Commit()
}

// PutSession stores a Signal session that was begun elsewhere.
func (s *Store) PutSession(ctx context.Context, address string, session []byte) error {
	return s.Device.Sessions.PutSession(context.WithValue(ctx, decrypting{}, true), address, session)
}

// MarkCopy makes the store count as a copy from the next time on that it is opened: its sessions are for reading only.
func (s *Store) MarkCopy(ctx context.Context) error {
	_, err := s.raw.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version=%d", copyMark))
	return err
}

// CopyOne copies the store at from, of which this process is the only user, to the new file at to, brings it to the schema of today, and keeps but the
// device that pick chooses among those there are. It tells of tables that are not whatsmeow's.
func CopyOne(ctx context.Context, from, to string, pick func(jids []string) (string, error)) (foreign int, err error) {
	raw := openDatabase(from, "rw", nil)
	if err = keepOne(ctx, raw, pick); err == nil {
		err = raw.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master WHERE type='table' AND name NOT GLOB 'whatsmeow_*' AND name NOT GLOB 'sqlite_*'").Scan(&foreign)
	}
	if closing := raw.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return 0, err
	}
	return foreign, copyStore(ctx, from, to, 0)
}

func keepOne(ctx context.Context, raw *sql.DB, pick func(jids []string) (string, error)) error {
	if err := check(ctx, raw); err != nil {
		return err
	}
	container, _, err := newContainer(raw, waLog.Noop)
	if err != nil {
		return err
	}
	if err := container.Upgrade(ctx); err != nil {
		return fmt.Errorf("schema: %w", err)
	}
	devices, err := container.GetAllDevices(ctx)
	if err != nil {
		return fmt.Errorf("device row: %w", err)
	}
	jids := make([]string, 0, len(devices))
	for _, device := range devices {
		jids = append(jids, device.ID.String())
	}
	chosen, err := pick(jids)
	if err != nil {
		return err
	}
	// The tables hang on the device row, but for this one.
	_, err1 := raw.ExecContext(ctx, "DELETE FROM whatsmeow_device WHERE jid<>?", chosen)
	_, err2 := raw.ExecContext(ctx, "DELETE FROM whatsmeow_privacy_tokens WHERE our_jid<>?", chosen)
	return errors.Join(err1, err2)
}

// Count counts the rows of one of whatsmeow's tables.
func (s *Store) Count(ctx context.Context, table string) (count int, err error) {
	err = s.raw.QueryRowContext(ctx, `SELECT count(*) FROM "`+strings.ReplaceAll(table, `"`, `""`)+`"`).Scan(&count)
	return count, err
}
