package sim_test

import (
	"fmt"
	"testing"
)

// The benchmarks count messages from a call of the control API (or of whatsmeow) until the receipt has settled them:
// whatsmeow's own work, with SQLite, is in the figure, on the same cores.

func BenchmarkPhoneToClient(b *testing.B) {
	benchmark(b, func(w *world, c *client, own, peer string, n int) {
		w.send(peer, own, "x", n)
		for range n {
			c.message()
		}
	})
}

func BenchmarkClientToPhone(b *testing.B) {
	benchmark(b, func(_ *world, c *client, _, peer string, n int) {
		for range n {
			c.say(peer, "x", "")
		}
	})
}

// BenchmarkPhoneToPhone is the simulator alone: one encryption and one decryption a message.
func BenchmarkPhoneToPhone(b *testing.B) {
	w := newWorld(b)
	w.phone(ana)
	w.phone(bob)
	w.send(ana, bob, "opens the session", 1)
	b.ResetTimer()
	w.send(ana, bob, "x", b.N)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "messages/s")
}

// benchmark runs b.N messages through each number of clients, each with a phone of another account.
func benchmark(b *testing.B, run func(w *world, c *client, own, peer string, n int)) {
	for _, clients := range []int{1, 8} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			w := newWorld(b)
			own := func(i int) string { return fmt.Sprintf("1555%04d", 1000+i) }
			peer := func(i int) string { return fmt.Sprintf("1555%04d", 2000+i) }
			linked := make([]*client, clients)
			for i := range linked {
				w.phone(own(i))
				w.phone(peer(i))
				linked[i] = w.link(b, own(i))
				run(w, linked[i], own(i), peer(i), 1)
			}
			share := (b.N + clients - 1) / clients
			b.ResetTimer()
			each(b, clients, clients, func(i int) {
				run(w, linked[i], own(i), peer(i), share)
				until(b, "nothing pending", func() bool { return w.pending(own(i)) == 0 })
			})
			b.ReportMetric(float64(share*clients)/b.Elapsed().Seconds(), "messages/s")
		})
	}
}
