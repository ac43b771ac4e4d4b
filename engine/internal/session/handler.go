// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"errors"
	"runtime/debug"
	"time"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"

	"warren/engine/internal/frames"
	"warren/engine/internal/logs"
)

// handle is whatsmeow's event handler. False means that WhatsApp is not told "received". whatsmeow takes a panic for success, so none may get out.
func (s *Session) handle(evt any) (ok bool) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in the event handler", "panic", p, "stack", string(debug.Stack()))
			s.finish(internalEnding("a bug in the engine (event handler): see its log"))
			ok = false
		}
	}()
	switch evt := evt.(type) {
	case *events.Message:
		return s.onMessage(evt)
	case *events.Receipt:
		return s.onReceipt(evt)
	case *events.UndecryptableMessage:
		return s.ask("undecryptable", "", convertUndecryptable(evt, s.alt))
	case *events.QR, *events.PairSuccess, *events.KeepAliveTimeout, *events.KeepAliveRestored, *events.PushNameSetting,
		*events.NotifyAccountReachoutTimelock:
		s.post(evt)
	case *events.Connected:
		s.online.Store(true)
		s.post(evt)
	case *events.OfflineSyncCompleted:
		s.offlineDone.Store(true)
	case *events.QRScannedWithoutMultidevice:
		s.log.Warn("the QR code was scanned by a phone without multi-device")
	default:
		s.onLifecycle(evt)
	}
	return true
}

func (s *Session) onLifecycle(evt any) {
	end := classifyEvent(evt, int(s.wire.serverCode.Load()), time.Now())
	if end == nil {
		return
	}
	if _, lost := evt.(*events.Disconnected); lost && s.codesEndNow() {
		end = s.pairingExpired()
	}
	if _, outdated := evt.(*events.ClientOutdated); outdated {
		s.cfg.WAVersion.Refused(s.version)
	}
	if end.deleteDevice && s.loggingOut.Load() {
		// WhatsApp confirms our own logout in this way, sometimes before it answers the request.
		end.event, end.data = "", nil
	}
	s.finish(end)
}

func (s *Session) onMessage(evt *events.Message) bool {
	if notification := evt.Message.GetProtocolMessage().GetHistorySyncNotification(); notification != nil && evt.Info.IsFromMe {
		s.queueHistory(notification)
		return true
	}
	data := convertMessage(evt, s.alt, !s.offlineDone.Load())
	if data == nil {
		return true
	}
	return s.ask("message", evt.Info.ID, data)
}

func (s *Session) onReceipt(evt *events.Receipt) bool {
	for _, data := range convertReceipt(evt, s.alt) {
		if !s.ask("receipt", evt.MessageIDs[0], data) {
			return false
		}
	}
	return true
}

// ask hands an event to the daemon. When it is not accepted the session ends, because only a new connection makes WhatsApp deliver again.
func (s *Session) ask(name, stanza string, data any) bool {
	id := s.cfg.NextEventID()
	event := frames.Event{Event: name, Session: s.Session, Generation: s.Generation, ID: id, Data: data}
	verdict, err := s.hand.ask(s.ctx, id, s.cfg.Timing.Answer, func() error { return s.sendFitting(event) })
	switch {
	case errors.Is(err, frames.ErrTooLong):
		// Refusing it would bring it back for ever.
		s.log.Error("an event does not fit in a frame and is dropped", "event", name)
	case err != nil:
		return false // the engine is going down
	case verdict == answeredNo:
		s.finish(abruptly(disconnected(reasonHandlerTimeout, 0, "the daemon did not take over an event")))
		return false
	case verdict == unanswered:
		s.finish(abruptly(disconnected(reasonHandlerTimeout, 0, "the daemon did not answer an event within %s", s.cfg.Timing.Answer)))
		return false
	case verdict == notAsked:
		return false
	}
	if stanza != "" {
		s.wire.accepted(stanza)
	}
	return true
}

func (s *Session) sendFitting(event frames.Event) error {
	err := s.cfg.Out.Event(s.ctx, event)
	if message, ok := event.Data.(*messageData); ok && errors.Is(err, frames.ErrTooLong) {
		message.shorten()
		return s.cfg.Out.Event(s.ctx, event)
	}
	return err
}

// alt finds the other address of a user in the store.
func (s *Session) alt(jid types.JID) types.JID {
	if jid.Server != types.DefaultUserServer && jid.Server != types.HiddenUserServer {
		return types.EmptyJID
	}
	other, err := s.store.Device.GetAltJID(s.ctx, jid)
	if err != nil {
		s.log.Debug("no other address", logs.KeyError, err)
		return types.EmptyJID
	}
	return other
}

// queueHistory has a history downloaded. Nobody wants the history, but the map of LIDs and the tokens in it are needed to send.
func (s *Session) queueHistory(notification *waE2E.HistorySyncNotification) {
	select {
	case s.history <- notification:
		s.post(historyQueued{})
	default:
		s.log.Warn("a history notification was dropped: too many at once")
	}
}
