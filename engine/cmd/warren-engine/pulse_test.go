// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"testing"
	"time"
)

func TestProbe(t *testing.T) {
	sim, d, _ := pairedEngine(t)
	d.refused("not_open", "probe", "acme", 1, nil)
	if rtt, ok := d.must("probe", "acme", 2, map[string]any{"timeout_ms": 5000})["rtt_ms"].(float64); !ok || rtt < 0 || rtt > 5000 {
		t.Errorf("rtt %v", rtt)
	}
	sim.call(t, "POST", "/faults", map[string]any{"kind": "freeze"})
	start := time.Now()
	first := d.start("probe", "acme", 2, map[string]any{"timeout_ms": 300})
	second := d.start("probe", "acme", 2, map[string]any{"timeout_ms": 200})
	for _, id := range []int64{first, second} {
		if response := d.response(id); response.OK || response.Error["code"] != "timeout" {
			t.Errorf("%v %v", response.Result, response.Error)
		}
	}
	if took := time.Since(start); took < 200*time.Millisecond {
		t.Errorf("after %s", took)
	}
	fresh := t.TempDir()
	d.open("new", 1, fresh, true)
	d.refused("not_connected", "probe", "new", 1, nil)
	d.must("close", "acme", 2, nil)
}

func TestTimelock(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	sim.call(t, "POST", "/phones/"+own+"/timelock", map[string]any{"active": true, "seconds": 3600, "type": "BIZ_QUALITY"})
	told := d.event("acme", 2, "timelock")
	until, err := time.Parse(time.RFC3339, told.text("until"))
	if err != nil || time.Until(until) < 50*time.Minute || time.Until(until) > time.Hour || told.Data["active"] != true || told.text("type") != "BIZ_QUALITY" {
		t.Errorf("%v %v", told.Data, err)
	}
	d.must("close", "acme", 2, nil)
	// It waits for a session that is away, and is told once.
	sim.call(t, "POST", "/phones/"+own+"/timelock", map[string]any{"active": false})
	d.online("acme", 3, dir)
	if told := d.event("acme", 3, "timelock"); told.Data["active"] != false || told.Data["until"] != nil {
		t.Errorf("%v", told.Data)
	}
	eventually(t, "it is acked", func() bool { return sim.pending(t, own) == 0 })
}
