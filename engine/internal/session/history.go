// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waE2E"

	"warren/engine/internal/logs"
)

// historyQueued tells the loop that there is something to download.
type historyQueued struct{}

// startHistory starts the worker at the first history: most generations never get one. Called by the loop only.
func (s *Session) startHistory() {
	if s.historyStarted {
		return
	}
	s.historyStarted = true
	s.workers.Add(1)
	go s.guarded("history", func() {
		defer s.workers.Done()
		for {
			select {
			case notification := <-s.history:
				s.download(notification)
			case <-s.ctx.Done():
				return
			}
		}
	})
}

// download stores what whatsmeow keeps of a history. A failure costs only that: it is logged, never reported.
func (s *Session) download(notification *waE2E.HistorySyncNotification) {
	if s.cfg.Downloads.Acquire(s.ctx, 1) != nil {
		return
	}
	defer s.cfg.Downloads.Release(1)
	if _, err := s.cli.DownloadHistorySync(s.ctx, notification, true); err != nil {
		s.log.Warn("a history could not be downloaded", "type", notification.GetSyncType().String(), logs.KeyError, err)
		return
	}
	if notification.GetDirectPath() == "" {
		return
	}
	err := s.cli.DeleteMedia(s.ctx, whatsmeow.MediaHistory, notification.GetDirectPath(), notification.GetFileEncSHA256(), notification.GetEncHandle())
	if err != nil {
		s.log.Debug("a downloaded history stays on the server", logs.KeyError, err)
	}
}
