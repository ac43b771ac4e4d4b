// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"time"

	"go.mau.fi/whatsmeow"

	"warren/engine/internal/frames"
)

// whatsmeow asks WhatsApp for a sign of life at random intervals between these two, and waits so long for each. Its own are 20 and 30 s; with these a
// connection that is frozen is told of within 30 s, and again within 60 s (docs/engine-protocol.md has the sum).
const (
	pingIntervalMin = 15 * time.Second
	pingIntervalMax = 20 * time.Second
	pingDeadline    = 10 * time.Second
)

const (
	// silenceLimit is more than two intervals with their deadlines' answers: whatsmeow's pings do not report when a write of theirs is stuck.
	silenceLimit  = 45 * time.Second
	silenceChecks = 9 // in that time
	probeMaximum  = pingDeadline
)

// They are the whole process's, and read by each connection.
func init() {
	whatsmeow.KeepAliveIntervalMin, whatsmeow.KeepAliveIntervalMax = pingIntervalMin, pingIntervalMax
	whatsmeow.KeepAliveResponseDeadline = pingDeadline
}

// pulse is what the loop knows of the connection's life.
type pulse struct {
	failures    int
	lastSuccess time.Time
	silent      bool // the failure is silence alone
}

// pinged takes whatsmeow's word about a ping.
func (s *Session) pinged(failures int, lastSuccess time.Time) {
	s.pulse.failures, s.pulse.lastSuccess, s.pulse.silent = failures, lastSuccess, false
	s.emitKeepalive()
}

// checkSilence reports a connection from which nothing has come for longer than pings leave room for, and the end of that.
func (s *Session) checkSilence() {
	if !s.online.Load() {
		return
	}
	age := s.wire.age()
	switch {
	case age < s.cfg.Timing.Silence:
		if s.pulse.silent {
			s.pinged(0, time.Now().Add(-age))
		}
	case s.pulse.failures == 0:
		s.pulse.failures, s.pulse.lastSuccess, s.pulse.silent = 1, time.Now().Add(-age), true
		s.emitKeepalive()
	}
}

func (s *Session) emitKeepalive() {
	s.emit(s.ctx, "keepalive", keepaliveData{
		Failures: s.pulse.failures, LastSuccess: rfc3339(s.pulse.lastSuccess), LastFrameAge: s.wire.age().Truncate(time.Millisecond).Seconds(),
	})
}

// Probed is the result of a probe.
type Probed struct {
	RTT int64 `json:"rtt_ms"`
}

// Probe makes one round trip to WhatsApp; reply is called exactly once. It never waits. A write that is stuck does not hold up the answer.
func (s *Session) Probe(timeout time.Duration, reply func(any, *frames.Error)) {
	if !s.online.Load() {
		reply(nil, notOnline())
		return
	}
	if timeout <= 0 || timeout > probeMaximum {
		timeout = probeMaximum
	}
	answered := s.ping()
	go func() {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		select {
		case <-answered.done:
			if answered.ok {
				reply(Probed{RTT: answered.took.Milliseconds()}, nil)
				return
			}
			if answered.took < pingDeadline {
				reply(nil, notOnline()) // nothing was sent
				return
			}
		case <-timer.C:
		case <-s.ctx.Done():
		}
		if s.ctx.Err() != nil {
			reply(nil, notOnline())
			return
		}
		reply(nil, frames.Errorf(frames.CodeTimeout, "WhatsApp did not answer within %s", timeout))
	}()
}

// ping is one round trip; its fields are read once done is closed.
type ping struct {
	done chan struct{}
	ok   bool
	took time.Duration
}

// ping begins a round trip, or joins the one that is under way: a stuck socket gets no second writer.
func (s *Session) ping() *ping {
	s.probing.Lock()
	defer s.probing.Unlock()
	if s.probe != nil {
		return s.probe
	}
	p := &ping{done: make(chan struct{})}
	s.probe = p
	go s.guarded("probe", func() {
		start := time.Now()
		defer func() {
			s.probing.Lock()
			defer s.probing.Unlock()
			s.probe = nil
			close(p.done)
		}()
		// Not under the daemon's deadline: whatsmeow's socket loses its order when a write is cancelled.
		//lint:ignore SA1019 whatsmeow has no public ping
		p.ok, _ = s.cli.DangerousInternals().SendKeepAlive(s.ctx)
		p.took = time.Since(start)
	})
	return p
}
