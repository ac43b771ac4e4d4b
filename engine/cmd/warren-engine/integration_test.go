// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

const (
	own   = "15550001"
	other = "15550002"
)

func jidOf(number string) string { return number + "@s.whatsapp.net" }

// pairedEngine is an engine with one session "acme", online in generation 2 on the phone own; other is a second phone.
func pairedEngine(t testing.TB) (*simulator, *daemon, string) {
	t.Helper()
	sim := startSimulator(t)
	sim.phone(t, own)
	sim.phone(t, other)
	d := startEngine(t, sim)
	return sim, d, d.pair(sim, "acme", own)
}

func TestPairSendReceiveClose(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	connected := d.event("acme", 2, "connected")
	if !strings.HasPrefix(connected.text("jid"), own) || connected.text("lid") == "" {
		t.Errorf("connected: %v", connected.Data)
	}
	sent := d.send("acme", 2, "3EB0AAAABBBBCCCCDDDD01", jidOf(other), "hello")
	if !sent.OK || sent.Result["message_id"] != "3EB0AAAABBBBCCCCDDDD01" || sent.Result["timestamp"] == "" {
		t.Fatalf("send: %+v", sent)
	}
	eventually(t, "the phone shows it", func() bool { return slices.Equal(sim.shown(t, other, own), []string{"hello"}) })
	receipt := d.event("acme", 2, "receipt")
	if receipt.text("type") != "delivered" {
		t.Errorf("receipt: %v", receipt.Data)
	}
	sim.sendTo(t, other, own, "hi <&> é", 1)
	message := d.event("acme", 2, "message")
	for key, want := range map[string]any{"kind": "text", "text": "hi <&> é", "from_me": false, "group": false, "push_name": "Phone " + other} {
		if message.Data[key] != want {
			t.Errorf("%s is %v, not %v", key, message.Data[key], want)
		}
	}
	if addresses := message.text("chat") + message.text("chat_alt"); !strings.Contains(addresses, other) || !strings.Contains(addresses, "@lid") {
		t.Errorf("addresses: %v", message.Data)
	}
	eventually(t, "the receipt is at WhatsApp", func() bool { return sim.pending(t, own) == 0 })
	ping := d.must("ping", "", 0, nil)
	if ping["sessions"] != 1.0 || ping["rss_bytes"].(float64) < 1e6 || ping["heap_bytes"].(float64) < 1e5 {
		t.Errorf("ping: %v", ping)
	}
	d.must("close", "acme", 2, nil)
	d.refused("not_open", "close", "acme", 2, nil)
	d.refused("not_open", "send", "acme", 2, map[string]any{"to": jidOf(other), "text": "x", "message_id": "A"})
	for _, name := range []string{"state.db-wal", "state.db-shm", "state.db.new"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s is left", name)
		}
	}
	info, err := os.Stat(filepath.Join(dir, "state.db"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("state.db: %v %v", info.Mode(), err)
	}
	d.must("stop", "", 0, nil)
	if status := d.exit(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

func TestRefusedEventComesBackAtTheNextOpen(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	d.setPolicy(no)
	ids := sim.sendTo(t, other, own, "m", 3)
	end := d.event("acme", 2, "disconnected")
	if end.text("reason") != "handler_timeout" {
		t.Fatalf("%v", end.Data)
	}
	if seen := d.all(messagesOf("acme")); len(seen) != 1 {
		t.Fatalf("%d messages were handed over after the first was refused", len(seen)-1)
	}
	d.setPolicy(yes)
	d.online("acme", 3, dir)
	expectMessages(t, sim, d, "acme", 3, ids)
}

// expectMessages waits until exactly these messages have come in this generation, in order, and WhatsApp has every receipt.
func expectMessages(t *testing.T, sim *simulator, d *daemon, session string, generation int64, ids []string) {
	t.Helper()
	match := func(f frame) bool { return messagesOf(session)(f) && f.Generation == generation }
	eventually(t, "all messages", func() bool { return len(d.all(match)) >= len(ids) })
	eventually(t, "all receipts", func() bool { return sim.pending(t, own) == 0 })
	got := d.all(match)
	for i, f := range got {
		if i >= len(ids) || f.text("message_id") != ids[i] {
			t.Fatalf("message %d is %s; %d came, %d wanted", i, f.text("message_id"), len(got), len(ids))
		}
	}
}

func TestKilledBeforeTheAnswer(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	d.setPolicy(silent)
	ids := sim.sendTo(t, other, own, "precious", 1)
	first := d.event("acme", 2, "message")
	d.kill()
	again := startEngine(t, sim)
	again.online("acme", 3, dir)
	expectMessages(t, sim, again, "acme", 3, ids)
	second := again.event("acme", 3, "message")
	if first.text("message_id") != second.text("message_id") || second.text("text") != "precious" {
		t.Fatalf("%v and then %v", first.Data, second.Data)
	}
}

func TestKilledWhilePairing(t *testing.T) {
	sim := startSimulator(t)
	sim.phone(t, own)
	d := startEngine(t, sim)
	dir := t.TempDir()
	d.open("acme", 1, dir, true)
	d.event("acme", 1, "qr")
	d.kill()
	again := startEngine(t, sim)
	if result := again.open("acme", 2, dir, false); result["paired"] != false {
		t.Fatalf("%v", result)
	}
	qr := again.event("acme", 2, "qr")
	sim.call(t, "POST", "/phones/"+own+"/scan", map[string]any{"qr": qr.text("code")})
	paired := again.event("acme", 2, "paired")
	if !strings.HasPrefix(paired.text("jid"), own) || paired.text("lid") == "" {
		t.Errorf("%v", paired.Data)
	}
	// The device row is on disk when the event comes.
	again.kill()
	last := startEngine(t, sim)
	if result := last.open("acme", 3, dir, false); result["paired"] != true || result["jid"] != paired.text("jid") {
		t.Fatalf("%v", result)
	}
	last.event("acme", 3, "connected")
}

func TestPairingByCode(t *testing.T) {
	sim := startSimulator(t)
	sim.phone(t, own)
	d := startEngine(t, sim)
	dir := t.TempDir()
	open := map[string]any{"dir": dir, "create": true, "device_name": "warren test", "phone_number": own}
	for _, number := range []string{"+15550001", "0155500001", "123", "12345678x", "1234567890123456"} {
		d.refused("bad_request", "open", "acme", 1, map[string]any{"dir": dir, "create": true, "phone_number": number})
	}
	d.must("open", "acme", 1, open)
	shown := d.event("acme", 1, "pairing_code")
	if ttl := shown.Data["ttl_ms"].(float64); len(shown.text("code")) != 9 || ttl < 100_000 || ttl > 160_000 {
		t.Errorf("%v", shown.Data)
	}
	sim.call(t, "POST", "/phones/"+own+"/pair-code", map[string]any{"code": shown.text("code")})
	if end := d.event("acme", 1, "disconnected"); end.text("reason") != "restart_required" {
		t.Fatalf("%v", end.Data)
	}
	if paired := d.event("acme", 1, "paired"); !strings.HasPrefix(paired.text("jid"), own) {
		t.Errorf("%v", paired.Data)
	}
	// The number no longer matters.
	open["phone_number"] = other
	d.must("open", "acme", 2, open)
	d.event("acme", 2, "connected")
	if seen := d.all(func(f frame) bool { return f.Event == "qr" }); len(seen) != 0 {
		t.Errorf("%v", seen)
	}
}

func TestNoPairingCode(t *testing.T) {
	sim := startSimulator(t)
	sim.phone(t, own)
	d := startEngine(t, sim)
	sim.call(t, "POST", "/faults", map[string]any{"kind": "iq_error", "xmlns": "md", "code": 429})
	open := map[string]any{"dir": t.TempDir(), "create": true, "phone_number": own}
	d.must("open", "acme", 1, open)
	if end := d.event("acme", 1, "disconnected"); end.text("reason") != "pairing_failed" || end.Data["code"] != 429.0 {
		t.Fatalf("%v", end.Data)
	}
	d.must("open", "acme", 2, open)
	d.event("acme", 2, "pairing_code")
}

func TestCloseInTheMiddleLosesAndRepeatsNothing(t *testing.T) {
	const total = 120
	sim, d, dir := pairedEngine(t)
	var texts []string
	generation := int64(2)
	var ids []string
	var wait sync.WaitGroup
	wait.Add(1)
	go func() {
		defer wait.Done()
		for i := range 6 {
			ids = append(ids, sim.sendTo(t, other, own, fmt.Sprintf("batch %d", i), total/6)...)
		}
	}()
	for round := range 6 {
		eventually(t, "some messages", func() bool { return len(d.all(messagesOf("acme"))) > round*10 })
		d.must("close", "acme", generation, nil)
		generation++
		d.online("acme", generation, dir)
	}
	wait.Wait()
	eventually(t, "all receipts", func() bool { return sim.pending(t, own) == 0 })
	seen := map[string]int{}
	for _, f := range d.all(messagesOf("acme")) {
		seen[f.text("message_id")]++
		texts = append(texts, f.text("text"))
	}
	if len(texts) != total {
		t.Errorf("%d messages came, %d were sent", len(texts), total)
	}
	for _, id := range ids {
		if seen[id] != 1 {
			t.Errorf("%s came %d times", id, seen[id])
		}
	}
}

// TestCloseOvertakesOpen: a daemon that gives an open up must be able to take it back.
func TestCloseOvertakesOpen(t *testing.T) {
	_, d, dir := pairedEngine(t)
	d.must("close", "acme", 2, nil)
	for generation := int64(3); generation < 13; generation++ {
		opening := d.start("open", "acme", generation, map[string]any{"dir": dir, "device_name": "warren test"})
		closing := d.start("close", "acme", generation, nil)
		if response := d.response(closing); !response.OK {
			t.Fatalf("close: %v", response.Error)
		}
		if response := d.response(opening); !response.OK {
			t.Fatalf("open: %v", response.Error)
		}
	}
	d.refused("not_open", "close", "acme", 12, nil)
	missing := d.start("open", "other", 1, map[string]any{"dir": t.TempDir(), "device_name": "warren test"})
	d.refused("not_open", "close", "other", 1, nil)
	if response := d.response(missing); response.Error["code"] != "state_missing" {
		t.Errorf("%v", response)
	}
	d.online("acme", 13, dir)
}

func TestLogout(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	d.must("logout", "acme", 2, nil)
	if devices := sim.call(t, "GET", "/phones/"+own+"/pending", nil)["devices"].([]any); len(devices) != 0 {
		t.Errorf("the phone still lists %v", devices)
	}
	for _, f := range d.all(func(f frame) bool {
		return f.Session == "acme" && (f.Event == "logged_out" || f.Generation == 2 && f.Event == "disconnected")
	}) {
		t.Errorf("an event after logout: %v", f)
	}
	if result := d.open("acme", 3, dir, false); result["paired"] != false {
		t.Errorf("the device row is left: %v", result)
	}
}

func TestUnlinkedOnThePhone(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	sim.call(t, "POST", "/phones/"+own+"/devices/1/unlink", nil)
	out := d.event("acme", 2, "logged_out")
	if out.Data["code"] != 401.0 || out.Data["on_connect"] != false {
		t.Errorf("%v", out.Data)
	}
	if result := d.open("acme", 3, dir, false); result["paired"] != false {
		t.Errorf("the device row is left: %v", result)
	}
}

func TestDroppedConnection(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	sim.call(t, "POST", "/phones/"+own+"/devices/1/drop", nil)
	if end := d.event("acme", 2, "disconnected"); end.text("reason") != "network" {
		t.Errorf("%v", end.Data)
	}
	ids := sim.sendTo(t, other, own, "while away", 2)
	d.online("acme", 3, dir)
	expectMessages(t, sim, d, "acme", 3, ids)
	if !d.event("acme", 3, "message").Data["offline"].(bool) {
		t.Error("a message from the offline queue is not marked")
	}
}

func TestReplacedByASecondLogin(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	copied := t.TempDir()
	d.must("close", "acme", 2, nil)
	content, err := os.ReadFile(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(copied, "state.db"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	d.online("acme", 3, dir)
	second := startEngine(t, sim)
	second.online("acme", 1, copied)
	if end := d.event("acme", 3, "disconnected"); end.text("reason") != "replaced" {
		t.Errorf("%v", end.Data)
	}
}

func TestSendErrors(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	for to, code := range map[string]string{
		"15550002": "invalid_recipient", "x@s.whatsapp.net": "invalid_recipient", "1:2@lid": "invalid_recipient", "@g.us": "invalid_recipient",
		"status@broadcast": "invalid_recipient", "19998887777@s.whatsapp.net": "recipient_not_found",
	} {
		d.refused(code, "send", "acme", 2, map[string]any{"message_id": "A1", "to": to, "text": "x", "timeout_ms": 5000})
	}
	d.refused("bad_request", "send", "acme", 2, map[string]any{"message_id": "", "to": jidOf(other), "text": "x"})
	d.refused("bad_request", "dance", "acme", 2, nil)
	// The same id twice reaches the phone twice and is one message.
	for range 2 {
		if sent := d.send("acme", 2, "3EB0SAME", jidOf(other), "once"); !sent.OK {
			t.Fatalf("%v", sent.Error)
		}
	}
	eventually(t, "both stanzas are at the phone", func() bool {
		received := sim.call(t, "GET", "/phones/"+other+"/received?from="+own, nil)
		return received["stanzas"] == 2.0 && received["undecryptable"] == 0.0
	})
	if shown := sim.shown(t, other, own); !slices.Equal(shown, []string{"once"}) {
		t.Errorf("shown: %v", shown)
	}
	d.must("close", "acme", 2, nil)
	d.open("acme", 3, dir, false)
	if response := d.send("acme", 3, "A2", jidOf(other), "early"); !response.OK && response.Error["code"] != "not_connected" {
		t.Errorf("%v", response.Error)
	}
}

func TestOpenErrors(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	open := func(dir string, create bool) map[string]any {
		return map[string]any{"dir": dir, "create": create, "device_name": "x"}
	}
	d.refused("already_open", "open", "acme", 3, open(dir, false))
	d.refused("state_locked", "open", "twin", 1, open(dir, false))
	d.refused("state_missing", "open", "new", 1, open(t.TempDir(), false))
	d.refused("bad_request", "open", "new", 1, open("relative", true))
	damaged := t.TempDir()
	if err := os.WriteFile(filepath.Join(damaged, "state.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d.refused("state_unreadable", "open", "new", 1, open(damaged, true))
	// A close and an open right behind it: the open waits.
	closing := d.start("close", "acme", 2, nil)
	opening := d.start("open", "acme", 3, open(dir, false))
	if response := d.response(closing); !response.OK {
		t.Errorf("%v", response.Error)
	}
	if response := d.response(opening); !response.OK {
		t.Errorf("%v", response.Error)
	}
	d.event("acme", 3, "connected")
	small := startEngine(t, sim, "--max-sessions", "1")
	small.open("one", 1, t.TempDir(), true)
	small.refused("too_many_sessions", "open", "two", 1, open(t.TempDir(), true))
}

func TestVersion(t *testing.T) {
	out, err := exec.Command(filepath.Join(binaries, "warren-engine"), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	var told struct {
		Engine, Whatsmeow string
		Protocol          int
	}
	if err := json.Unmarshal(out, &told); err != nil || told.Engine == "" || !strings.HasPrefix(told.Whatsmeow, "v") || told.Protocol != 1 {
		t.Errorf("%s %v", out, err)
	}
}

func TestEndOfThePipe(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	d.setPolicy(silent)
	ids := sim.sendTo(t, other, own, "kept", 1)
	d.event("acme", 2, "message")
	_ = d.conn.Close()
	if status := d.exit(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	again := startEngine(t, sim)
	again.online("acme", 3, dir)
	expectMessages(t, sim, again, "acme", 3, ids)
}

func TestSignals(t *testing.T) {
	_, d, _ := pairedEngine(t)
	if err := d.command.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	d.must("ping", "", 0, nil)
	if err := d.command.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if status := d.exit(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

func TestBrokenFrames(t *testing.T) {
	sim := startSimulator(t)
	for name, line := range map[string]string{"too long": strings.Repeat("x", 1<<20) + "\n", "no JSON": "hello\n"} {
		d := startEngine(t, sim)
		_, _ = d.conn.Write([]byte(line))
		if status := d.exit(); status != 2 {
			t.Errorf("%s: exit status %d", name, status)
		}
	}
}

func TestTwentySessions(t *testing.T) {
	const sessions, each = 20, 50
	sim := startSimulator(t)
	d := startEngine(t, sim)
	number := func(i int) string { return fmt.Sprintf("1555%04d", 1000+i) }
	name := func(i int) string { return fmt.Sprintf("s%02d", i) }
	for i := range sessions {
		sim.phone(t, number(i))
		sim.phone(t, number(i)+"9")
	}
	var pairing sync.WaitGroup
	for i := range sessions {
		pairing.Add(1)
		go func() {
			defer pairing.Done()
			d.pair(sim, name(i), number(i))
		}()
	}
	pairing.Wait()
	var traffic sync.WaitGroup
	for i := range sessions {
		traffic.Add(2)
		go func() {
			defer traffic.Done()
			sim.sendTo(t, number(i)+"9", number(i), "in", each)
		}()
		go func() {
			defer traffic.Done()
			for n := range each {
				if sent := d.send(name(i), 2, fmt.Sprintf("OUT%02d%04d", i, n), jidOf(number(i)+"9"), fmt.Sprint("out ", n)); !sent.OK {
					t.Errorf("%s: %v", name(i), sent.Error)
				}
			}
		}()
	}
	traffic.Wait()
	for i := range sessions {
		eventually(t, "the inbound messages of "+name(i), func() bool { return len(d.all(messagesOf(name(i)))) == each })
		eventually(t, "the receipts of "+name(i), func() bool { return sim.pending(t, number(i)) == 0 })
		eventually(t, "the outbound messages of "+name(i), func() bool { return len(sim.shown(t, number(i)+"9", number(i))) == each })
		for n, f := range d.all(messagesOf(name(i))) {
			if f.text("text") != fmt.Sprint("in ", n+1) {
				t.Errorf("%s: message %d is %q", name(i), n, f.text("text"))
			}
		}
	}
	t.Logf("ping: %v", d.must("ping", "", 0, nil))
	d.must("stop", "", 0, nil)
	if status := d.exit(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

func TestWrongCommandLines(t *testing.T) {
	for _, arguments := range [][]string{{"--root-key", "ab"}, {"--endpoint", "wss://192.0.2.1:1"}, {"surplus"}, {"--max-sessions", "0"}, {"--memory-limit-mb", "-1"}, {"--dance"}, {"--wa-version", "new"}, {}} {
		command := exec.Command(filepath.Join(binaries, "warren-engine"), arguments...) // without a descriptor 3
		out, _ := command.CombinedOutput()
		if status := command.ProcessState.ExitCode(); status != exitUsage || len(out) == 0 {
			t.Errorf("%v: exit status %d, %q", arguments, status, out)
		}
	}
}
