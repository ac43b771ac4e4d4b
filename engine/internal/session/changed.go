// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"time"

	"warren/engine/internal/logs"
	"warren/engine/internal/state"
)

type changedData struct {
	Kind string `json:"kind"`
}

// Words of a "changed" event.
const (
	changedIdentity = "identity"
	changedOther    = "other"
)

// news paces the "changed" events.
type news struct {
	identityAt, anyAt time.Time // when one was sent last
}

// due tells how long the news of a change has to wait.
func (n *news) due(change state.Change, timing Timing, now time.Time) time.Duration {
	next := n.anyAt.Add(timing.ChangedOther)
	if change == state.IdentityChange {
		next = n.identityAt.Add(timing.ChangedIdentity)
	}
	return max(0, next.Sub(now))
}

func (n *news) told(change state.Change, now time.Time) {
	n.anyAt = now
	if change == state.IdentityChange {
		n.identityAt = now
	}
}

// scheduleNews has the loop tell of what is written, when it is time.
func (s *Session) scheduleNews(timer *time.Timer) {
	if change := s.store.PendingChange(); change != state.NoChange {
		timer.Reset(s.news.due(change, s.cfg.Timing, time.Now()))
	}
}

// tellNews sends what is pending. It waits for the transaction that is under way, so that a snapshot holds what it tells of.
func (s *Session) tellNews(timer *time.Timer) {
	change, err := s.store.TakeChange(s.ctx)
	if err != nil {
		if s.ctx.Err() == nil {
			s.log.Warn("the database does not tell what has changed", logs.KeyError, err)
			timer.Reset(s.cfg.Timing.ChangedOther)
		}
		return
	}
	s.emitChange(s.ctx, change)
}

func (s *Session) emitChange(ctx context.Context, change state.Change) {
	kind := changedOther
	switch change {
	case state.NoChange:
		return
	case state.IdentityChange:
		kind = changedIdentity
	}
	s.news.told(change, time.Now())
	s.emit(ctx, "changed", changedData{Kind: kind})
}

// Snapshot copies the session's state while it goes on.
func (s *Session) Snapshot(ctx context.Context, to string) (state.Copy, error) {
	return s.store.Snapshot(ctx, to)
}
