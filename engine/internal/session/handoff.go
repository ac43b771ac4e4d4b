// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"sync"
	"time"
)

// verdict is what became of an event that waited for the daemon's answer.
type verdict int

const (
	answeredYes verdict = iota
	answeredNo
	unanswered
	notAsked // not handed over, or given up because the session ends
)

// handoff gives events to the daemon, one at a time, and waits for its answers.
type handoff struct {
	turn   chan struct{} // holds a token while an event is with the daemon; for good once drained
	giveUp chan struct{}
	once   sync.Once // closes giveUp

	mu     sync.Mutex
	closed bool
	id     int64
	answer chan bool
}

func newHandoff() *handoff {
	return &handoff{turn: make(chan struct{}, 1), giveUp: make(chan struct{})}
}

// ask hands over one event through send and waits for its answer until timeout, or until ctx ends.
func (h *handoff) ask(ctx context.Context, id int64, timeout time.Duration, send func() error) (verdict, error) {
	if h.isClosed() {
		return notAsked, nil
	}
	select {
	case h.turn <- struct{}{}:
	case <-ctx.Done():
		return notAsked, nil
	}
	defer func() { <-h.turn }()
	answer := make(chan bool, 1)
	if !h.expect(id, answer) {
		return notAsked, nil
	}
	defer h.expect(0, nil)
	if err := send(); err != nil {
		return notAsked, err
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case ok := <-answer:
		if ok {
			return answeredYes, nil
		}
		return answeredNo, nil
	case <-timer.C:
		return unanswered, nil
	case <-h.giveUp:
	case <-ctx.Done():
	}
	return notAsked, nil
}

func (h *handoff) isClosed() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.closed
}

func (h *handoff) expect(id int64, answer chan bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed && answer != nil {
		return false
	}
	h.id, h.answer = id, answer
	return true
}

// resolve takes the daemon's answer. It never blocks; an answer that nobody waits for is ignored.
func (h *handoff) resolve(id int64, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.answer == nil || h.id != id {
		return
	}
	h.answer <- ok
	h.answer = nil
}

// drain stops handing events over, and waits at most bound for the answer to the one that is with the daemon.
func (h *handoff) drain(bound time.Duration) {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	if h.waitIdle(bound) {
		return
	}
	h.once.Do(func() { close(h.giveUp) })
	h.waitIdle(time.Second)
}

func (h *handoff) waitIdle(bound time.Duration) bool {
	select {
	case h.turn <- struct{}{}:
		return true
	case <-time.After(bound):
		return false
	}
}
