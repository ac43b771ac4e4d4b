// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"time"

	"go.mau.fi/whatsmeow"

	"warren/engine/internal/frames"
)

// unlinkNews is how long WhatsApp's own word about the end of the device may take.
const unlinkNews = time.Second

// Logout unlinks the device at WhatsApp. Without an error the session is ending (see Done) and sends no event; with one it goes on.
func (s *Session) Logout() *frames.Error {
	if !s.online.Load() {
		return frames.Errorf(frames.CodeNotConnected, "the session is not online: WhatsApp cannot be told")
	}
	s.loggingOut.Store(true)
	ctx, cancel := context.WithTimeout(s.ctx, logoutBound)
	defer cancel()
	err := s.cli.Logout(ctx)
	if err == nil {
		s.finish(&ending{deleteDevice: true})
		return nil
	}
	if s.unlinked() {
		return nil
	}
	s.loggingOut.Store(false)
	return classifyLogout(err)
}

// unlinked reports whether the session ends because WhatsApp has unlinked the device. The news may be a moment behind the broken connection.
func (s *Session) unlinked() bool {
	select {
	case <-s.ending:
	case <-time.After(unlinkNews):
	}
	end := s.currentEnding()
	return end != nil && end.deleteDevice && end.event == ""
}

func classifyLogout(err error) *frames.Error {
	var iq *whatsmeow.IQError
	var dropped *whatsmeow.DisconnectedError
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, whatsmeow.ErrIQTimedOut):
		return frames.Errorf(frames.CodeTimeout, "WhatsApp did not answer within %s", logoutBound)
	case errors.Is(err, whatsmeow.ErrNotConnected), errors.Is(err, whatsmeow.ErrNotLoggedIn), errors.Is(err, context.Canceled), errors.As(err, &dropped):
		return frames.Errorf(frames.CodeNotConnected, "the connection was lost before WhatsApp answered")
	case errors.As(err, &iq):
		return refused(iq.Code, "WhatsApp refused the logout")
	}
	return frames.Errorf(frames.CodeInternal, "%v", err)
}
