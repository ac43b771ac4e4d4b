// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
)

func take(t testing.TB, s *Store) Change {
	t.Helper()
	change, err := s.TakeChange(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return change
}

func TestWhatCountsAsAChange(t *testing.T) {
	ctx := t.Context()
	s := mustOpen(t, t.TempDir(), true)
	if change := take(t, s); change != NoChange {
		t.Fatalf("a new store: %d", change)
	}
	pair(t, s.Device)
	contact := types.NewJID("900002", types.HiddenUserServer)
	n := uint64(0)
	message := func() error {
		n++
		return receive(ctx, s.Device, n, true)
	}
	identity := func(key byte) func() error {
		return func() error { return s.Device.Identities.PutIdentity(ctx, "900002_1:0", [32]byte{key}) }
	}
	for _, c := range []struct {
		what string
		do   func() error
		want Change
	}{
		{"pairing", func() error { return nil }, IdentityChange},
		{"nothing", func() error { return nil }, NoChange},
		{"the same device", func() error { return s.Device.Save(ctx) }, NoChange},
		{"another name", func() error { s.Device.PushName = "Ana"; return s.Device.Save(ctx) }, IdentityChange},
		{"new pre-keys", func() error { _, err := s.Device.PreKeys.GetOrGenPreKeys(ctx, 5); return err }, IdentityChange},
		{"uploaded pre-keys", func() error { return s.Device.PreKeys.MarkPreKeysAsUploaded(ctx, 5) }, IdentityChange},
		{"a used pre-key", func() error { return s.Device.PreKeys.RemovePreKey(ctx, 1) }, OtherChange},
		{"an app-state key", func() error {
			return s.Device.AppStateKeys.PutAppStateSyncKey(ctx, []byte{1}, store.AppStateSyncKey{Data: []byte{1}, Fingerprint: []byte{2}, Timestamp: 3})
		}, IdentityChange},
		{"a contact's identity", identity(1), IdentityChange},
		{"the same identity", identity(1), NoChange},
		{"a new identity", identity(2), IdentityChange},
		{"first messages", message, IdentityChange},
		{"a message", message, OtherChange},
		{"handled again", func() error { return s.Device.EventBuffer.ClearBufferedEventPlaintext(ctx, hashOf(n)) }, NoChange},
		{"a name", func() error { _, _, err := s.Device.Contacts.PutPushName(ctx, contact, "Bob"); return err }, OtherChange},
		{"a message and its identity", func() error { return errors.Join(message(), identity(3)()) }, IdentityChange},
		{"the end of the device", func() error { return s.DeleteDevice(ctx) }, NoChange},
	} {
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		if s.PendingChange() < c.want {
			t.Errorf("%s: nothing is pending", c.what)
		}
		if got := take(t, s); got != c.want {
			t.Errorf("%s: %d instead of %d", c.what, got, c.want)
		}
	}
	mustClose(t, s)
}

// TestAChangeIsInTheNextCopy takes changes while they are written: each is in a copy made after its news.
func TestAChangeIsInTheNextCopy(t *testing.T) {
	ctx := t.Context()
	s, dir := paired(t)
	const count = 200
	done := make(chan error, 1)
	go func() {
		var err error
		for n := range count {
			err = errors.Join(err, s.Device.Identities.PutIdentity(ctx, fmt.Sprint("contact", n, ":0"), [32]byte{1}))
		}
		done <- err
	}()
	for copies := 0; ; copies++ {
		<-s.Changed()
		if take(t, s) == NoChange {
			continue
		}
		to := filepath.Join(dir, fmt.Sprint("copy", copies))
		if _, err := s.Snapshot(ctx, to); err != nil {
			t.Fatal(err)
		}
		held := ask[int](t, to, "SELECT count(*) FROM whatsmeow_identity_keys")
		if s.PendingChange() == NoChange && held < count {
			// Nothing was written since the news, or it is news itself.
			if now := countIdentities(t, s); s.PendingChange() == NoChange && now != held {
				t.Fatalf("%d of %d are in the copy, and nothing is pending", held, now)
			}
		}
		if held == count {
			break
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	if s.LastChange() != NoChange {
		t.Error("news of nothing")
	}
}

func countIdentities(t testing.TB, s *Store) (count int) {
	t.Helper()
	if err := s.raw.QueryRow("SELECT count(*) FROM whatsmeow_identity_keys").Scan(&count); err != nil {
		t.Fatal(err)
	}
	return count
}

func TestTheLastChangeIsKept(t *testing.T) {
	s, dir := paired(t)
	mustClose(t, s)
	if s.LastChange() != IdentityChange {
		t.Error("the pairing is forgotten")
	}
	s = mustOpen(t, dir, false)
	mustClose(t, s)
	if s.LastChange() != NoChange {
		t.Error("opening and closing is news")
	}
}

// BenchmarkRows writes rows with and without the hook, in one transaction, so that the disk has no say. A received message writes four.
func BenchmarkRows(b *testing.B) {
	for _, watched := range []bool{false, true} {
		b.Run(fmt.Sprint("watched=", watched), func(b *testing.B) {
			s, dir := paired(b)
			mustClose(b, s)
			hook := newChanges().hook
			if !watched {
				hook = nil
			}
			raw := openDatabase(filepath.Join(dir, fileName), "rw", hook)
			defer raw.Close()
			tx, err := raw.Begin()
			if err != nil {
				b.Fatal(err)
			}
			session := make([]byte, 1000)
			b.ResetTimer()
			for n := range b.N {
				if _, err := tx.Exec("INSERT OR REPLACE INTO whatsmeow_sessions VALUES ('15550001:1@s.whatsapp.net', ?, ?)", n%100, session); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			if err := tx.Commit(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
