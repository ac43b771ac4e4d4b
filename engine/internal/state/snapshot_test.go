// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mattn/go-sqlite3"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"golang.org/x/sys/unix"
)

func hashOf(n uint64) (hash [32]byte) {
	binary.BigEndian.PutUint64(hash[:], n)
	return hash
}

// receive writes what whatsmeow writes for one received message. Two sessions get the same content in one transaction, so that a torn copy shows.
func receive(ctx context.Context, device *store.Device, n uint64, handled bool) error {
	content := []byte(fmt.Sprintf("%01000d", n))
	err := device.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
		return errors.Join(
			device.Sessions.PutSession(ctx, "900002_1:0", content), device.EventBuffer.PutBufferedEvent(ctx, hashOf(n), content, time.Now()),
			device.Sessions.PutSession(ctx, "900003_1:0", content),
		)
	})
	if err == nil && handled {
		err = device.EventBuffer.ClearBufferedEventPlaintext(ctx, hashOf(n))
	}
	return err
}

// ask reads one value of a copy.
func ask[T any](t testing.TB, path, query string) (value T) {
	t.Helper()
	raw, err := openReadOnly(path)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.QueryRow(query).Scan(&value); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return value
}

func TestSnapshotsUnderTraffic(t *testing.T) {
	const snapshots = 50
	ctx := t.Context()
	s, dir := paired(t)
	if err := receive(ctx, s.Device, 0, false); err != nil { // its plaintext stays: nobody has taken it over
		t.Fatal(err)
	}
	stop, ended := make(chan struct{}), make(chan error, 1)
	written := uint64(1)
	go func() {
		for ; ; written++ {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			if err := receive(ctx, s.Device, written, true); err != nil {
				ended <- err
				return
			}
			if written%64 == 0 {
				_ = s.Checkpoint(ctx, 0) // a reader may be in its way
			}
		}
	}()
	last := ""
	for n := range snapshots {
		to := filepath.Join(dir, fmt.Sprint("copy", n))
		result, err := s.Snapshot(ctx, to)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(to)
		if err != nil || info.Mode() != 0o600 || info.Size() != result.Bytes || !result.Paired || result.JID != "15550001:1@s.whatsapp.net" || result.LID != "900001:1@lid" {
			t.Fatalf("%v %+v %v", info, result, err)
		}
		if verdict := ask[string](t, to, "PRAGMA integrity_check"); verdict != "ok" {
			t.Fatal(verdict)
		}
		if broken := ask[int](t, to, "SELECT count(*) FROM pragma_foreign_key_check"); broken != 0 {
			t.Fatalf("%d rows without their parents", broken)
		}
		if n := ask[int](t, to, "SELECT count(DISTINCT session) FROM whatsmeow_sessions"); n != 1 {
			t.Fatal("the copy is of more than one moment")
		}
		// At most the message that was under way is there beside the one that nobody took over.
		if n := ask[int](t, to, "SELECT count(*) FROM whatsmeow_event_buffer"); n < 1 || n > 2 {
			t.Fatalf("%d rows in the event buffer", n)
		}
		now := ask[string](t, to, "SELECT session FROM whatsmeow_sessions LIMIT 1")
		if now < last {
			t.Fatal("a later copy is older")
		}
		last = now
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d messages meanwhile", written)
	mustClose(t, s)
	for _, name := range names(t, dir) {
		if strings.HasPrefix(name, "copy") && strings.ContainsAny(name, "-.") {
			t.Errorf("%s is left", name)
		}
	}
}

func names(t testing.TB, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		list = append(list, entry.Name())
	}
	return list
}

// TestSnapshotHoldsEverything compares all tables of a store in which each has rows.
func TestSnapshotHoldsEverything(t *testing.T) {
	ctx := t.Context()
	s, dir := paired(t)
	fill(t, s)
	mustClose(t, s)
	to := filepath.Join(dir, "copy")
	if _, err := SnapshotClosed(ctx, dir, to); err != nil {
		t.Fatal(err)
	}
	source, err := openReadOnly(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	copied, err := openReadOnly(to)
	if err != nil {
		t.Fatal(err)
	}
	defer copied.Close()
	const schema = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
	if a, b := dump(t, source, schema), dump(t, copied, schema); !slices.Equal(a, b) {
		t.Errorf("the schema differs:\n%s\n%s", a, b)
	}
	tables := dump(t, source, "SELECT name FROM sqlite_master WHERE type='table'")
	for _, table := range tables {
		query := "SELECT * FROM " + table + " ORDER BY 1, 2, 3"
		if table == versionTable || table == "whatsmeow_lid_map" || table == "whatsmeow_nct_salt" {
			query = "SELECT * FROM " + table + " ORDER BY 1"
		}
		a, b := dump(t, source, query), dump(t, copied, query)
		if len(a) == 0 {
			t.Errorf("%s is empty: nothing is compared", table)
		}
		if table == "whatsmeow_event_buffer" {
			if len(a) != 2 || len(b) != 1 {
				t.Errorf("%d of %d rows of the event buffer", len(b), len(a))
			}
			continue
		}
		if !slices.Equal(a, b) {
			t.Errorf("%s differs", table)
		}
	}
}

// fill puts something into each table.
func fill(t testing.TB, s *Store) {
	t.Helper()
	ctx, d := context.Background(), s.Device
	contact, group := types.NewJID("900002", types.HiddenUserServer), types.NewJID("120363000000000001", types.GroupServer)
	number := types.NewJID("15550002", types.DefaultUserServer)
	_, err := d.PreKeys.GetOrGenPreKeys(ctx, 20)
	err = errors.Join(err,
		receive(ctx, d, 1, true), receive(ctx, d, 2, false),
		d.Identities.PutIdentity(ctx, "900002_1:0", [32]byte{1}),
		d.SenderKeys.PutSenderKey(ctx, group.String(), d.LID.SignalAddress().String(), []byte("own")),
		d.SenderKeys.PutSenderKey(ctx, group.String(), "900002_1:0", []byte("theirs")),
		d.AppStateKeys.PutAppStateSyncKey(ctx, []byte{1}, store.AppStateSyncKey{Data: []byte{1}, Fingerprint: []byte{2}, Timestamp: 3}),
		d.AppState.PutAppStateVersion(ctx, "regular", 7, [128]byte{1}),
		d.AppState.PutAppStateMutationMACs(ctx, "regular", 7, []store.AppStateMutationMAC{{IndexMAC: make([]byte, 32), ValueMAC: make([]byte, 32)}}),
		d.Contacts.PutContactName(ctx, contact, "Ana", "Ana"),
		d.ChatSettings.PutPinned(ctx, contact, true),
		d.MsgSecrets.PutMessageSecret(ctx, contact, contact, "3EB0", []byte{1}),
		d.PrivacyTokens.PutPrivacyTokens(ctx, store.PrivacyToken{User: contact, Token: []byte{1}, Timestamp: time.Unix(1700000000, 0)}),
		d.NCTSalt.PutNCTSalt(ctx, []byte{1}),
		d.LIDs.PutLIDMapping(ctx, contact, number),
		d.EventBuffer.AddOutgoingEvent(ctx, contact, "3EB0", "wa", []byte{1}),
	)
	if err != nil {
		t.Fatal(err)
	}
}

func dump(t testing.TB, raw *sql.DB, query string) (lines []string) {
	t.Helper()
	rows, err := raw.Query(query)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		t.Fatal(err)
	}
	values := make([]any, len(columns))
	for i := range values {
		values[i] = new(any)
	}
	for rows.Next() {
		if err := rows.Scan(values...); err != nil {
			t.Fatal(err)
		}
		line := ""
		for i, value := range values {
			if i > 0 {
				line += "|"
			}
			line += fmt.Sprint(*value.(*any))
		}
		lines = append(lines, line)
	}
	return lines
}

func TestSnapshotIsRefused(t *testing.T) {
	ctx := t.Context()
	s, dir := paired(t)
	to := filepath.Join(dir, "copy")
	if _, err := SnapshotClosed(ctx, dir, to); !errors.Is(err, ErrLocked) {
		t.Errorf("an open session: %v", err)
	}
	write(t, dir, "taken", []byte("x"))
	if _, err := s.Snapshot(ctx, filepath.Join(dir, "taken")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an existing file: %v", err)
	}
	if _, err := s.Snapshot(ctx, filepath.Join(dir, "nowhere", "copy")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	mustClose(t, s)
	if _, err := s.Snapshot(ctx, to); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed store: %v", err)
	}
	if _, err := SnapshotClosed(ctx, t.TempDir(), to); !errors.Is(err, ErrMissing) {
		t.Errorf("an empty directory: %v", err)
	}
	write(t, dir, fileName, []byte("garbage, garbage, garbage"))
	if _, err := SnapshotClosed(ctx, dir, to); !errors.Is(err, ErrUnreadable) {
		t.Errorf("garbage: %v", err)
	}
	if got := names(t, dir); slices.Contains(got, "copy") || slices.Contains(got, "copy"+partSuffix) {
		t.Errorf("left behind: %v", got)
	}
}

const inChild = "WARREN_TEST_CHILD"

// TestSnapshotOnAFullDisk: the system refuses to make the file any longer, as it does when the disk is full.
func TestSnapshotOnAFullDisk(t *testing.T) {
	// The limit is the whole process's, and go test writes files, too.
	if os.Getenv(inChild) == "" {
		child := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		child.Env = append(os.Environ(), inChild+"=1")
		if out, err := child.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	s, dir := paired(t)
	fill(t, s)
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, "copy")
	for _, room := range []uint64{0, 8 << 10, 64 << 10} {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: room, Max: before.Max}); err != nil {
			t.Fatal(err)
		}
		_, err := s.Snapshot(t.Context(), to)
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
			t.Fatal(err)
		}
		if got := names(t, dir); !errors.Is(err, ErrDisk) || slices.Contains(got, "copy") || slices.Contains(got, "copy"+partSuffix) {
			t.Errorf("with room for %d bytes: %v, %v", room, err, got)
		}
	}
	if _, err := s.Snapshot(t.Context(), to); err != nil {
		t.Errorf("with room again: %v", err)
	}
	mustClose(t, s)
	// Neither a new store nor one that is there opens, and nobody calls it damaged.
	fresh := t.TempDir()
	for _, place := range []string{fresh, dir} {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 0, Max: before.Max}); err != nil {
			t.Fatal(err)
		}
		_, err := open(t, place, true)
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
			t.Fatal(err)
		}
		if !errors.Is(err, ErrDisk) {
			t.Errorf("%v", err)
		}
		mustClose(t, mustOpen(t, place, true))
	}
}

func TestDiskTrouble(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{fs.ErrNotExist, false},
		{&fs.PathError{Err: syscall.ENOSPC}, true},
		{fmt.Errorf("lock: %w", syscall.EMFILE), true},
		{syscall.EACCES, false},
		{sqlite3.Error{Code: sqlite3.ErrFull}, true},
		{sqlite3.Error{Code: sqlite3.ErrReadonly}, true},
		{sqlite3.Error{Code: sqlite3.ErrNomem}, true},
		{fmt.Errorf("x: %w", sqlite3.Error{Code: sqlite3.ErrIoErr, SystemErrno: syscall.EIO}), true},
		{sqlite3.Error{Code: sqlite3.ErrIoErr}, false},
		{sqlite3.Error{Code: sqlite3.ErrCantOpen, SystemErrno: syscall.EROFS}, true},
		{sqlite3.Error{Code: sqlite3.ErrCantOpen, SystemErrno: syscall.ENOENT}, false},
		{sqlite3.Error{Code: sqlite3.ErrCorrupt}, false},
		{sqlite3.Error{Code: sqlite3.ErrNotADB}, false},
		{fmt.Errorf("x: %w", ErrDisk), true},
	} {
		if got := IsDiskTrouble(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}

// TestRestoredCopyBeginsNewSessions: a copy may be older than what was sent since.
func TestRestoredCopyBeginsNewSessions(t *testing.T) {
	ctx := t.Context()
	live, other := newPeer(t, "900002_1"), newPeer(t, "900001_1")
	live.begin(other)
	if _, err := live.device.PreKeys.GetOrGenPreKeys(ctx, 20); err != nil {
		t.Fatal(err)
	}
	for n := range 3 { // both ways, so that the session is established
		if text, err := other.decrypt(live.encrypt(fmt.Sprint("out", n))); err != nil || text != fmt.Sprint("out", n) {
			t.Fatal(err)
		}
		if text, err := live.decrypt(other.encrypt(fmt.Sprint("in", n))); err != nil || text != fmt.Sprint("in", n) {
			t.Fatal(err)
		}
	}
	const group = "120363000000000001@g.us"
	if err := errors.Join(
		live.device.SenderKeys.PutSenderKey(ctx, group, live.device.LID.SignalAddress().String(), []byte("own")),
		live.device.SenderKeys.PutSenderKey(ctx, group, "900002_1:0", []byte("theirs")),
	); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := live.store.Snapshot(ctx, filepath.Join(dir, fileName)); err != nil {
		t.Fatal(err)
	}
	// Life goes on after the copy, and the copy does not know.
	for n := range 50 {
		if _, err := other.decrypt(live.encrypt(fmt.Sprint("later", n))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := live.device.PreKeys.GenOnePreKey(ctx); err != nil {
		t.Fatal(err)
	}
	fromOther := other.encrypt("after the copy") // in the chain that the copy knows
	s := mustOpen(t, dir, false)
	restored := &peer{t: t, device: s.Device, store: s, other: live.other}
	address := live.other.String()
	sees := func() bool {
		t.Helper()
		has, err1 := s.Device.Sessions.HasSession(ctx, address)
		one, err2 := s.Device.Sessions.GetSession(ctx, address)
		many, err3 := s.Device.Sessions.GetManySessions(ctx, []string{address})
		if err := errors.Join(err1, err2, err3); err != nil || has != (one != nil) || has != (many[address] != nil) {
			t.Fatalf("%v %v %v %v", has, one != nil, many[address] != nil, err)
		}
		return has
	}
	if sees() {
		t.Fatal("a stale session is used for sending")
	}
	own, err1 := s.Device.SenderKeys.GetSenderKey(ctx, group, s.Device.LID.SignalAddress().String())
	theirs, err2 := s.Device.SenderKeys.GetSenderKey(ctx, group, "900002_1:0")
	if err := errors.Join(err1, err2); err != nil || own != nil || string(theirs) != "theirs" {
		t.Fatalf("sender keys %q and %q: %v", own, theirs, err)
	}
	if key, err := s.Device.PreKeys.GenOnePreKey(ctx); err != nil || key.KeyID <= skippedPreKeys {
		t.Errorf("a pre-key that may be somebody else's: %+v %v", key, err)
	}
	// What comes in the old session is read; it stays stale for sending, also over another life.
	if text, err := restored.decrypt(fromOther); err != nil || text != "after the copy" {
		t.Fatalf("%q %v", text, err)
	}
	mustClose(t, s)
	s = mustOpen(t, dir, false)
	restored.device, restored.store = s.Device, s
	if sees() {
		t.Fatal("stale no longer after another start")
	}
	again := other.encrypt("in the old session, late")
	restored.begin(other)
	if !sees() {
		t.Fatal("the new session is not used")
	}
	if text, err := other.decrypt(restored.encrypt("hello again")); err != nil || text != "hello again" {
		t.Fatalf("%q %v", text, err)
	}
	if text, err := restored.decrypt(again); err != nil || text != "in the old session, late" {
		t.Fatalf("the archived session: %q %v", text, err)
	}
	mustClose(t, s)
	s = mustOpen(t, dir, false)
	if !sees2(t, s, address) {
		t.Error("the new session is stale after a start")
	}
	mustClose(t, s)
}

func sees2(t testing.TB, s *Store, address string) bool {
	t.Helper()
	has, err := s.Device.Sessions.HasSession(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	return has
}

func TestStaleSessionsFollowTheirLID(t *testing.T) {
	ctx := t.Context()
	s, _ := paired(t)
	pn, lid := types.NewJID("15550002", types.DefaultUserServer), types.NewJID("900002", types.HiddenUserServer)
	if err := s.Device.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
		return s.Device.Sessions.PutSession(ctx, pn.SignalAddress().String(), []byte("x"))
	}); err != nil {
		t.Fatal(err)
	}
	restored := t.TempDir()
	if _, err := s.Snapshot(ctx, filepath.Join(restored, fileName)); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	for range 2 {
		s = mustOpen(t, restored, false)
		if err := s.Device.Sessions.MigratePNToLID(ctx, pn, lid); err != nil {
			t.Fatal(err)
		}
		if sees2(t, s, lid.SignalAddress().String()) {
			t.Fatal("the session under its LID is not stale")
		}
		mustClose(t, s)
	}
}

// BenchmarkSnapshot copies stores whose event buffer has grown to 1, 10 and 50 MB, with a message every millisecond beside it, and tells the longest that one took.
func BenchmarkSnapshot(b *testing.B) {
	for _, megabytes := range []int{1, 10, 50} {
		b.Run(fmt.Sprint(megabytes, "MB"), func(b *testing.B) {
			s, dir := paired(b)
			grow(b, s, megabytes)
			ctx := context.Background()
			stop, ended, worst := make(chan struct{}), make(chan struct{}), time.Duration(0)
			go func() {
				defer close(ended)
				for n := uint64(1 << 40); ; n++ {
					select {
					case <-stop:
						return
					case <-time.After(time.Millisecond):
					}
					start := time.Now()
					if err := receive(ctx, s.Device, n, true); err != nil {
						b.Error(err)
						return
					}
					worst = max(worst, time.Since(start))
				}
			}()
			var bytes int64
			b.ResetTimer()
			for n := range b.N {
				to := filepath.Join(dir, fmt.Sprint("copy", n))
				result, err := s.Snapshot(ctx, to)
				if err != nil {
					b.Fatal(err)
				}
				bytes = result.Bytes
				_ = os.Remove(to)
			}
			b.StopTimer()
			close(stop)
			<-ended
			b.ReportMetric(float64(worst.Microseconds())/1000, "ms-longest-message")
			b.ReportMetric(float64(bytes)/1024, "KiB-copy")
			mustClose(b, s)
		})
	}
}

// grow fills the store to a size: half with handled messages, half with what is copied.
func grow(b *testing.B, s *Store, megabytes int) {
	b.Helper()
	const each = 500
	tx, err := s.raw.Begin()
	if err != nil {
		b.Fatal(err)
	}
	for n := range uint64(megabytes << 20 / each / 2) {
		hash := hashOf(n)
		for i := range hash[8:] {
			hash[8+i] = byte(n >> (i % 8 * 8) * 31)
		}
		_, err1 := tx.Exec("INSERT INTO whatsmeow_event_buffer VALUES (?,?,NULL,1,1)", s.Device.ID.String(), hash[:])
		_, err2 := tx.Exec("INSERT INTO whatsmeow_sessions VALUES (?,?,?)", s.Device.ID.String(), fmt.Sprint(n), make([]byte, 2*each-250))
		if err := errors.Join(err1, err2); err != nil {
			b.Fatal(err)
		}
	}
	if err := tx.Commit(); err != nil {
		b.Fatal(err)
	}
	if err := s.Checkpoint(context.Background(), 0); err != nil {
		b.Fatal(err)
	}
}
