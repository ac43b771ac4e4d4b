// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// runImporter runs `warren-engine import` and returns its status and what it printed.
func runImporter(t *testing.T, arguments ...string) (status int, report map[string]any, errs string) {
	t.Helper()
	command := exec.Command(filepath.Join(binaries, "warren-engine"), append([]string{"import"}, arguments...)...)
	var stderr strings.Builder
	command.Stderr = &stderr
	out, err := command.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if len(out) > 0 {
		if err := json.Unmarshal(out, &report); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	}
	return command.ProcessState.ExitCode(), report, stderr.String()
}

// TestImportedWhatsmeowStoreGoesOn takes over the store of another whatsmeow program, with its sessions.
func TestImportedWhatsmeowStoreGoesOn(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	sim.sendTo(t, other, own, "before", 1)
	d.event("acme", 2, "message")
	if sent := d.send("acme", 2, "3EB0BEFORE", jidOf(other), "answer"); !sent.OK {
		t.Fatal(sent.Error)
	}
	d.must("close", "acme", 2, nil)
	to := filepath.Join(t.TempDir(), "imported")
	status, report, errs := runImporter(t, "--format", "whatsmeow", "--from", filepath.Join(dir, "state.db"), "--to", to)
	if status != 0 || !strings.HasPrefix(report["jid"].(string), own) || report["carried"].(map[string]any)["sessions"] == nil {
		t.Fatalf("%d %v %s", status, report, errs)
	}
	if info, err := os.Stat(filepath.Join(to, "state.db")); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	d.online("moved", 1, to)
	sim.sendTo(t, other, own, "after", 1)
	d.wait("the message after", func(f frame) bool { return f.Session == "moved" && f.text("text") == "after" })
	if sent := d.send("moved", 1, "3EB0AFTER", jidOf(other), "answer after"); !sent.OK {
		t.Fatal(sent.Error)
	}
	eventually(t, "the phone shows it", func() bool { return len(sim.shown(t, other, own)) == 2 })
	if lost := d.all(func(f frame) bool { return f.Event == "undecryptable" }); len(lost) > 0 {
		t.Errorf("%v", lost)
	}
}

func TestImportStatuses(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		status    int
		says      string
		arguments []string
	}{
		{64, "are needed", nil},
		{64, "are needed", []string{"--format", "zip", "--from", dir, "--to", dir}},
		{64, "not defined", []string{"--nonsense"}},
		{65, "no multi-file auth directory", []string{"--format", "baileys", "--from", dir, "--to", filepath.Join(dir, "new"), "--dry-run"}},
		{73, "target", []string{"--format", "baileys", "--from", dir, "--to", "/dev/null/new"}},
		{0, "Usage", []string{"--help"}},
	} {
		status, report, errs := runImporter(t, c.arguments...)
		if status != c.status || report != nil || !strings.Contains(errs, c.says) {
			t.Errorf("%q: %d %v %s", c.arguments, status, report, errs)
		}
	}
}
