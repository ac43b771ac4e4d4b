// SPDX-License-Identifier: GPL-3.0-or-later

// Package logs writes the engine's log: JSON lines on stderr without keys, message texts or whole phone numbers.
package logs

import (
	"io"
	"log/slog"
	"regexp"
	"sync"
	"sync/atomic"
	"time"
)

// Keys of log records.
const (
	KeySession    = "session"
	KeyGeneration = "generation"
	KeyModule     = "module"
	KeyError      = "error"
)

// queuedLines bounds what waits for a slow reader of stderr. Losing log lines is better than stopping the sessions that write them.
const queuedLines = 1024

// Output is a writer that never blocks its callers.
type Output struct {
	lines   chan []byte
	dropped atomic.Int64
	done    chan struct{}
	close   sync.Once
}

// NewOutput writes lines to w from a goroutine of its own.
func NewOutput(w io.Writer) *Output {
	o := &Output{lines: make(chan []byte, queuedLines), done: make(chan struct{})}
	go func() {
		defer close(o.done)
		for line := range o.lines {
			if line == nil {
				return
			}
			// Nobody is left to tell when stderr is broken.
			_, _ = w.Write(line)
		}
	}()
	return o
}

// Write queues one line; it drops the line when the queue is full.
func (o *Output) Write(line []byte) (int, error) {
	select {
	case o.lines <- append([]byte(nil), line...):
	default:
		o.dropped.Add(1)
	}
	return len(line), nil
}

// Dropped returns how many lines were lost.
func (o *Output) Dropped() int64 { return o.dropped.Load() }

// Close writes what is queued, for at most timeout. Later lines are dropped when the queue is full, otherwise never written.
func (o *Output) Close(timeout time.Duration) {
	o.close.Do(func() {
		select {
		case o.lines <- nil:
		case <-time.After(timeout):
		}
	})
	select {
	case <-o.done:
	case <-time.After(timeout):
	}
}

// New makes the logger of the process.
func New(w io.Writer, level slog.Leveler) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: redactAttr}))
}

// redactAttr redacts every free text that reaches the log: messages and errors of libraries quote JIDs. Session names are the operator's own words.
func redactAttr(_ []string, attr slog.Attr) slog.Attr {
	if attr.Key == slog.TimeKey || attr.Key == slog.LevelKey || attr.Key == KeySession {
		return attr
	}
	switch attr.Value.Kind() {
	case slog.KindString:
		attr.Value = slog.StringValue(Redact(attr.Value.String()))
	case slog.KindAny:
		if err, ok := attr.Value.Any().(error); ok {
			attr.Value = slog.StringValue(Redact(err.Error()))
		}
	}
	return attr
}

var (
	// A phone number or LID: the last two digits are enough to tell two of them apart in a log.
	numbers = regexp.MustCompile(`\d{5,}(\d{2})`)
	// Key material and ciphertext come as long hexadecimal or base64 runs.
	blobs = regexp.MustCompile(`[0-9A-Za-z+/=]{40,}`)
)

// Redact removes phone numbers and anything that may be key material from s.
func Redact(s string) string {
	return numbers.ReplaceAllString(blobs.ReplaceAllString(s, "[redacted]"), "…$1")
}
