// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	waLog "go.mau.fi/whatsmeow/util/log"

	"warren/engine/internal/logs"
)

func TestMain(m *testing.M) {
	logs.SetupLibsignal(slog.New(slog.DiscardHandler))
	os.Exit(m.Run())
}

func open(t testing.TB, dir string, create bool) (*Store, error) {
	t.Helper()
	return Open(context.Background(), dir, Options{Create: create, Log: waLog.Noop})
}

func mustOpen(t testing.TB, dir string, create bool) *Store {
	t.Helper()
	s, err := open(t, dir, create)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustClose(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// pair does what whatsmeow does to the store at pairing.
func pair(t testing.TB, device *store.Device) {
	t.Helper()
	id := types.NewADJID("15550001", 0, 1)
	device.ID, device.LID = &id, types.JID{User: "900001", Device: 1, Server: types.HiddenUserServer}
	device.Account = &waAdv.ADVSignedDeviceIdentity{
		Details: []byte{1}, AccountSignature: make([]byte, 64), AccountSignatureKey: make([]byte, 32), DeviceSignature: make([]byte, 64),
	}
	if err := device.Save(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func paired(t testing.TB) (*Store, string) {
	t.Helper()
	dir := t.TempDir()
	s := mustOpen(t, dir, true)
	pair(t, s.Device)
	return s, dir
}

func TestLifeOfAStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "odd ?%# name")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, dir, false); !errors.Is(err, ErrMissing) {
		t.Fatalf("got %v", err)
	}
	s := mustOpen(t, dir, true)
	if s.Device.ID != nil {
		t.Fatal("a new store has a device")
	}
	if _, err := open(t, dir, false); !errors.Is(err, ErrLocked) {
		t.Fatalf("got %v", err)
	}
	pair(t, s.Device)
	mustClose(t, s)
	entries, _ := os.ReadDir(dir)
	if len(entries) != 2 {
		t.Errorf("left: %v", entries)
	}
	s = mustOpen(t, dir, false)
	if s.Device.ID == nil || s.Device.ID.User != "15550001" {
		t.Fatalf("device: %v", s.Device.ID)
	}
	if err := s.DeleteDevice(context.Background()); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	s = mustOpen(t, dir, false)
	if s.Device.ID != nil {
		t.Error("the device row is left")
	}
	mustClose(t, s)
}

func TestDamageIsNeverReplaced(t *testing.T) {
	ctx := context.Background()
	damage := map[string]func(t *testing.T, dir string){
		"empty":     func(t *testing.T, dir string) { write(t, dir, "state.db", nil) },
		"no SQLite": func(t *testing.T, dir string) { write(t, dir, "state.db", make([]byte, 8192)) },
		"cut": func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "state.db"), 20_000); err != nil {
				t.Fatal(err)
			}
		},
		"a directory": func(t *testing.T, dir string) {
			if err := errors.Join(os.Remove(filepath.Join(dir, "state.db")), os.Mkdir(filepath.Join(dir, "state.db"), 0o700)); err != nil {
				t.Fatal(err)
			}
		},
		"a journal alone": func(t *testing.T, dir string) {
			if err := os.Rename(filepath.Join(dir, "state.db"), filepath.Join(dir, "state.db-wal")); err != nil {
				t.Fatal(err)
			}
		},
		"no table": func(t *testing.T, dir string) { execute(t, dir, "DROP TABLE whatsmeow_version") },
		"two devices": func(t *testing.T, dir string) {
			execute(t, dir, `INSERT INTO whatsmeow_device SELECT 'twin@s.whatsapp.net', lid, facebook_uuid, registration_id, noise_key, identity_key,
				signed_pre_key, signed_pre_key_id, signed_pre_key_sig, adv_key, adv_details, adv_account_sig, adv_account_sig_key, adv_device_sig,
				platform, business_name, push_name, lid_migration_ts, companion_meta_nonce FROM whatsmeow_device`)
		},
		"newer schema": func(t *testing.T, dir string) {
			execute(t, dir, "UPDATE whatsmeow_version SET version=9999, compat=9999")
		},
	}
	for name, break_ := range damage {
		t.Run(name, func(t *testing.T) {
			s, dir := paired(t)
			mustClose(t, s)
			break_(t, dir)
			before := listing(t, dir)
			for _, create := range []bool{false, true} {
				if _, err := Open(ctx, dir, Options{Create: create, Log: waLog.Noop}); !errors.Is(err, ErrUnreadable) {
					t.Fatalf("create=%v: %v", create, err)
				}
			}
			if after := listing(t, dir); before != after {
				t.Errorf("files changed from %s to %s", before, after)
			}
		})
	}
}

func write(t *testing.T, dir, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func execute(t *testing.T, dir, statement string) {
	t.Helper()
	raw := openDatabase(filepath.Join(dir, "state.db"), "rw", nil)
	if _, err := raw.Exec(statement); err != nil {
		t.Fatal(err)
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
}

func listing(t *testing.T, dir string) (text string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			t.Fatal(err)
		}
		if entry.Name() != "state.db-shm" && (entry.Name() != "state.db-wal" || info.Size() > 0) {
			text += entry.Name() + ":" + info.ModTime().String() + " "
		}
	}
	return text
}

func TestCheckpointBoundsTheJournal(t *testing.T) {
	ctx := context.Background()
	s, dir := paired(t)
	if _, err := s.Device.PreKeys.GetOrGenPreKeys(ctx, 300); err != nil {
		t.Fatal(err)
	}
	size := func() int64 {
		info, err := os.Stat(filepath.Join(dir, "state.db-wal"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	before := size()
	if err := s.Checkpoint(ctx, before); err != nil || size() != before {
		t.Fatalf("a small journal was emptied: %v", err)
	}
	if err := s.Checkpoint(ctx, before-1); err != nil || size() != 0 {
		t.Fatalf("the journal has %d bytes: %v", size(), err)
	}
	mustClose(t, s)
}

func TestPreKeysInOneTransaction(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s, _ := paired(t)
	keys, err := s.Device.PreKeys.GetOrGenPreKeys(ctx, 812)
	if err != nil || len(keys) != 812 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	again, err := s.Device.PreKeys.GetOrGenPreKeys(ctx, 812)
	if err != nil || *again[811].Pub != *keys[811].Pub {
		t.Fatalf("other keys the second time: %v", err)
	}
	if _, err := s.Device.PreKeys.GenOnePreKey(ctx); err != nil {
		t.Fatal(err)
	}
	// All or nothing.
	time.AfterFunc(5*time.Millisecond, cancel)
	_, _ = s.Device.PreKeys.GetOrGenPreKeys(ctx, 5000)
	rest, err := s.Device.PreKeys.GetOrGenPreKeys(context.Background(), 812)
	if err != nil || rest[811].KeyID != 812 {
		t.Fatalf("after a cancelled batch: %v", err)
	}
	mustClose(t, s)
}

func TestSendingDoesNotOverwriteReceiving(t *testing.T) {
	ctx := context.Background()
	s, _ := paired(t)
	sessions, buffer := s.Device.Sessions, s.Device.EventBuffer
	const address = "900002_1:0"
	receive := func(value string) {
		t.Helper()
		err := buffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
			if _, err := sessions.GetSession(ctx, address); err != nil {
				return err
			}
			return sessions.PutSession(ctx, address, []byte(value))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	read := func() {
		t.Helper()
		if _, err := sessions.GetManySessions(ctx, []string{address}); err != nil {
			t.Fatal(err)
		}
	}
	put := func(value string) error {
		return sessions.PutManySessions(ctx, map[string][]byte{address: []byte(value)})
	}
	read()
	receive("received 1")
	if err := put("sent 1"); !errors.Is(err, ErrSessionChanged) {
		t.Fatalf("first contact from both sides: %v", err)
	}
	read()
	if err := put("sent 2"); err != nil {
		t.Fatal(err)
	}
	read()
	receive("received 2")
	if err := put("sent 3"); !errors.Is(err, ErrSessionChanged) {
		t.Fatalf("a turn of the ratchet in between: %v", err)
	}
	if err := put("sent 4"); !errors.Is(err, ErrSessionChanged) {
		t.Fatalf("a write without a reading: %v", err)
	}
	if current, err := sessions.GetSession(ctx, address); err != nil || string(current) != "received 2" {
		t.Fatalf("%s %v", current, err)
	}
	if err := sessions.PutSession(ctx, address, []byte("sent 5")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sessions.DeleteSession(ctx, address), put("sent 6")); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
}

func TestPausedDecryptionWaits(t *testing.T) {
	ctx := context.Background()
	s, _ := paired(t)
	resume, err := s.PauseDecryption(ctx)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		done <- s.Device.EventBuffer.DoDecryptionTxn(ctx, func(context.Context) error { return nil })
	}()
	select {
	case <-done:
		t.Fatal("it did not wait")
	case <-time.After(20 * time.Millisecond):
	}
	resume()
	resume()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
}

func TestDatabaseErrorsAreToldFromBadMessages(t *testing.T) {
	ctx := context.Background()
	var reported []error
	dir := t.TempDir()
	s, err := Open(ctx, dir, Options{Create: true, Log: waLog.Noop, OnDatabaseError: func(err error) { reported = append(reported, err) }})
	if err != nil {
		t.Fatal(err)
	}
	pair(t, s.Device)
	buffer := s.Device.EventBuffer
	bad := errors.New("bad mac")
	if err := buffer.DoDecryptionTxn(ctx, func(context.Context) error { return bad }); !errors.Is(err, bad) || len(reported) != 0 {
		t.Fatalf("%v %v", err, reported)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	_, _ = buffer.GetBufferedEvent(cancelled, [32]byte{})
	if len(reported) != 0 {
		t.Fatalf("the end of the session was reported: %v", reported)
	}
	mustClose(t, s)
	_, _ = buffer.GetBufferedEvent(ctx, [32]byte{})
	_ = buffer.DoDecryptionTxn(ctx, func(context.Context) error { return nil })
	if len(reported) != 2 {
		t.Fatalf("%v", reported)
	}
}
