package sim_test

import (
	"testing"

	"go.mau.fi/whatsmeow/types/events"
)

// TestOfflineBurst has 5,000 messages and a receipt wait for a client that is away: more than whatsmeow's queue holds,
// so the order is its own affair (client.go: "Handler queue is full"), but nothing is lost or comes twice.
func TestOfflineBurst(t *testing.T) {
	const count = 5000
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c := w.link(t, ana)
	w.send(bob, ana, "opens the session", 1)
	c.message()
	until(t, "nothing pending", func() bool { return w.pending(ana) == 0 })
	c.Disconnect()
	until(t, "offline", func() bool { return !w.devices(ana)[0].Connected })
	order := map[string]int{}
	for i, id := range w.send(bob, ana, "burst", count) {
		order[id] = i
	}
	if got := w.pending(ana); got != count {
		t.Fatalf("%d pending", got)
	}
	c = c.again().connect()
	if preview := expect[*events.OfflineSyncPreview](c); preview.Total != count || preview.Messages != count {
		t.Fatalf("%+v", preview)
	}
	last, inversions := -1, 0
	for range count {
		m := c.message()
		position, known := order[m.Info.ID]
		if !known {
			t.Fatalf("%s came twice, or was never sent", m.Info.ID)
		}
		delete(order, m.Info.ID)
		if position < last {
			inversions++
		}
		last = position
	}
	t.Logf("%d inversions", inversions)
	if done := expect[*events.OfflineSyncCompleted](c); done.Count != count {
		t.Fatalf("%+v", done)
	}
	until(t, "nothing pending", func() bool { return w.pending(ana) == 0 })
	if again := expect[*events.OfflineSyncCompleted](c.again().connect()); again.Count != 0 {
		t.Fatalf("%+v", again)
	}
}
