// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"testing"
	"time"

	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types/events"

	"warren/engine/internal/frames"
)

// TestAFrozenConnectionIsToldInTime is the sum of docs/engine-protocol.md: two pings, each asked for and waited for as long as can be, or silence and its check.
func TestAFrozenConnectionIsToldInTime(t *testing.T) {
	if whatsmeow.KeepAliveIntervalMin >= whatsmeow.KeepAliveIntervalMax {
		t.Fatal("whatsmeow wants an interval between two bounds")
	}
	each := whatsmeow.KeepAliveIntervalMax + whatsmeow.KeepAliveResponseDeadline
	if each > 30*time.Second {
		t.Errorf("first told after %s", each)
	}
	silence := DefaultTiming().Silence
	if silence <= each || silence+silence/silenceChecks > 50*time.Second {
		t.Errorf("silence is told after %s", silence)
	}
}

func TestSilenceIsToldOnceAndItsEnd(t *testing.T) {
	timing := quick()
	timing.Silence = 50 * time.Millisecond
	s, out := newSession(t, timing)
	s.online.Store(true)
	s.wire.Received(&waBinary.Node{Tag: "iq"})
	ended := make(chan struct{})
	go func() { defer close(ended); s.loop() }()
	defer func() { s.finish(&ending{}); <-ended }()
	keepalives := func(count int) keepaliveData {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); len(out.named("keepalive")) < count; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d keepalive events", len(out.named("keepalive")))
			}
		}
		return out.named("keepalive")[count-1].Data.(keepaliveData)
	}
	if told := keepalives(1); told.Failures != 1 || told.LastFrameAge < 0.05 || told.LastSuccess == "" {
		t.Errorf("%+v", told)
	}
	stop := make(chan struct{})
	go func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				s.wire.Received(&waBinary.Node{Tag: "iq"})
			}
		}
	}()
	if told := keepalives(2); told.Failures != 0 {
		t.Errorf("%+v", told)
	}
	close(stop)
	if told := keepalives(3); told.Failures != 1 {
		t.Errorf("%+v", told)
	}
	// whatsmeow's own count goes on from there.
	s.post(&events.KeepAliveTimeout{ErrorCount: 2, LastSuccess: time.Now()})
	if told := keepalives(4); told.Failures != 2 {
		t.Errorf("%+v", told)
	}
}

func TestProbeIsNotHeldUpByAStuckWrite(t *testing.T) {
	s, _ := newSession(t, quick())
	answers := make(chan string, 2)
	reply := func(_ any, err *frames.Error) { answers <- err.Code }
	s.Probe(time.Second, reply)
	if code := <-answers; code != frames.CodeNotConnected {
		t.Errorf("before the login: %s", code)
	}
	s.online.Store(true)
	s.probe = &ping{done: make(chan struct{})} // which never ends
	s.Probe(10*time.Millisecond, reply)
	if code := <-answers; code != frames.CodeTimeout {
		t.Error(code)
	}
	s.cancel()
	s.Probe(time.Minute, reply)
	if code := <-answers; code != frames.CodeNotConnected {
		t.Errorf("while the session ends: %s", code)
	}
}
