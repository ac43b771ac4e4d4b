// SPDX-License-Identifier: GPL-3.0-or-later

package engine

import (
	"path/filepath"
	"regexp"
	"runtime/debug"
	"time"

	"warren/engine/internal/frames"
	"warren/engine/internal/logs"
	"warren/engine/internal/session"
)

// entry is one generation of one session, from the open request until everything of it is closed.
type entry struct {
	name       string
	generation int64

	opened  chan struct{}    // closed when session is set, or opening has failed
	session *session.Session // nil until opened, and when opening failed
	gone    chan struct{}    // closed when nothing of the generation is left

	leaving bool // a close or logout is under way; guarded by Engine.mu
}

func (e *Engine) open(r *frames.Request) {
	options, err := e.checkOpen(r)
	if err != nil {
		e.reply(r, nil, err)
		return
	}
	fresh, previous, err := e.reserve(r)
	if err != nil {
		e.reply(r, nil, err)
		return
	}
	go e.serve(r, options, fresh, previous)
}

// phonePattern is a number in international form: E.164 without its plus sign. whatsmeow refuses less than seven digits.
var phonePattern = regexp.MustCompile(`^[1-9][0-9]{6,14}$`)

// checkOpen refuses arguments that cannot be right.
func (e *Engine) checkOpen(r *frames.Request) (*session.Options, *frames.Error) {
	switch {
	case r.Session == "" || r.Generation <= 0 || !filepath.IsAbs(r.Dir):
		return nil, frames.Errorf(frames.CodeBadRequest, "open needs a session, a positive generation and an absolute dir")
	case r.PhoneNumber != "" && !phonePattern.MatchString(r.PhoneNumber):
		return nil, frames.Errorf(frames.CodeBadRequest, "phone_number must have 7 to 15 digits, in international form and without a plus sign")
	}
	proxy, err := e.Endpoint.ParseProxy(r.Proxy)
	if err != nil {
		return nil, frames.Errorf(frames.CodeBadRequest, "%v", err)
	}
	return &session.Options{
		Session: r.Session, Generation: r.Generation, Dir: r.Dir, Create: r.Create, DeviceName: r.DeviceName,
		PhoneNumber: r.PhoneNumber, MarkOnline: r.MarkOnline, Proxy: proxy,
	}, nil
}

// reserve puts a new entry in the registry. previous is the generation before it, if that is still closing.
func (e *Engine) reserve(r *frames.Request) (fresh, previous *entry, err *frames.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	previous = e.sessions[r.Session]
	switch {
	case e.stopping:
		return nil, nil, frames.Errorf(frames.CodeBusy, "the engine is stopping")
	case previous != nil && (r.Generation <= previous.generation || !previous.ends()):
		return nil, nil, frames.Errorf(frames.CodeAlreadyOpen, "generation %d is open", previous.generation)
	case previous == nil && len(e.sessions) >= e.MaxSessions:
		return nil, nil, frames.Errorf(frames.CodeTooManySessions, "%d sessions are open", len(e.sessions))
	}
	fresh = &entry{name: r.Session, generation: r.Generation, opened: make(chan struct{}), gone: make(chan struct{})}
	e.sessions[r.Session] = fresh
	return fresh, previous, nil
}

// ends reports whether the generation is on its way out. Called with Engine.mu held.
func (n *entry) ends() bool {
	select {
	case <-n.opened:
	default:
		return false
	}
	return n.session == nil || n.session.Ending()
}

// serve opens one generation and runs it to its end.
func (e *Engine) serve(r *frames.Request, options *session.Options, current, previous *entry) {
	defer e.remove(current)
	if previous != nil {
		<-previous.gone
	}
	s, err := e.openUnlessStopping(options)
	current.session = s
	close(current.opened)
	if err != nil {
		e.reply(r, nil, err)
		return
	}
	e.reply(r, s.Opened(), nil)
	s.Run()
}

func (e *Engine) openUnlessStopping(options *session.Options) (*session.Session, *frames.Error) {
	e.web.BeforeOpen(e.opens) // may take seconds, in which a stop may come
	e.mu.Lock()
	stopping := e.stopping
	e.mu.Unlock()
	if stopping {
		return nil, frames.Errorf(frames.CodeBusy, "the engine is stopping")
	}
	return e.openSession(options)
}

func (e *Engine) openSession(options *session.Options) (s *session.Session, failure *frames.Error) {
	defer func() {
		if p := recover(); p != nil {
			e.Log.Error("panic in open", logs.KeySession, options.Session, "panic", p, "stack", string(debug.Stack()))
			s, failure = nil, frames.Errorf(frames.CodeInternal, "a bug in the engine: see its log")
		}
	}()
	s, err := session.Open(e.ctx, e.cfg, *options)
	if err == nil {
		return s, nil
	}
	e.Log.Warn("a session does not open", logs.KeySession, options.Session, logs.KeyError, err)
	return nil, frames.Errorf(stateCode(err), "%v", err)
}

// remove takes the generation out of the registry; a later one may be in its place already.
func (e *Engine) remove(gone *entry) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sessions[gone.name] == gone {
		delete(e.sessions, gone.name)
	}
	close(gone.gone)
}

// find returns the open generation, or nil.
func (e *Engine) find(name string, generation int64) *entry {
	e.mu.Lock()
	current := e.sessions[name]
	e.mu.Unlock()
	if current == nil || current.generation != generation {
		return nil
	}
	select {
	case <-current.opened:
	default:
		return nil
	}
	if current.session == nil {
		return nil
	}
	return current
}

func notOpen(r *frames.Request) *frames.Error {
	return frames.Errorf(frames.CodeNotOpen, "generation %d is not open", r.Generation)
}

func (e *Engine) send(r *frames.Request) {
	current := e.find(r.Session, r.Generation)
	if current == nil || current.session.Ending() {
		e.reply(r, nil, notOpen(r))
		return
	}
	current.session.Send(r, func(result any, err *frames.Error) { e.reply(r, result, err) })
}

func (e *Engine) probe(r *frames.Request) {
	current := e.find(r.Session, r.Generation)
	if current == nil || current.session.Ending() {
		e.reply(r, nil, notOpen(r))
		return
	}
	timeout := time.Duration(min(max(r.TimeoutMS, 0), 1<<31)) * time.Millisecond
	current.session.Probe(timeout, func(result any, err *frames.Error) { e.reply(r, result, err) })
}

// depart marks the generation as leaving; nil when it is not open or leaves already. So at most one goroutine waits for its end.
func (e *Engine) depart(r *frames.Request) *entry {
	current := e.find(r.Session, r.Generation)
	if current == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if current.leaving {
		return nil
	}
	current.leaving = true
	return current
}

// closeSession also closes a generation that is still being opened, once it is: else it would stay open after its daemon has given it up.
func (e *Engine) closeSession(r *frames.Request) {
	e.mu.Lock()
	current := e.sessions[r.Session]
	e.mu.Unlock()
	if current == nil || current.generation != r.Generation {
		e.reply(r, nil, notOpen(r))
		return
	}
	select {
	case <-current.opened:
		e.closeOpened(r)
	default:
		go func() {
			<-current.opened
			e.closeOpened(r)
		}()
	}
}

func (e *Engine) closeOpened(r *frames.Request) {
	current := e.depart(r)
	if current == nil {
		e.reply(r, nil, notOpen(r))
		return
	}
	first := current.session.Close(session.DrainAtClose)
	go func() {
		<-current.gone
		if !first { // it ended by itself: its terminal event is on the way
			e.reply(r, nil, notOpen(r))
			return
		}
		e.reply(r, nil, nil)
	}()
}

func (e *Engine) logout(r *frames.Request) {
	current := e.depart(r)
	if current == nil {
		e.reply(r, nil, notOpen(r))
		return
	}
	go func() {
		if err := current.session.Logout(); err != nil {
			e.mu.Lock()
			current.leaving = false
			e.mu.Unlock()
			e.reply(r, nil, err)
			return
		}
		<-current.gone
		e.reply(r, nil, nil)
	}()
}
