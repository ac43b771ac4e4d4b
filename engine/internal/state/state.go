// SPDX-License-Identifier: GPL-3.0-or-later

// Package state opens and closes the directory of one session: state.db, whatsmeow's own SQLite store, and the lock that keeps a second engine out.
//
// Missing is not unreadable: a file that is there but is not a whole, readable store is never replaced by a new identity.
package state

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"go.mau.fi/whatsmeow/store/sqlstore/upgrades"
	waLog "go.mau.fi/whatsmeow/util/log"
	"golang.org/x/sys/unix"
)

// Names in a session's directory.
const (
	fileName = "state.db"
	newName  = "state.db.new"
	lockName = "lock"
)

const versionTable = "whatsmeow_version"

// quiesce is how long Close waits for statements of goroutines that whatsmeow left behind.
const quiesce = 2 * time.Second

// Reasons why a directory does not open.
var (
	ErrMissing    = errors.New("there is no state.db")
	ErrUnreadable = errors.New("state.db is there but cannot be used")
	ErrLocked     = errors.New("another process has this session open")
)

// Store is an open session directory.
type Store struct {
	Device *store.Device

	path    string
	lock    *os.File
	raw     *sql.DB
	gate    chan struct{}
	changes *changes
	last    Change // what was pending when it was closed

	troubles atomic.Int64

	life   sync.RWMutex // held for reading by snapshots
	closed bool
}

// Options of Open.
type Options struct {
	Create bool         // a missing state.db may be created
	Log    waLog.Logger // whatsmeow's store logs here
	// OnDatabaseError is called, possibly from several goroutines, when the database fails while a message is decrypted. It runs before whatsmeow decides
	// what to tell WhatsApp.
	OnDatabaseError func(error)
}

// Open locks dir and opens its store. The error wraps ErrDisk, or else ErrMissing, ErrUnreadable or ErrLocked.
func Open(ctx context.Context, dir string, options Options) (*Store, error) {
	lock, err := lockDirectory(dir)
	if err != nil {
		return nil, sorted(err)
	}
	s := &Store{path: filepath.Join(dir, fileName), lock: lock, gate: make(chan struct{}, 1), changes: newChanges()}
	if err := s.open(ctx, dir, options); err != nil {
		if s.raw != nil {
			_ = s.raw.Close()
		}
		_ = lock.Close()
		return nil, sorted(err)
	}
	return s, nil
}

func (s *Store) open(ctx context.Context, dir string, options Options) error {
	if err := s.ensureFile(ctx, dir, options.Create); err != nil {
		return err
	}
	raw := openDatabase(s.path, "rw", s.changes.hook)
	s.raw = raw
	if err := check(ctx, raw); err != nil {
		return fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	device, err := s.loadDevice(ctx, options)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	s.Device = device
	s.changes.device, s.changes.paired, err = deviceDigest(ctx, raw)
	if err != nil {
		return fmt.Errorf("%w: device row: %w", ErrUnreadable, err)
	}
	return nil
}

func lockDirectory(dir string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the directory does not exist", ErrMissing)
	} else if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return lock, nil
	}
	_ = lock.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, ErrLocked
	}
	return nil, fmt.Errorf("%w: lock: %w", ErrUnreadable, err)
}

// ensureFile leaves a state.db with a schema, or says why not.
func (s *Store) ensureFile(ctx context.Context, dir string, create bool) error {
	info, err := os.Lstat(s.path)
	switch {
	case err == nil && info.Mode().IsRegular():
		return checkHeader(s.path)
	case err == nil:
		return fmt.Errorf("%w: it is not a regular file", ErrUnreadable)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	// SQLite would replay this journal into the new file, and it says that there was a database.
	if wal, err := os.Lstat(s.path + "-wal"); err == nil && wal.Size() > 0 {
		return fmt.Errorf("%w: its journal is there without it", ErrUnreadable)
	}
	if !create {
		return ErrMissing
	}
	return createFile(ctx, dir)
}

// checkHeader keeps SQLite from an empty or foreign file: it would write a header of its own into an empty one.
func checkHeader(path string) error {
	const magic = "SQLite format 3\x00"
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	defer file.Close()
	head := make([]byte, len(magic))
	if _, err := io.ReadFull(file, head); err != nil || string(head) != magic {
		return fmt.Errorf("%w: it is not a database", ErrUnreadable)
	}
	return nil
}

// createFile makes state.db appear in one step, whole, so that an empty or half-made one is always damage.
func createFile(ctx context.Context, dir string) error {
	temporary, final := filepath.Join(dir, newName), filepath.Join(dir, fileName)
	for _, leftover := range []string{temporary, temporary + "-wal", temporary + "-shm", final + "-wal", final + "-shm"} {
		if err := os.Remove(leftover); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %w", ErrUnreadable, err)
		}
	}
	if err := writeSchema(ctx, temporary); err != nil {
		return fmt.Errorf("create state.db: %w", err)
	}
	if err := os.Chmod(temporary, 0o600); err != nil {
		return fmt.Errorf("create state.db: %w", err)
	}
	if err := os.Rename(temporary, final); err != nil {
		return fmt.Errorf("create state.db: %w", err)
	}
	return syncDirectory(dir)
}

func writeSchema(ctx context.Context, path string) error {
	raw := openDatabase(path, "rwc", nil)
	container, _, err := newContainer(raw, waLog.Noop)
	if err == nil {
		err = container.Upgrade(ctx)
	}
	if err == nil {
		err = truncateWAL(ctx, raw)
	}
	return errors.Join(err, raw.Close())
}

func syncDirectory(dir string) error {
	handle, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer handle.Close()
	if err := handle.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

// check reads the whole file. It costs a millisecond for a young session, some tens for a large one.
func check(ctx context.Context, raw *sql.DB) error {
	var result string
	if err := raw.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&result); err != nil {
		return err
	}
	if result != "ok" {
		return fmt.Errorf("integrity check: %s", result)
	}
	var tables int
	err := raw.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master WHERE type='table' AND name IN ('whatsmeow_device', ?)", versionTable).Scan(&tables)
	if err != nil {
		return err
	}
	if tables != 2 {
		return errors.New("it holds no whatsmeow store")
	}
	return nil
}

func newContainer(raw *sql.DB, log waLog.Logger) (*sqlstore.Container, *dbutil.Database, error) {
	wrapped, err := dbutil.NewWithDB(raw, "sqlite3")
	if err != nil {
		return nil, nil, err
	}
	wrapped.UpgradeTable = upgrades.Table
	wrapped.VersionTable = versionTable
	return sqlstore.NewWithWrappedDB(wrapped, log), wrapped, nil
}

func (s *Store) loadDevice(ctx context.Context, options Options) (*store.Device, error) {
	inner, wrapped, err := newContainer(s.raw, options.Log)
	if err != nil {
		return nil, err
	}
	if err := inner.Upgrade(ctx); err != nil {
		return nil, fmt.Errorf("schema: %w", err)
	}
	devices, err := inner.GetAllDevices(ctx)
	if err != nil {
		return nil, fmt.Errorf("device row: %w", err)
	}
	guarded := &container{DeviceContainer: inner, db: wrapped, onError: options.OnDatabaseError, gate: s.gate, troubles: &s.troubles}
	device := inner.NewDevice()
	switch len(devices) {
	case 0:
	case 1:
		device = devices[0]
	default:
		return nil, fmt.Errorf("it holds %d devices instead of one", len(devices))
	}
	if guarded.stale, err = loadStale(ctx, s.raw, wrapped, device); err != nil {
		return nil, err
	}
	if len(devices) == 0 {
		device.Container = guarded // which wraps it once it is paired
		return device, nil
	}
	guarded.wrap(device)
	return device, nil
}

// PauseDecryption keeps received messages from changing Signal sessions until resume is called, so that encrypting cannot fail with ErrSessionChanged
// for ever while a contact writes a lot.
func (s *Store) PauseDecryption(ctx context.Context) (resume func(), err error) {
	select {
	case s.gate <- struct{}{}:
		return sync.OnceFunc(func() { <-s.gate }), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// DeleteDevice removes the device row with everything that hangs on it. It does nothing when whatsmeow did it before.
func (s *Store) DeleteDevice(ctx context.Context) error {
	_, err := s.raw.ExecContext(ctx, "DELETE FROM whatsmeow_device")
	return err
}

// Checkpoint moves the write-ahead log into state.db and empties it, when it is larger than limit bytes. A reader of the file (a backup) may make it fail:
// the next one will do.
func (s *Store) Checkpoint(ctx context.Context, limit int64) error {
	info, err := os.Stat(s.path + "-wal")
	if errors.Is(err, fs.ErrNotExist) || (err == nil && info.Size() <= limit) {
		return nil
	} else if err != nil {
		return err
	}
	return truncateWAL(ctx, s.raw)
}

func truncateWAL(ctx context.Context, raw *sql.DB) error {
	conn, err := raw.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	// The session's only connection must not sit behind a reader for the whole busy timeout.
	if _, err := conn.ExecContext(ctx, "PRAGMA busy_timeout=100"); err != nil {
		return err
	}
	defer conn.ExecContext(context.WithoutCancel(ctx), "PRAGMA busy_timeout=5000") //nolint:errcheck // the connection works with either
	var busy, frames, moved int
	if err := conn.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &frames, &moved); err != nil {
		return err
	}
	if busy != 0 {
		return errors.New("checkpoint: the database is in use")
	}
	return nil
}

// Close waits for snapshots, checkpoints, closes the database and releases the lock. Statements that still run get a short while to end.
func (s *Store) Close() error {
	s.life.Lock()
	defer s.life.Unlock()
	s.closed = true
	for deadline := time.Now().Add(quiesce); s.raw.Stats().InUse > 0 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), quiesce)
	defer cancel()
	s.last = s.takeLast(ctx)
	checkpoint := s.Checkpoint(ctx, 0)
	return errors.Join(checkpoint, s.raw.Close(), s.lock.Close())
}
