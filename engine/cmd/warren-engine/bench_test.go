// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"testing"
	"time"
)

// The figures of docs/adr/0001-sqlite-driver.md. The simulator shares the machine, so they are lower bounds.

func BenchmarkInbound(b *testing.B) {
	sim, d, _ := pairedEngine(b)
	sim.sendTo(b, other, own, "first", 1)
	d.event("acme", 2, "message")
	b.ResetTimer()
	sim.sendTo(b, other, own, "in", b.N)
	eventually(b, "all receipts", func() bool { return sim.pending(b, own) == 0 })
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}

func BenchmarkOutbound(b *testing.B) {
	_, d, _ := pairedEngine(b)
	d.send("acme", 2, "FIRST", jidOf(other), "first")
	b.ResetTimer()
	const inFlight = 32
	ids := make([]int64, 0, b.N)
	for n := range b.N {
		ids = append(ids, d.start("send", "acme", 2, map[string]any{
			"message_id": fmt.Sprintf("OUT%06d", n), "to": jidOf(other), "text": "out", "timeout_ms": 60000,
		}))
		if n >= inFlight {
			d.response(ids[n-inFlight])
		}
	}
	d.response(ids[len(ids)-1])
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}

// BenchmarkPairing is one pairing, from the scan to online: two connections, 812 pre-keys.
func BenchmarkPairing(b *testing.B) {
	sim := startSimulator(b)
	d := startEngine(b, sim)
	var scanned time.Duration
	for n := range b.N {
		number := fmt.Sprintf("1556%05d", n)
		sim.phone(b, number)
		start := time.Now()
		d.pair(sim, number, number)
		scanned += time.Since(start)
		d.must("close", number, 2, nil)
	}
	b.ReportMetric(float64(scanned.Milliseconds())/float64(b.N), "ms/pairing")
}

// BenchmarkOpenSessions reports the memory of one more session that waits for its QR code to be scanned.
func BenchmarkOpenSessions(b *testing.B) {
	sim := startSimulator(b)
	d := startEngine(b, sim, "--max-sessions", "1000")
	rss := func() float64 { return d.must("ping", "", 0, nil)["rss_bytes"].(float64) }
	const sessions = 200
	before := rss()
	for n := range sessions {
		d.open(fmt.Sprint("s", n), 1, b.TempDir(), true)
	}
	d.event(fmt.Sprint("s", sessions-1), 1, "qr")
	b.ReportMetric((rss()-before)/sessions/1024, "KiB/session")
	b.ReportMetric(before/1024/1024, "MiB/engine")
	d.must("stop", "", 0, nil)
}

// BenchmarkFleet opens 200 paired sessions at once, as after a restart, until the last is connected; then it has each receive a message.
func BenchmarkFleet(b *testing.B) {
	const sessions = 200
	sim := startSimulator(b)
	sim.phone(b, other)
	pairing := startEngine(b, sim)
	number := func(n int) string { return fmt.Sprintf("1557%05d", n) }
	dirs := make([]string, sessions)
	for n := range sessions {
		sim.phone(b, number(n))
		dirs[n] = pairing.pair(sim, number(n), number(n))
	}
	pairing.must("stop", "", 0, nil)
	for range b.N {
		d := startEngine(b, sim)
		rss := func() float64 { return d.must("ping", "", 0, nil)["rss_bytes"].(float64) / (1 << 20) }
		empty, start := rss(), time.Now()
		for n := range sessions {
			d.start("open", number(n), 3, map[string]any{"dir": dirs[n]})
		}
		for n := range sessions {
			d.event(number(n), 3, "connected")
		}
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms/all-connected")
		b.ReportMetric(rss(), "MiB/connected")
		b.ReportMetric((rss()-empty)*1024/sessions, "KiB/session")
		start = time.Now()
		for n := range sessions {
			sim.sendTo(b, other, number(n), "hello", 1)
		}
		for n := range sessions {
			d.event(number(n), 3, "message")
		}
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms/all-received")
		b.ReportMetric(rss(), "MiB/received")
		start = time.Now()
		d.must("stop", "", 0, nil)
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms/stop")
		_ = d.exit()
	}
}
