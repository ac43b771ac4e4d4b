package server

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.mau.fi/whatsmeow/types"

	"warren/engine/internal/sim/link"
)

const (
	// maxReplies bounds what waits to be written besides the mailbox. A client that asks this much without reading the
	// answers is cut.
	maxReplies = 1024

	// goodbyeGrace is how long a connection stays open after its last stanza. whatsmeow marks the disconnect as
	// expected only when it handles that stanza, behind all queued ones; closing at once would race with it.
	goodbyeGrace = 150 * time.Millisecond
)

// reply is a stanza that nobody needs to settle: an answer, an ack, or a goodbye, after which nothing follows.
type reply struct {
	node Node
	// raw, if set, goes out instead of the node.
	raw []byte
	// due is when it may go out, if it is held up; what is queued behind it waits too, as on a slow line.
	due  time.Time
	last bool
	// afterGrace holds a goodbye back for a client that is about to hang up by itself.
	afterGrace bool
}

// attachment is the device a client has logged in as, and what it missed.
type attachment struct {
	device  *Device
	offline backlog
}

// client is one connection. The reader handles stanzas in order; the writer sends replies first, and then takes from
// the device's mailbox at the client's own speed: only replies need a queue, and it is bounded.
type client struct {
	srv  *Server
	link *link.Conn
	log  *slog.Logger

	replies chan reply
	wake    chan struct{}
	// gone is closed when the reader has ended.
	gone    chan struct{}
	closing atomic.Bool

	// who is the device that the client has said it is; attached once it is let in.
	who      atomic.Pointer[Device]
	attached atomic.Pointer[attachment]
	pairing  *pairing
	claim    atomic.Pointer[claim]
	// entered is the wish for which a phone has entered a code.
	entered atomic.Pointer[CodeOffer]
}

func newClient(s *Server, conn *link.Conn) *client {
	return &client{
		srv: s, link: conn, log: s.log,
		replies: make(chan reply, maxReplies),
		wake:    make(chan struct{}, 1),
		gone:    make(chan struct{}),
	}
}

// run serves the connection until it ends.
func (c *client) run() {
	ctx, cancel := context.WithCancel(c.srv.ctx)
	var writer sync.WaitGroup
	writer.Go(func() {
		c.write(ctx)
		// Without a writer the reader has nobody to answer through.
		c.link.Abort()
	})
	c.read(ctx)
	close(c.gone)
	cancel()
	c.withdrawRefs()
	c.withdrawCode()
	if a := c.attached.Load(); a != nil {
		a.device.detach(c)
	}
	writer.Wait()
}

func (c *client) read(ctx context.Context) {
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("client handler panicked", "action", "client_panic", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	if err := c.start(ctx); err != nil {
		c.log.Debug("client closed", "action", "client_closed", "error", err)
		return
	}
	for {
		node, err := c.link.ReadNode(ctx)
		if err != nil {
			c.log.Debug("client gone", "action", "client_gone", "error", err)
			return
		}
		c.srv.stanzasIn.Add(1)
		if !c.closing.Load() && c.frozen() == nil {
			c.handle(node)
		}
	}
}

// handle deals with one stanza. Presence, chat states and the like need no answer.
func (c *client) handle(node *Node) {
	device := c.device()
	switch {
	case node.Tag == "iq":
		c.handleIQ(node)
	case device == nil && node.Tag == "ack":
		// Of the notification in a pairing by code; nothing waits for it.
	case device == nil:
		c.log.Info("stanza before login ignored", "action", "stanza_ignored", "tag", node.Tag)
	case node.Tag == "message":
		c.handleMessage(device, node)
	case node.Tag == "receipt":
		c.srv.submitReceipt(device, node)
	case node.Tag == "ack":
		c.srv.settleAck(device, node)
	}
}

func (c *client) device() *Device {
	if a := c.attached.Load(); a != nil {
		return a.device
	}
	return nil
}

// answer queues a reply; a client that does not read its answers is cut.
func (c *client) answer(node Node) { c.enqueue(reply{node: node}) }

// goodbye ends the connection with a last stanza. Whatever the client sends from now on is ignored.
func (c *client) goodbye(node Node) {
	c.closing.Store(true)
	c.enqueue(reply{node: node, last: true})
}

// goodbyeAfterLogout is goodbye for a client that asked to be unlinked. whatsmeow hangs up when it has the answer; a
// stream error right behind the answer would make it delete its store twice at the same time.
func (c *client) goodbyeAfterLogout(node Node) {
	c.closing.Store(true)
	c.enqueue(reply{node: node, last: true, afterGrace: true})
}

func (c *client) enqueue(r reply) {
	r.due = c.due()
	select {
	case c.replies <- r:
	default:
		c.log.Warn("client does not read, cut", "action", "client_cut")
		c.link.Abort()
	}
}

// nudge tells the writer that the mailbox has more.
func (c *client) nudge() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// write sends until the connection ends.
func (c *client) write(ctx context.Context) {
	var position uint64
	caughtUp := false
	for {
		if !c.flush(ctx) {
			return
		}
		if a := c.attached.Load(); a != nil {
			if !caughtUp {
				caughtUp = true
				if !c.sendOffline(ctx, a, &position) {
					return
				}
				continue
			}
			if e, ok := a.device.next(c, position); ok {
				position = e.position + 1
				if !c.sendPending(ctx, e.node) {
					return
				}
				continue
			}
		}
		if !c.await(ctx) {
			return
		}
	}
}

// await waits for something to send.
func (c *client) await(ctx context.Context) bool {
	select {
	case r := <-c.replies:
		return c.sendReply(ctx, r)
	case <-c.wake:
		return true
	case <-ctx.Done():
		return false
	}
}

// flush sends the queued replies.
func (c *client) flush(ctx context.Context) bool {
	for {
		select {
		case r := <-c.replies:
			if !c.sendReply(ctx, r) {
				return false
			}
		default:
			return true
		}
	}
}

// sendPending sends a stanza of the mailbox, after the replies that were queued before it: the ack of a message goes
// out before the receipts that the message caused.
func (c *client) sendPending(ctx context.Context, node Node) bool {
	return c.flush(ctx) && c.send(ctx, node)
}

// sendReply returns false when nothing may follow.
func (c *client) sendReply(ctx context.Context, r reply) bool {
	if r.afterGrace && !c.grace(ctx) {
		return false
	}
	if !c.waitUntil(ctx, r.due) || !c.transmit(ctx, r) {
		return false
	}
	if r.last && c.grace(ctx) {
		c.link.Close()
	}
	return !r.last
}

// grace waits for the client to hang up; true if it did not.
func (c *client) grace(ctx context.Context) bool {
	timer := time.NewTimer(goodbyeGrace)
	defer timer.Stop()
	select {
	case <-c.gone:
	case <-ctx.Done():
	case <-timer.C:
		return true
	}
	return false
}

// waitUntil waits for the moment, if it is in the future.
func (c *client) waitUntil(ctx context.Context, moment time.Time) bool {
	wait := time.Until(moment)
	if moment.IsZero() || wait <= 0 {
		return true
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (c *client) send(ctx context.Context, node Node) bool { return c.transmit(ctx, reply{node: node}) }

func (c *client) transmit(ctx context.Context, r reply) bool {
	if !c.thaw(ctx) {
		return false
	}
	var err error
	if r.raw != nil {
		err = c.link.WritePlain(ctx, r.raw)
	} else {
		err = c.link.WriteNode(ctx, r.node)
	}
	if err != nil {
		c.log.Debug("write failed", "action", "write_failed", "tag", r.node.Tag, "error", err)
		return false
	}
	c.srv.stanzasOut.Add(1)
	return true
}

// sendOffline sends what was pending at login, in order, and then says that this was all: whatsmeow and Baileys both
// wait for `<ib><offline/></ib>`.
func (c *client) sendOffline(ctx context.Context, a *attachment, position *uint64) bool {
	offline := a.offline
	if offline.total > 0 && !c.sendPending(ctx, infoBroadcast(Node{Tag: "offline_preview", Attrs: Attrs{
		"count": offline.total, "message": offline.messages, "receipt": offline.receipts,
		"notification": offline.notifications, "appdata": 0,
	}})) {
		return false
	}
	sent := 0
	for {
		e, ok := a.device.next(c, *position)
		if !ok || e.position > offline.last {
			break
		}
		*position = e.position + 1
		if !c.sendPending(ctx, withAttr(e.node, "offline", sent)) {
			return false
		}
		sent++
	}
	return c.sendPending(ctx, infoBroadcast(Node{Tag: "offline", Attrs: Attrs{"count": sent}}))
}

func infoBroadcast(child Node) Node {
	return Node{Tag: "ib", Attrs: Attrs{"from": types.ServerJID}, Content: []Node{child}}
}

func streamError(code string, content ...Node) Node {
	n := Node{Tag: "stream:error", Attrs: Attrs{}}
	if code != "" {
		n.Attrs["code"] = code
	}
	if len(content) > 0 {
		n.Content = content
	}
	return n
}
