// SPDX-License-Identifier: GPL-3.0-or-later

package frames

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// eventBudget bounds the bytes of events that wait for a slow daemon. A session that finds no room waits, and so does its WhatsApp.
	eventBudget = 8 << 20
	// responseBudget bounds the bytes of responses. They never wait (the reader writes some of them), and a daemon that sends
	// requests without reading what comes back has stopped keeping the contract.
	responseBudget = 32 << 20
)

var (
	// ErrWriterClosed is returned after Close, or when the daemon no longer reads.
	ErrWriterClosed = errors.New("frame writer is closed")
	// ErrOverflow means that the daemon keeps asking and does not read what it is answered.
	ErrOverflow = errors.New("the daemon does not read its responses")
)

type queuedFrame struct {
	bytes []byte
	event bool
}

// Writer sends frames to the daemon in the order in which they were handed in, from one goroutine.
type Writer struct {
	out    io.Writer
	onFail func(error)
	events *semaphore.Weighted
	done   chan struct{}

	mu        sync.Mutex
	wake      *sync.Cond
	queue     []queuedFrame
	responses int
	closed    bool
}

// NewWriter starts a writer. onFail is called once, from a goroutine of the writer, when the pipe breaks or overflows.
func NewWriter(out io.Writer, onFail func(error)) *Writer {
	w := &Writer{out: out, onFail: onFail, events: semaphore.NewWeighted(eventBudget), done: make(chan struct{})}
	w.wake = sync.NewCond(&w.mu)
	go w.run()
	return w
}

// Event queues an event, waiting for room until ctx ends. ErrTooLong when the event does not fit in a frame.
func (w *Writer) Event(ctx context.Context, event Event) error {
	encoded, err := Encode(event)
	if err != nil {
		return err
	}
	if err := w.events.Acquire(ctx, int64(len(encoded))); err != nil {
		return err
	}
	if !w.push(queuedFrame{bytes: encoded, event: true}) {
		w.events.Release(int64(len(encoded)))
		return ErrWriterClosed
	}
	return nil
}

// Respond queues a response. It never waits.
func (w *Writer) Respond(response Response) {
	encoded, err := Encode(response)
	if err != nil {
		encoded, err = Encode(Response{Re: response.Re, Session: response.Session, Error: Errorf(CodeInternal, "the result could not be encoded: %v", err)})
	}
	if err == nil {
		w.push(queuedFrame{bytes: encoded})
	}
}

// Close sends what is queued, for at most timeout.
func (w *Writer) Close(timeout time.Duration) {
	w.mu.Lock()
	w.closed = true
	w.wake.Signal()
	w.mu.Unlock()
	select {
	case <-w.done:
	case <-time.After(timeout):
	}
}

func (w *Writer) push(frame queuedFrame) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	if !frame.event {
		w.responses += len(frame.bytes)
		if w.responses > responseBudget {
			w.closed = true
			go w.onFail(ErrOverflow)
			return false
		}
	}
	w.queue = append(w.queue, frame)
	w.wake.Signal()
	return true
}

func (w *Writer) run() {
	defer close(w.done)
	for {
		batch := w.take()
		if batch == nil {
			return
		}
		if err := w.write(batch); err != nil {
			w.mu.Lock()
			failed := !w.closed
			w.closed = true
			w.mu.Unlock()
			if failed {
				go w.onFail(err)
			}
			return
		}
	}
}

// take waits for frames; nil means that the writer is closed and everything is sent.
func (w *Writer) take() []queuedFrame {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) == 0 && !w.closed {
		w.wake.Wait()
	}
	batch := w.queue
	w.queue = nil
	return batch
}

func (w *Writer) write(batch []queuedFrame) error {
	for len(batch) > 0 {
		chunk, rest := joinFrames(batch)
		if _, err := w.out.Write(chunk); err != nil {
			return err
		}
		w.release(batch[:len(batch)-len(rest)])
		batch = rest
	}
	return nil
}

// joinFrames puts small frames together so that a burst costs few system calls.
func joinFrames(batch []queuedFrame) (chunk []byte, rest []queuedFrame) {
	const wanted = 64 << 10
	if len(batch) == 1 || len(batch[0].bytes) >= wanted {
		return batch[0].bytes, batch[1:]
	}
	for i, frame := range batch {
		if len(chunk) > 0 && len(chunk)+len(frame.bytes) > wanted {
			return chunk, batch[i:]
		}
		chunk = append(chunk, frame.bytes...)
	}
	return chunk, nil
}

func (w *Writer) release(sent []queuedFrame) {
	events, responses := 0, 0
	for _, frame := range sent {
		if frame.event {
			events += len(frame.bytes)
		} else {
			responses += len(frame.bytes)
		}
	}
	if events > 0 {
		w.events.Release(int64(events))
	}
	if responses > 0 {
		w.mu.Lock()
		w.responses -= responses
		w.mu.Unlock()
	}
}
