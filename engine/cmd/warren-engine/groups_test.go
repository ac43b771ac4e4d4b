// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

const third = "15550003"

func (s *simulator) group(t testing.TB, creator string, others ...string) string {
	t.Helper()
	return s.call(t, "POST", "/groups", map[string]any{"creator": creator, "participants": others, "subject": "Friends"})["id"].(string)
}

func TestGroups(t *testing.T) {
	const each = 20
	sim, d, _ := pairedEngine(t)
	sim.phone(t, third)
	group := sim.group(t, third, own, other)
	var sent []string
	for n := range each {
		sent = append(sent, fmt.Sprint("out ", n))
		if response := d.send("acme", 2, fmt.Sprintf("GROUP%04d", n), group, sent[n]); !response.OK || response.Result["timestamp"] == "" {
			t.Fatalf("%v", response.Error)
		}
	}
	for _, number := range []string{other, third} {
		eventually(t, "everything on "+number, func() bool { return slices.Equal(sim.shown(t, number, own), sent) })
	}
	for _, number := range []string{other, third} {
		d.wait("the receipt of "+number, func(f frame) bool {
			return f.Event == "receipt" && f.text("chat") == group && f.text("type") == "delivered" && strings.HasPrefix(f.text("sender_alt")+f.text("sender"), number)
		})
	}
	ids := sim.sendTo(t, other, group, "in", each)
	expectMessages(t, sim, d, "acme", 2, ids)
	for i, f := range d.all(messagesOf("acme")) {
		sender := f.text("sender") + " " + f.text("sender_alt")
		if f.text("chat") != group || f.Data["group"] != true || f.Data["from_me"] != false || f.text("text") != fmt.Sprint("in ", i+1) {
			t.Errorf("%v", f.Data)
		}
		if !strings.Contains(sender, other+"@s.whatsapp.net") || !strings.Contains(sender, "@lid") || f.Data["chat_alt"] != nil {
			t.Errorf("addresses: %v", f.Data)
		}
	}
	// What the phone's owner writes there is told too.
	copied := sim.sendTo(t, own, group, "myself", 1)[0]
	f := d.wait("the owner's message", func(f frame) bool { return messagesOf("acme")(f) && f.text("message_id") == copied })
	if f.Data["from_me"] != true || f.text("chat") != group {
		t.Errorf("%v", f.Data)
	}
	if seen := d.all(func(f frame) bool { return f.Event == "undecryptable" }); len(seen) != 0 {
		t.Errorf("%v", seen)
	}
}

func TestGroupMessageAfterAKill(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	sim.phone(t, third)
	group := sim.group(t, third, own, other)
	d.setPolicy(silent)
	ids := sim.sendTo(t, other, group, "precious", 3)
	d.event("acme", 2, "message")
	d.kill()
	again := startEngine(t, sim)
	again.online("acme", 3, dir)
	expectMessages(t, sim, again, "acme", 3, ids)
}

func TestGroupSendErrors(t *testing.T) {
	sim, d, _ := pairedEngine(t)
	sim.phone(t, third)
	send := func(to, id string) map[string]any {
		return map[string]any{"message_id": id, "to": to, "text": "hello", "timeout_ms": 10000}
	}
	d.refused("recipient_not_found", "send", "acme", 2, send("120363000000000000@g.us", "A1"))
	strangers := sim.group(t, third, other)
	refused := d.request("send", "acme", 2, send(strangers, "A2"))
	if refused.OK || refused.Error["code"] != "rejected" || refused.Error["server_code"] != 403.0 || !strings.Contains(refused.Error["message"].(string), "not in this group") {
		t.Errorf("%v", refused.Error)
	}
	group := sim.group(t, own, other, third)
	keyless := func(whom map[string]any) {
		whom["kind"], whom["empty"], whom["seconds"] = "prekeys", true, 600
		sim.call(t, "POST", "/faults", whom)
	}
	// Nobody could read it.
	keyless(map[string]any{"phone": own})
	d.refused("recipient_unreachable", "send", "acme", 2, send(group, "A3"))
	// One member has keys again: the message is sent, and the other asks for it.
	sim.call(t, "DELETE", "/faults", nil)
	keyless(map[string]any{"of": third})
	d.must("send", "acme", 2, send(group, "A4"))
	eventually(t, "the message", func() bool { return slices.Contains(sim.shown(t, other, own), "hello") })
	sim.call(t, "DELETE", "/faults", nil)
	d.must("send", "acme", 2, send(group, "A5"))
	eventually(t, "the message", func() bool { return len(sim.shown(t, third, own)) >= 1 })
}
