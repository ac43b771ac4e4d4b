// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"strings"
	"testing"
)

// TestAMalformedFrameKillsOneProcess: whatsmeow does not survive the frame, and its process takes its sessions along; no other process, and no pairing.
func TestAMalformedFrameKillsOneProcess(t *testing.T) {
	sim, victim, dir := pairedEngine(t)
	sim.phone(t, third)
	neighbourDir := victim.pair(sim, "neighbour", other)
	bystander := startEngine(t, sim)
	bystander.pair(sim, "bystander", third)
	sim.call(t, "POST", "/phones/"+own+"/devices/1/malformed", map[string]any{})
	if status := victim.exit(); status == 0 {
		t.Errorf("exit status %d", status)
	}
	if log := victim.stderr.String(); !strings.Contains(log, "panic:") {
		t.Errorf("it died of something else:\n%s", log)
	}
	ids := sim.sendTo(t, third, own, "meanwhile", 3)
	if sent := bystander.send("bystander", 2, "STILLHERE", jidOf(own), "untouched"); !sent.OK {
		t.Errorf("%v", sent.Error)
	}
	again := startEngine(t, sim)
	again.online("acme", 3, dir)
	again.online("neighbour", 3, neighbourDir)
	// The one of the bystander came last.
	expectMessages(t, sim, again, "acme", 3, append(ids, "STILLHERE"))
	if seen := bystander.all(func(f frame) bool { return f.Session == "bystander" && f.Generation == 2 && f.Event == "disconnected" }); len(seen) != 0 {
		t.Errorf("%v", seen)
	}
	if sent := again.send("acme", 3, "BACK", jidOf(third), "back"); !sent.OK {
		t.Errorf("%v", sent.Error)
	}
	bystander.wait("the message", func(f frame) bool { return messagesOf("bystander")(f) && f.text("text") == "back" })
}

func TestMemoryLimit(t *testing.T) {
	sim := startSimulator(t)
	if limit := startEngine(t, sim).must("ping", "", 0, nil)["memory_limit_bytes"]; limit != nil {
		t.Errorf("%v", limit)
	}
	if limit := startEngine(t, sim, "--memory-limit-mb", "96").must("ping", "", 0, nil)["memory_limit_bytes"]; limit != float64(96<<20) {
		t.Errorf("%v", limit)
	}
}
