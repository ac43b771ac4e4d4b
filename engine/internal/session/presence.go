// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"go.mau.fi/whatsmeow/types"

	"warren/engine/internal/logs"
)

// tellPresence tells WhatsApp whether contacts see the account as online. WhatsApp wants the account's name with it, which a new device learns a moment
// after its first login: until then there is nothing to tell, and PushNameSetting calls again. Called by the loop only.
func (s *Session) tellPresence() {
	if !s.online.Load() || s.store.Device.PushName == "" {
		return
	}
	presence := types.PresenceUnavailable
	if s.MarkOnline {
		presence = types.PresenceAvailable
	}
	s.workers.Add(1)
	go s.guarded("presence", func() {
		defer s.workers.Done()
		if err := s.cli.SendPresence(s.ctx, presence); err != nil {
			s.log.Warn("presence could not be told", logs.KeyError, err)
			return
		}
		s.log.Info("presence told", "presence", string(presence))
	})
}
