// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"slices"
	"testing"
)

// TestRecipientWithoutKeys: whatsmeow calls it a success when only our own phone got a copy.
func TestRecipientWithoutKeys(t *testing.T) {
	sim, d, _ := pairedEngine(t)
	sim.call(t, "POST", "/faults", map[string]any{"kind": "iq_error", "xmlns": "encrypt", "code": 503})
	request := map[string]any{"message_id": "3EB0KEYLESS", "to": jidOf(other), "text": "hello", "timeout_ms": 5000}
	d.refused("recipient_unreachable", "send", "acme", 2, request)
	if sent := d.send("acme", 2, "3EB0KEYLESS", jidOf(other), "hello"); !sent.OK {
		t.Fatalf("the same message again: %v", sent.Error)
	}
	eventually(t, "the phone shows it", func() bool { return slices.Equal(sim.shown(t, other, own), []string{"hello"}) })
}

func TestRefusedSends(t *testing.T) {
	sim, d, _ := pairedEngine(t)
	for code, want := range map[int]string{463: "restricted", 429: "rate_limited", 479: "rejected"} {
		sim.call(t, "POST", "/faults", map[string]any{"kind": "send_error", "code": code})
		sent := d.send("acme", 2, fmt.Sprint("3EB0", code), jidOf(other), "hello")
		if sent.OK || sent.Error["code"] != want || sent.Error["server_code"] != float64(code) {
			t.Errorf("%d: %v", code, sent.Error)
		}
	}
}

func TestRefusedLogins(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	d.must("close", "acme", 2, nil)
	generation := int64(3)
	for _, c := range []struct {
		code   int
		reason string
	}{{402, "temporary_ban"}, {405, "client_outdated"}, {409, "failure"}, {503, "server"}} {
		sim.call(t, "POST", "/faults", map[string]any{"kind": "login_failure", "code": c.code})
		d.open("acme", generation, dir, false)
		if end := d.event("acme", generation, "disconnected"); end.text("reason") != c.reason || end.Data["code"] != float64(c.code) {
			t.Errorf("%d: %v", c.code, end.Data)
		}
		generation++
	}
	sim.call(t, "POST", "/faults", map[string]any{"kind": "login_failure", "code": 403})
	d.open("acme", generation, dir, false)
	if out := d.event("acme", generation, "logged_out"); out.Data["code"] != 403.0 || out.Data["on_connect"] != true {
		t.Errorf("%v", out.Data)
	}
	if result := d.open("acme", generation+1, dir, false); result["paired"] != false {
		t.Errorf("the device row is left: %v", result)
	}
}
