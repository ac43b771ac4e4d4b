// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3"
)

func (d *daemon) snapshot(session string, generation int64, dir, to string) map[string]any {
	d.t.Helper()
	return d.must("snapshot", session, generation, map[string]any{"dir": dir, "to": to})
}

func TestSnapshotRequests(t *testing.T) {
	_, d, dir := pairedEngine(t)
	to := filepath.Join(dir, "copy")
	request := func(dir, to string) map[string]any { return map[string]any{"dir": dir, "to": to} }
	d.refused("bad_request", "snapshot", "acme", 2, request(dir, "copy"))
	d.refused("bad_request", "snapshot", "acme", 2, request(t.TempDir(), to))
	d.refused("not_open", "snapshot", "acme", 3, request(dir, to))
	d.refused("not_open", "snapshot", "nobody", 1, request(dir, to))
	d.refused("state_locked", "snapshot", "acme", 0, request(dir, to))
	d.refused("path_exists", "snapshot", "acme", 2, request(dir, filepath.Join(dir, "state.db")))
	open := d.snapshot("acme", 2, dir, to)
	info, err := os.Stat(to)
	if err != nil || float64(info.Size()) != open["bytes"] || info.Mode() != 0o600 || open["paired"] != true || !strings.HasPrefix(open["jid"].(string), own+":") ||
		!strings.HasSuffix(open["lid"].(string), "@lid") {
		t.Errorf("%v %v %v", open, info, err)
	}
	d.must("close", "acme", 2, nil)
	closed := d.snapshot("acme", 0, dir, filepath.Join(dir, "copy2"))
	if closed["jid"] != open["jid"] {
		t.Errorf("%v", closed)
	}
	d.refused("state_missing", "snapshot", "acme", 0, request(t.TempDir(), filepath.Join(dir, "copy3")))
	fresh := t.TempDir()
	d.open("new", 1, fresh, true)
	if unpaired := d.snapshot("new", 1, fresh, filepath.Join(fresh, "copy")); unpaired["paired"] != false || unpaired["jid"] != nil {
		t.Errorf("%v", unpaired)
	}
}

// changes are the "changed" events of a generation, so far, in order.
func (d *daemon) changes(session string, generation int64) (kinds []string) {
	for _, f := range d.all(func(f frame) bool { return f.Event == "changed" && f.Session == session && f.Generation == generation }) {
		kinds = append(kinds, f.text("kind"))
	}
	return kinds
}

// index is the place of the first frame that matches, or -1.
func (d *daemon) index(match func(frame) bool) int {
	return slices.IndexFunc(d.all(func(frame) bool { return true }), match)
}

func TestChangesAreTold(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	isChange := func(generation int64, kind string) func(frame) bool {
		return func(f frame) bool {
			return f.Event == "changed" && f.Generation == generation && f.text("kind") == kind
		}
	}
	ended := d.index(func(f frame) bool { return f.Event == "disconnected" })
	if first := d.index(isChange(1, "identity")); first < 0 || first > ended {
		t.Errorf("the pairing is told at %d, the end of its generation at %d", first, ended)
	}
	d.wait("news of the pre-keys", isChange(2, "identity"))
	// What comes is told at once the first time, and then only now and then; nothing is forgotten at the end.
	start := time.Now()
	sim.sendTo(t, other, own, "hello", 200)
	d.wait("the last message", func(f frame) bool { return f.Event == "message" && f.text("text") == "hello 200" })
	d.must("close", "acme", 2, nil)
	kinds := d.changes("acme", 2)
	if most := 6 + int(time.Since(start)/(500*time.Millisecond)); len(kinds) > most {
		t.Errorf("%d events: %v", len(kinds), kinds)
	}
	response := d.index(func(f frame) bool { return f.Re == d.nextID })
	last := 0
	for i, f := range d.all(func(frame) bool { return true }) {
		if f.Event == "changed" {
			last = i
		}
	}
	if first := d.index(messagesOf("acme")); last < first || last > response {
		t.Errorf("the last news is at %d, the first message at %d, the answer of close at %d", last, first, response)
	}
	// A login that changes nothing is no news.
	d.online("acme", 3, dir)
	d.must("close", "acme", 3, nil)
	if kinds := d.changes("acme", 3); len(kinds) > 0 {
		t.Errorf("news of a login: %v", kinds)
	}
}

// TestRestoreWithoutTheLatestPreKeys: contacts are given pre-keys that the copy does not know. They are asked to begin again, and what they said comes.
func TestRestoreWithoutTheLatestPreKeys(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	d.wait("news of the pre-keys", func(f frame) bool { return f.Event == "changed" && f.Generation == 2 })
	restored := t.TempDir()
	path := filepath.Join(restored, "state.db")
	d.must("close", "acme", 2, nil)
	d.snapshot("acme", 0, dir, path)
	raw, err := sql.Open("sqlite3", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Exec("DELETE FROM whatsmeow_pre_keys WHERE key_id < 700"); err != nil {
		t.Fatal(err)
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	d.online("acme", 3, restored)
	asked := func() int { return len(d.all(func(f frame) bool { return f.Event == "undecryptable" })) }
	for n := range 3 {
		number := fmt.Sprint("1555010", n)
		sim.phone(t, number)
		before := asked()
		for _, text := range []string{"first", "second"} {
			text += " of " + number
			sim.sendTo(t, number, own, text, 1)
			d.wait(text, func(f frame) bool { return f.Event == "message" && f.Generation == 3 && f.text("text") == text })
			// The first retry receipt carries no keys, so the phone may try another one that is not known; the second does.
			if times := asked() - before; times < 1 || times > 2 {
				t.Errorf("%s: %d times asked to begin again", text, times)
			}
		}
	}
}

// TestStaleRestore goes back to a copy of before 50 messages each way, and to a group. Nothing that is sent after it is lost; what phones send in sessions that
// the copy does not know comes after they were asked for it.
func TestStaleRestore(t *testing.T) {
	const later = 50
	sim, d, dir := pairedEngine(t)
	friends := sim.group(t, other, own)
	say := func(generation int64, what, to string) {
		t.Helper()
		if sent := d.send("acme", generation, "3EB0"+strings.ToUpper(strings.ReplaceAll(what, " ", "")), to, what); !sent.OK {
			t.Fatalf("%s: %v", what, sent.Error)
		}
	}
	hears := func(text string) {
		t.Helper()
		sim.sendTo(t, other, own, text, 1)
		d.wait(text, func(f frame) bool { return f.Event == "message" && f.text("text") == text })
	}
	say(2, "before", jidOf(other))
	say(2, "group before", friends)
	hears("answer before")
	restored := t.TempDir()
	d.snapshot("acme", 2, dir, filepath.Join(restored, "state.db"))
	expected := []string{"before", "group before"}
	for n := range later {
		text := fmt.Sprint("later ", n)
		say(2, text, jidOf(other))
		expected = append(expected, text)
		if n%10 == 0 {
			hears(fmt.Sprint("answer later ", n))
			text = fmt.Sprint("group later ", n)
			say(2, text, friends)
			expected = append(expected, text)
		}
	}
	d.must("close", "acme", 2, nil)
	// Something waits at WhatsApp, in the session that the copy does not know.
	sim.sendTo(t, other, own, "while away", 3)
	sim.sendTo(t, other, friends, "group while away", 3)
	d.online("acme", 3, restored)
	for n := range later {
		text := fmt.Sprint("restored ", n)
		say(3, text, jidOf(other))
		expected = append(expected, text)
	}
	say(3, "group restored", friends)
	expected = append(expected, "group restored")
	for n := range 3 {
		for _, text := range []string{"while away", "group while away"} {
			text = fmt.Sprint(text, " ", n+1)
			d.wait(text, func(f frame) bool { return f.Event == "message" && f.Generation == 3 && f.text("text") == text })
		}
	}
	for n := range 5 {
		hears(fmt.Sprint("answer restored ", n))
	}
	eventually(t, "the phone shows all", func() bool { return len(sim.shown(t, other, own)) == len(expected) })
	got := sim.shown(t, other, own)
	slices.Sort(got)
	slices.Sort(expected)
	if !slices.Equal(got, expected) {
		t.Errorf("the phone shows %q", got)
	}
	lost := sim.call(t, "GET", "/phones/"+other+"/received?from="+own, nil)["undecryptable"]
	if lost != 0.0 {
		t.Errorf("the phone could not read %v messages at first", lost)
	}
	asked := d.all(func(f frame) bool { return f.Event == "undecryptable" && f.Generation == 3 })
	t.Logf("undecryptable on the way: %v at the phone, %d at the restored session", lost, len(asked))
	// All is well for good.
	before := len(asked)
	for n := range 5 {
		hears(fmt.Sprint("healed ", n))
	}
	if asked := d.all(func(f frame) bool { return f.Event == "undecryptable" && f.Generation == 3 }); len(asked) != before {
		t.Errorf("still undecryptable: %v", asked)
	}
	eventually(t, "the receipts are at WhatsApp", func() bool { return sim.pending(t, own) == 0 })
}
