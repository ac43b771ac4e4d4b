// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"time"

	"go.mau.fi/whatsmeow/types/events"

	"warren/engine/internal/logs"
)

type qrData struct {
	Code      string `json:"code"`
	TTLMS     int64  `json:"ttl_ms"`
	Remaining int    `json:"remaining"`
}

type pairedData struct {
	JID          string `json:"jid"`
	LID          string `json:"lid"`
	Platform     string `json:"platform"`
	BusinessName string `json:"business_name"`
}

type connectedData struct {
	JID      string `json:"jid"`
	LID      string `json:"lid"`
	PushName string `json:"push_name"`
}

type keepaliveData struct {
	Failures     int     `json:"failures"`
	LastSuccess  string  `json:"last_success"`
	LastFrameAge float64 `json:"last_frame_age_s"`
}

type timelockData struct {
	Active bool   `json:"active"`
	Until  string `json:"until,omitempty"`
	Type   string `json:"type"`
}

// refusal is a 5xx code that whatsmeow keeps to itself.
type refusal struct{ code int }

// lastCodeMargin: WhatsApp ends the connection when it has no more QR codes, perhaps a moment before the last one has run out here.
const lastCodeMargin = 5 * time.Second

// pairing is the state of the QR or code flow.
type pairing struct {
	codes    []string
	shown    int
	expires  time.Time // of the last code
	announce bool      // the paired event has been sent
}

func timelock(evt *events.NotifyAccountReachoutTimelock) timelockData {
	data := timelockData{Active: evt.IsActive, Type: evt.EnforcementType}
	if !evt.TimeEnforcementEnds.IsZero() {
		data.Until = rfc3339(evt.TimeEnforcementEnds.Time)
	}
	return data
}

// post hands something to the loop. The queue has room for everything that happens once; what repeats is dropped when the daemon does not read.
func (s *Session) post(signal any) {
	select {
	case s.inbox <- signal:
	default:
		s.log.Warn("a lifecycle event was dropped: the daemon does not read")
	}
}

// loop sends the lifecycle events until the session ends.
func (s *Session) loop() {
	qr, limit, change := stoppedTimer(), stoppedTimer(), stoppedTimer()
	defer change.Stop()
	silence := time.NewTicker(s.cfg.Timing.Silence / silenceChecks)
	defer silence.Stop()
	checkpoint := time.NewTicker(checkpointEvery)
	defer checkpoint.Stop()
	for {
		select {
		case signal := <-s.inbox:
			s.serve(signal, qr, limit)
		case <-qr.C:
			s.showQR(qr)
		case <-limit.C:
			s.finish(s.overdue())
		case <-s.store.Changed():
			s.scheduleNews(change)
		case <-change.C:
			s.tellNews(change)
		case <-silence.C:
			s.checkSilence()
		case <-checkpoint.C:
			s.checkpoint(walLimit)
		case <-s.ending:
			s.lastSignals(qr, limit)
			return
		}
	}
}

func stoppedTimer() *time.Timer {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return timer
}

func (s *Session) serve(signal any, qr, limit *time.Timer) {
	switch signal := signal.(type) {
	case *events.QR:
		if s.PhoneNumber != "" {
			s.askForCode(signal.Codes, qr)
			return
		}
		s.pairing.codes, s.pairing.shown = signal.Codes, 0
		s.showQR(qr)
	case pairingCode:
		s.showCode(signal)
	case *events.PairSuccess:
		qr.Stop()
		s.checkpoint(0)
		s.announcePaired()
		limit.Reset(s.cfg.Timing.PairRestart)
	case *events.Connected:
		device := s.store.Device
		s.emit(s.ctx, "connected", connectedData{JID: device.GetJID().String(), LID: device.GetLID().String(), PushName: device.PushName})
		s.tellPresence()
	case *events.PushNameSetting:
		s.tellPresence()
	case *events.KeepAliveTimeout:
		s.pinged(signal.ErrorCount, signal.LastSuccess)
	case *events.KeepAliveRestored:
		s.pinged(0, time.Now())
	case *events.NotifyAccountReachoutTimelock:
		s.emit(s.ctx, "timelock", timelock(signal))
	case refusal:
		limit.Reset(s.cfg.Timing.ServerGrace)
	case historyQueued:
		s.startHistory()
	}
}

// lastSignals sends what happened before the end. WhatsApp's "restart required" can overtake whatsmeow's own report of the pairing.
func (s *Session) lastSignals(qr, limit *time.Timer) {
	for len(s.inbox) > 0 {
		s.serve(<-s.inbox, qr, limit)
	}
	qr.Stop()
	limit.Stop()
	if data, ok := s.currentEnding().data.(disconnectedData); ok && data.Reason == reasonRestartRequired && len(s.pairing.codes) > 0 {
		s.checkpoint(0)
		s.announcePaired()
	}
}

// announcePaired sends the paired event once.
func (s *Session) announcePaired() {
	device := s.store.Device
	if s.pairing.announce || device.ID == nil {
		return
	}
	s.pairing.announce = true
	s.emit(s.base, "paired", pairedData{
		JID: device.ID.String(), LID: device.LID.String(), Platform: device.Platform, BusinessName: device.BusinessName,
	})
}

// showQR sends the next code; WhatsApp shows the first for a minute and the others for 20 s.
func (s *Session) showQR(timer *time.Timer) {
	p := &s.pairing
	if p.shown == len(p.codes) {
		s.finish(s.pairingExpired())
		return
	}
	ttl := s.cfg.Timing.QRNext
	if p.shown == 0 {
		ttl = s.cfg.Timing.QRFirst
	}
	code := p.codes[p.shown]
	p.shown++
	if p.shown == len(p.codes) {
		s.codesEnd(time.Now().Add(ttl))
	}
	timer.Reset(ttl)
	s.emit(s.ctx, "qr", qrData{Code: code, TTLMS: ttl.Milliseconds(), Remaining: len(p.codes) - p.shown})
}

func (s *Session) codesEnd(at time.Time) {
	s.pairing.expires = at
	s.lastCode.Store(&at)
}

// codesEndNow reports whether the last code is running out.
func (s *Session) codesEndNow() bool {
	at := s.lastCode.Load()
	return at != nil && s.store.Device.ID == nil && time.Until(*at) < lastCodeMargin
}

func (s *Session) pairingExpired() *ending {
	if s.PhoneNumber != "" {
		return disconnected(reasonQRExpired, 0, "the pairing code was not entered in time")
	}
	return disconnected(reasonQRExpired, 0, "none of the QR codes was scanned in time")
}

// overdue is the ending for a connection that WhatsApp should have ended.
func (s *Session) overdue() *ending {
	if code := int(s.wire.serverCode.Load()); code != 0 {
		return serverEnding(code)
	}
	return disconnected(reasonRestartRequired, 0, "paired; WhatsApp did not ask for a new connection, which is needed anyway")
}

func (s *Session) checkpoint(limit int64) {
	if err := s.store.Checkpoint(s.ctx, limit); err != nil && s.ctx.Err() == nil {
		s.log.Debug("checkpoint", logs.KeyError, err)
	}
}
