// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// wire watches the stanzas of one client for what whatsmeow knows but does not report. It implements logs.Tap: both methods run in whatsmeow's goroutines
// and must not block.
type wire struct {
	// serverCode is the code of a refusal after which whatsmeow only reports a lost connection.
	serverCode atomic.Int32
	onRefusal  func(code int)
	lastFrame  atomic.Int64 // when something came, in nanoseconds of the process's clock; 0: never

	mu        sync.Mutex
	watchedID string
	onSent    func() // called once when the watched message is about to be written
	reached   []types.JID
	wrote     bool
	settling  string // stanza id of the last accepted event whose receipt has not been written
	settled   chan struct{}
	since     time.Time // when the last event was accepted
}

// processStart is what lastFrame counts from, so that a step of the wall clock is no silence.
var processStart = time.Now()

// age is how long ago the last frame came.
func (w *wire) age() time.Duration {
	return time.Since(processStart) - time.Duration(w.lastFrame.Load())
}

func (w *wire) Received(node *waBinary.Node) {
	w.lastFrame.Store(int64(time.Since(processStart)))
	code := 0
	switch node.Tag {
	case "failure":
		code = intAttr(node, "reason")
	case "stream:error":
		code = intAttr(node, "code")
	}
	if code >= codeInternalError && code != codeRestartRequired {
		w.serverCode.Store(int32(code))
		w.onRefusal(code)
	}
}

func intAttr(node *waBinary.Node, key string) int {
	text, _ := node.Attrs[key].(string)
	value, _ := strconv.Atoi(text)
	return value
}

func (w *wire) Sent(node *waBinary.Node) {
	id, _ := node.Attrs["id"].(string)
	w.mu.Lock()
	defer w.mu.Unlock()
	switch node.Tag {
	case "message":
		if id != "" && id == w.watchedID {
			w.wrote = true
			w.reached = append(w.reached, targets(node)...)
			w.onSent()
		}
	case "receipt", "ack":
		if id != "" && id == w.settling {
			w.settling = ""
			close(w.settled)
		}
	}
}

// targets lists the devices for which a message stanza carries a ciphertext.
func targets(message *waBinary.Node) (list []types.JID) {
	participants := message.GetChildByTag("participants")
	for _, to := range participants.GetChildrenByTag("to") {
		if jid, ok := to.Attrs["jid"].(types.JID); ok {
			list = append(list, jid)
		}
	}
	return list
}

// watch starts to note for which devices the message id is encrypted. onSent must not block.
func (w *wire) watch(id string, onSent func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watchedID, w.onSent, w.reached, w.wrote = id, onSent, nil, false
}

// reachedAny reports whether the watched message held a ciphertext for a device that is wanted.
func (w *wire) reachedAny(wanted func(types.JID) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.reached, wanted)
}

// written reports whether the watched message has been handed to the socket.
func (w *wire) written() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wrote
}

// accepted notes that whatsmeow is about to write the receipt for the stanza id.
func (w *wire) accepted(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.settling, w.settled, w.since = id, make(chan struct{}), time.Now()
}

// waitSettled waits until the receipt of the last accepted event is handed to the socket, for at most bound after its acceptance. It reports whether
// an event was accepted so recently that its receipt may still be on its way.
func (w *wire) waitSettled(bound, recently time.Duration) bool {
	w.mu.Lock()
	settling, settled, since := w.settling != "", w.settled, w.since
	w.mu.Unlock()
	if settling {
		select {
		case <-settled:
		case <-time.After(bound - time.Since(since)):
		}
	}
	return time.Since(since) < recently
}
