// SPDX-License-Identifier: GPL-3.0-or-later

package engine

import (
	"errors"
	"io/fs"
	"path/filepath"
	"runtime/debug"
	"time"

	"warren/engine/internal/frames"
	"warren/engine/internal/logs"
	"warren/engine/internal/state"
)

// copied is the result of a snapshot.
type copied struct {
	Paired bool   `json:"paired"`
	JID    string `json:"jid,omitempty"`
	LID    string `json:"lid,omitempty"`
	Bytes  int64  `json:"bytes"`
}

// snapshot copies the state of one session to a new file, beside everything else that goes on.
func (e *Engine) snapshot(r *frames.Request) {
	if r.Session == "" || r.Generation < 0 || !filepath.IsAbs(r.Dir) || !filepath.IsAbs(r.To) {
		e.reply(r, nil, frames.Errorf(frames.CodeBadRequest, "snapshot needs a session, absolute paths in dir and to, and a generation or 0"))
		return
	}
	var current *entry
	if r.Generation > 0 {
		if current = e.find(r.Session, r.Generation); current == nil {
			e.reply(r, nil, notOpen(r))
			return
		}
		if filepath.Clean(r.Dir) != filepath.Clean(current.session.Dir) {
			e.reply(r, nil, frames.Errorf(frames.CodeBadRequest, "the session is open in another directory"))
			return
		}
	}
	if !e.beginSnapshot() {
		e.reply(r, nil, frames.Errorf(frames.CodeBusy, "the engine is stopping"))
		return
	}
	go func() {
		defer e.snapshots.Done()
		result, err := e.copyState(r, current)
		e.reply(r, result, err)
	}()
}

// beginSnapshot counts a snapshot that the end of the engine waits for.
func (e *Engine) beginSnapshot() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopping {
		return false
	}
	e.snapshots.Add(1)
	return true
}

func (e *Engine) waitSnapshots() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.snapshots.Wait()
	}()
	select {
	case <-done:
	case <-time.After(snapshotsBound):
		e.Log.Warn("a snapshot is cut short")
	}
}

func (e *Engine) copyState(r *frames.Request, current *entry) (result any, failure *frames.Error) {
	defer func() {
		if p := recover(); p != nil {
			e.Log.Error("panic in snapshot", logs.KeySession, r.Session, "panic", p, "stack", string(debug.Stack()))
			result, failure = nil, frames.Errorf(frames.CodeInternal, "a bug in the engine: see its log")
		}
	}()
	if err := e.copying.Acquire(e.ctx, 1); err != nil {
		return nil, frames.Errorf(frames.CodeBusy, "the engine is stopping")
	}
	defer e.copying.Release(1)
	started := time.Now()
	var held state.Copy
	var err error
	if current != nil {
		held, err = current.session.Snapshot(e.ctx, r.To)
	} else {
		held, err = state.SnapshotClosed(e.ctx, r.Dir, r.To)
	}
	if err != nil {
		e.Log.Warn("a snapshot failed", logs.KeySession, r.Session, logs.KeyError, err)
		return nil, frames.Errorf(stateCode(err), "%v", err)
	}
	e.Log.Debug("snapshot", logs.KeySession, r.Session, "bytes", held.Bytes, "ms", time.Since(started).Milliseconds())
	return copied{Paired: held.Paired, JID: held.JID, LID: held.LID, Bytes: held.Bytes}, nil
}

// stateCodes are the protocol's words for errors of the state directory; the first that fits counts.
var stateCodes = []struct {
	err  error
	code string
}{
	{state.ErrDisk, frames.CodeDiskTrouble},
	{state.ErrMissing, frames.CodeStateMissing},
	{state.ErrUnreadable, frames.CodeStateUnreadable},
	{state.ErrLocked, frames.CodeStateLocked},
	{state.ErrClosed, frames.CodeNotOpen},
	{fs.ErrExist, frames.CodePathExists},
}

func stateCode(err error) string {
	for _, known := range stateCodes {
		if errors.Is(err, known.err) {
			return known.code
		}
	}
	return frames.CodeInternal
}
