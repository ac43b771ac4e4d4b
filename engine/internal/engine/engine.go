// SPDX-License-Identifier: GPL-3.0-or-later

// Package engine serves the daemon: it reads requests and answers, keeps the open sessions, and ends with its pipe.
package engine

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.mau.fi/whatsmeow/store"
	"golang.org/x/sync/semaphore"

	"warren/engine/internal/endpoint"
	"warren/engine/internal/frames"
	"warren/engine/internal/logs"
	"warren/engine/internal/session"
	"warren/engine/internal/waversion"
)

// Exit statuses.
const (
	ExitOK       = 0
	ExitProtocol = 2 // the two sides no longer agree
)

const (
	parallelDownloads = 2
	parallelSnapshots = 4
	snapshotsBound    = 5 * time.Second // for those that are cut short at the end
	stopBound         = 20 * time.Second
	flushBound        = 2 * time.Second
)

// Options of an engine.
type Options struct {
	Pipe        net.Conn
	Endpoint    *endpoint.Endpoint
	Log         *slog.Logger
	MaxSessions int
	Version     string
	Whatsmeow   string
	Stop        <-chan struct{} // closed by a signal

	WAVersion    store.WAVersionContainer // not zero: sessions claim to be this version of WhatsApp Web
	VersionCache string                   // file for the version that WhatsApp serves; empty: none
	VersionHTTP  *http.Client             // asks for it; nil: the default. With a foreign endpoint it is never used
}

// Engine holds the open sessions of one process.
type Engine struct {
	Options
	out    *frames.Writer
	cfg    *session.Config
	web    *waversion.Keeper
	ctx    context.Context
	cancel context.CancelFunc
	opens  context.Context // ends when no session may open any more
	refuse context.CancelFunc
	exit   chan int // the first status wins

	copying   *semaphore.Weighted
	snapshots sync.WaitGroup

	mu       sync.Mutex
	sessions map[string]*entry
	stopping bool
}

// hello is the data of the first frame.
type hello struct {
	Protocol  int    `json:"protocol"`
	Engine    string `json:"engine"`
	Whatsmeow string `json:"whatsmeow"`
	PID       int    `json:"pid"`
}

// Run serves until the daemon is gone or the engine is told to stop, and returns the exit status.
func Run(options Options) int {
	e := &Engine{Options: options, exit: make(chan int, 1), sessions: map[string]*entry{}, copying: semaphore.NewWeighted(parallelSnapshots)}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	defer e.cancel()
	e.opens, e.refuse = context.WithCancel(e.ctx)
	defer e.refuse()
	e.out = frames.NewWriter(options.Pipe, func(err error) {
		options.Log.Warn("the daemon cannot be written to", logs.KeyError, err)
		e.cancel()
		if errors.Is(err, frames.ErrOverflow) {
			e.leave(ExitProtocol)
			return
		}
		e.leave(ExitOK)
	})
	e.web = waversion.New(waversion.Options{
		Offline: options.Endpoint.Foreign(), Pinned: options.WAVersion, CachePath: options.VersionCache, HTTP: options.VersionHTTP, Log: options.Log,
	})
	go e.web.Run(e.ctx)
	var events atomic.Int64
	e.cfg = &session.Config{
		Out: e.out, Endpoint: options.Endpoint, Log: options.Log, Timing: session.DefaultTiming(),
		NextEventID: func() int64 { return events.Add(1) }, Downloads: semaphore.NewWeighted(parallelDownloads),
		WAVersion: e.web,
	}
	_ = e.out.Event(e.ctx, frames.Event{Event: "hello", Data: hello{
		Protocol: frames.Version, Engine: options.Version, Whatsmeow: options.Whatsmeow, PID: os.Getpid(),
	}})
	go e.read()
	return e.wait()
}

// wait ends the engine: by its pipe, by a signal, or by a stop request, which has closed the sessions itself.
func (e *Engine) wait() int {
	var status int
	select {
	case status = <-e.exit:
	case <-e.Stop:
		e.Log.Info("stopping: signal")
		e.closeAll(session.DrainAtClose)
	}
	// Without a daemon there is nobody left to answer.
	e.closeAll(0)
	e.cancel()
	e.waitSnapshots()
	e.out.Close(flushBound)
	return status
}

// leave makes Run return; the first status counts.
func (e *Engine) leave(status int) {
	select {
	case e.exit <- status:
	default:
	}
}

// read dispatches the daemon's frames. It never waits for anything but the next frame.
func (e *Engine) read() {
	reader := frames.NewReader(e.Pipe)
	for {
		in, err := reader.Next()
		switch {
		case errors.Is(err, frames.ErrTooLong), errors.Is(err, frames.ErrMalformed):
			e.Log.Error("the daemon sent something that is no frame", logs.KeyError, err)
			e.leave(ExitProtocol)
			return
		case err != nil:
			if !errors.Is(err, io.EOF) {
				e.Log.Warn("reading from the daemon", logs.KeyError, err)
			}
			e.Log.Info("the daemon is gone")
			e.leave(ExitOK)
			return
		case in.Answer != nil:
			e.answer(in.Answer)
		default:
			e.request(in.Request)
		}
	}
}

func (e *Engine) answer(answer *frames.Answer) {
	if s := e.find(answer.Session, answer.Generation); s != nil {
		s.session.Answer(answer.ID, answer.OK)
	}
}

func (e *Engine) request(r *frames.Request) {
	switch r.Op {
	case "open":
		e.open(r)
	case "send":
		e.send(r)
	case "close":
		e.closeSession(r)
	case "logout":
		e.logout(r)
	case "probe":
		e.probe(r)
	case "snapshot":
		e.snapshot(r)
	case "ping":
		e.reply(r, e.measure(), nil)
	case "stop":
		e.stop(r)
	default:
		e.reply(r, nil, frames.Errorf(frames.CodeBadRequest, "unknown op %q", r.Op))
	}
}

func (e *Engine) reply(r *frames.Request, result any, err *frames.Error) {
	e.out.Respond(r.Reply(result, err))
}

// closeAll closes the sessions side by side and waits for them.
func (e *Engine) closeAll(drain time.Duration) {
	entries := e.refuseNew()
	for _, n := range entries {
		go func() {
			<-n.opened
			if n.session != nil {
				n.session.Close(drain)
			}
		}()
	}
	deadline := time.After(stopBound)
	for _, n := range entries {
		select {
		case <-n.gone:
		case <-deadline:
			e.Log.Error("a session did not close in time", logs.KeySession, n.name)
			return
		}
	}
}

// refuseNew stops further opens and returns the sessions there are.
func (e *Engine) refuseNew() []*entry {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stopping = true
	e.refuse()
	list := make([]*entry, 0, len(e.sessions))
	for _, entry := range e.sessions {
		list = append(list, entry)
	}
	return list
}

func (e *Engine) stop(r *frames.Request) {
	e.mu.Lock()
	again := e.stopping
	e.mu.Unlock()
	if again {
		e.reply(r, nil, frames.Errorf(frames.CodeBusy, "the engine is stopping already"))
		return
	}
	go func() {
		e.Log.Info("stopping: request")
		e.closeAll(session.DrainAtClose)
		e.reply(r, nil, nil)
		e.leave(ExitOK)
	}()
}

// measurements is the result of a ping.
type measurements struct {
	Sessions   int    `json:"sessions"`
	Goroutines int    `json:"goroutines"`
	RSSBytes   uint64 `json:"rss_bytes"`
	HeapBytes  uint64 `json:"heap_bytes"`
	// MemoryLimitBytes is what Go keeps to, by collecting more often; null: none.
	MemoryLimitBytes *int64 `json:"memory_limit_bytes"`
	WAVersion        string `json:"wa_version"`
	// WAVersionAge is in seconds, since WhatsApp was last heard to serve it; null: never.
	WAVersionAge *int64 `json:"wa_version_age_s"`
}

func (e *Engine) measure() measurements {
	e.mu.Lock()
	count := len(e.sessions)
	e.mu.Unlock()
	version, age := e.web.Current()
	result := measurements{
		Sessions: count, Goroutines: runtime.NumGoroutine(), RSSBytes: residentBytes(), HeapBytes: heapBytes(), MemoryLimitBytes: memoryLimit(), WAVersion: version.String(),
	}
	if age >= 0 {
		seconds := int64(age.Seconds())
		result.WAVersionAge = &seconds
	}
	return result
}
