package sim_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"

	"warren/engine/internal/sim"
)

// TestSeedRepeats runs one story twice with a seed, and once with another.
func TestSeedRepeats(t *testing.T) {
	story := func(seed uint64) string {
		w := newWorldWith(t, sim.Config{Seed: &seed})
		w.phone(ana)
		w.phone(bob)
		c := w.open(t, filepath.Join(t.TempDir(), "client.db")).connect()
		ref := expect[*events.QR](c).Codes[0][:40]
		c.Disconnect()
		c = w.link(t, ana)
		//lint:ignore SA1019 there is no other way to ask, and the version is pinned
		bundles := c.DangerousInternals().FetchPreKeysNoError(t.Context(), []types.JID{types.NewJID(bob, types.DefaultUserServer)})
		keys := ""
		for _, b := range bundles {
			keys += fmt.Sprintf(" %d %x %x", b.RegistrationID(), b.IdentityKey().PublicKey().PublicKey(), b.PreKey().PublicKey())
		}
		if keys == "" {
			t.Fatal("no keys")
		}
		return fmt.Sprint(ref, c.Store.LID, w.send(bob, ana, "x", 3), keys)
	}
	first := story(7)
	if again := story(7); again != first {
		t.Fatalf("the same seed gave\n%s\nand\n%s", first, again)
	}
	if other := story(8); other == first {
		t.Fatal("another seed gave the same")
	}
}
