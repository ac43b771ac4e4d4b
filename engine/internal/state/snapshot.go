// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ErrClosed means that the store was closed meanwhile.
var ErrClosed = errors.New("the session is closed")

// Copy tells what a snapshot holds.
type Copy struct {
	Paired   bool
	JID, LID string
	Bytes    int64
}

// Snapshot writes a consistent, compact copy of the open store to the new file at to, while whatsmeow goes on. Close waits for it.
func (s *Store) Snapshot(ctx context.Context, to string) (Copy, error) {
	s.life.RLock()
	defer s.life.RUnlock()
	if s.closed {
		return Copy{}, ErrClosed
	}
	result, err := snapshot(ctx, s.path, to)
	return result, sorted(err)
}

// SnapshotClosed does the same for a session that is not open, under the lock of its directory. The error may wrap ErrDisk, ErrMissing, ErrUnreadable or ErrLocked.
func SnapshotClosed(ctx context.Context, dir, to string) (Copy, error) {
	result, err := snapshotClosed(ctx, dir, to)
	return result, sorted(err)
}

func snapshotClosed(ctx context.Context, dir, to string) (Copy, error) {
	lock, err := lockDirectory(dir)
	if err != nil {
		return Copy{}, err
	}
	defer lock.Close()
	s := &Store{path: filepath.Join(dir, fileName)}
	if err := s.ensureFile(ctx, dir, false); err != nil {
		return Copy{}, err
	}
	raw := openDatabase(s.path, "rw", nil)
	err = check(ctx, raw)
	if closing := raw.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return Copy{}, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	return snapshot(ctx, s.path, to)
}

func snapshot(ctx context.Context, from, to string) (Copy, error) {
	if err := copyStore(ctx, from, to, copyMark); err != nil {
		return Copy{}, fmt.Errorf("snapshot: %w", err)
	}
	result, err := describe(ctx, to)
	if err != nil {
		_ = os.Remove(to)
		return Copy{}, fmt.Errorf("snapshot: %w", err)
	}
	return result, nil
}

// describe reads what a copy holds, without leaving anything beside it.
func describe(ctx context.Context, path string) (result Copy, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return Copy{}, err
	}
	result.Bytes = info.Size()
	raw, err := openReadOnly(path)
	if err != nil {
		return Copy{}, err
	}
	defer func() { err = errors.Join(err, raw.Close()) }()
	rows, err := raw.QueryContext(ctx, "SELECT jid, coalesce(lid, '') FROM whatsmeow_device")
	if err != nil {
		return Copy{}, err
	}
	defer rows.Close()
	for rows.Next() {
		if result.Paired {
			return Copy{}, errors.New("it holds more than one device")
		}
		if err := rows.Scan(&result.JID, &result.LID); err != nil {
			return Copy{}, err
		}
		result.Paired = true
	}
	return result, rows.Err()
}
