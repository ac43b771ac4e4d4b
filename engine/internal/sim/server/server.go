// Package server is the WhatsApp server of the simulator: accounts, linked devices, pairing, login, routing. It moves
// ciphertext and never sees a text.
//
// Locks are small and never held over a network write, over cryptography or over a call into a Sink: the directory's,
// one per account (its device list), one per device (its mailbox), one per key ring.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"go.mau.fi/whatsmeow/types"

	"warren/engine/internal/sim/link"
	"warren/engine/internal/sim/noise"
	"warren/engine/internal/sim/random"
)

// lidBase makes LIDs as long as real ones; an account's LID is the base plus its number in order of creation.
const lidBase = 100_000_000_000_000

// ErrAccountExists is returned for a number that is taken.
var ErrAccountExists = errors.New("the number has an account already")

// Stats are counters since the start, except Connections, which is now.
type Stats struct {
	Connections int64 `json:"connections"`
	Logins      int64 `json:"logins"`
	StanzasIn   int64 `json:"stanzas_in"`
	StanzasOut  int64 `json:"stanzas_out"`
}

// Server is a WhatsApp server.
type Server struct {
	log          *slog.Logger
	identity     *noise.Identity
	writeTimeout time.Duration

	connections, logins, stanzasIn, stanzasOut atomic.Int64
	ids                                        atomic.Uint64
	faults                                     faults

	mu       sync.RWMutex
	byNumber map[string]*Account
	byLID    map[string]*Account
	groups   map[string]*Group
	closed   bool
	// refs are the QR references on show, each with the client that shows it.
	refs map[string]*client
	// codes are the wishes to be linked by a code, by number.
	codes map[string]*CodeOffer
	// random makes the references.
	random *random.Stream

	// ctx ends with Close; clients end with it.
	ctx     context.Context //nolint:containedctx // the server's own life, not a call's
	cancel  context.CancelFunc
	clients sync.WaitGroup
}

// New creates a server without accounts. A client that does not take a stanza within writeTimeout is cut; what it did
// not receipt stays pending.
func New(identity *noise.Identity, writeTimeout time.Duration, source random.Source, log *slog.Logger) *Server {
	s := &Server{
		log: log, identity: identity, writeTimeout: writeTimeout,
		byNumber: map[string]*Account{}, byLID: map[string]*Account{}, groups: map[string]*Group{}, refs: map[string]*client{},
		codes: map[string]*CodeOffer{}, random: source.Stream("server"),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Close cuts all connections and waits until they have ended.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.clients.Wait()
}

// enter counts a connection that is being served, unless the server is closing.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.clients.Add(1)
	return true
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	return Stats{s.connections.Load(), s.logins.Load(), s.stanzasIn.Load(), s.stanzasOut.Load()}
}

// AddAccount creates an account. NewSink gets the primary device before anybody else can reach it.
func (s *Server) AddAccount(number, name string, registration Registration, newSink func(*Device) Sink) (*Account, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byNumber[number] != nil {
		return nil, ErrAccountExists
	}
	account := newAccount(number, strconv.Itoa(lidBase+len(s.byNumber)+1), name)
	account.primary.keys.register(registration)
	account.primary.sink = newSink(account.primary)
	s.byNumber[number], s.byLID[account.LID] = account, account
	return account, nil
}

// Account finds an account by an address of either kind, with or without a device part; nil if there is none.
func (s *Server) Account(jid types.JID) *Account {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch jid.Server {
	case types.DefaultUserServer, types.LegacyUserServer:
		return s.byNumber[jid.User]
	case types.HiddenUserServer:
		return s.byLID[jid.User]
	default:
		return nil
	}
}

// device finds a device by its address.
func (s *Server) device(jid types.JID) *Device {
	account := s.Account(jid)
	if account == nil {
		return nil
	}
	return account.Device(jid.Device)
}

// TakeBundle uses up one of the device's one-time keys and tells the device when it runs short.
func (s *Server) TakeBundle(d *Device) Bundle {
	bundle, left, low := d.keys.take()
	if low {
		s.notify(d, types.ServerJID, "encrypt", Node{Tag: "count", Attrs: Attrs{"value": left}})
	}
	return bundle
}

// UploadKeys adds to a device's one-time keys.
func (s *Server) UploadKeys(d *Device, keys []OneTimeKey) { d.keys.upload(keys) }

// Unlink removes a linked device: its connection ends with device_removed, or its next login fails with 401. False if
// it is not linked.
func (s *Server) Unlink(d *Device) bool { return s.unlink(d, (*client).goodbye) }

func (s *Server) unlink(d *Device, goodbye func(*client, Node)) bool {
	change, ok := d.Account.remove(d)
	if !ok {
		return false
	}
	if client := d.markRemoved(); client != nil {
		goodbye(client, streamError("401", Node{Tag: "conflict", Attrs: Attrs{"type": "device_removed"}}))
	}
	s.announce(change)
	return true
}

// Drop cuts a linked device's connection without a goodbye; false if it has none. The device is offline on return.
func (s *Server) Drop(d *Device) bool {
	client := d.connection()
	if client == nil {
		return false
	}
	client.link.Abort()
	d.detach(client)
	return true
}

// notify sends a notification that stays pending until the client acks it.
func (s *Server) notify(d *Device, from types.JID, kind string, content ...Node) {
	id := s.nextID()
	d.deliver(Node{Tag: "notification", Attrs: Attrs{
		"from": from, "type": kind, "id": id, "t": time.Now().Unix(),
	}, Content: content}, settleKey{class: "notification", id: id, peer: s.peerKey(from)})
}

// peerOf is who a stanza came from: in a group, its participant there.
func (s *Server) peerOf(chat, participant types.JID) string {
	if chat.Server == types.GroupServer && !participant.IsEmpty() {
		return chat.String() + "/" + s.peerKey(participant)
	}
	return s.peerKey(chat)
}

// announce tells everybody who knows the device list that it changed.
func (s *Server) announce(c deviceChange) {
	for _, w := range c.watchers {
		hash := c.pnHash
		if w.lidMode {
			hash = c.lidHash
		}
		s.notify(w.device, c.device.Account.Address(w.lidMode), "devices", Node{
			Tag: c.verb, Attrs: Attrs{"device_hash": hash},
			Content: []Node{{Tag: "device", Attrs: Attrs{"jid": c.device.Address(w.lidMode), "key-index": c.device.KeyIndex}}},
		})
	}
}

// peerKey is who a stanza came from, whichever address was used.
func (s *Server) peerKey(jid types.JID) string {
	if account := s.Account(jid); account != nil {
		return account.Number
	}
	return jid.ToNonAD().String()
}

func (s *Server) nextID() string { return fmt.Sprintf("sim-%d", s.ids.Add(1)) }

type rawConnKey struct{}

// ConnContext keeps the connection under a request reachable, for http.Server.ConnContext: only it can be cut without a
// goodbye.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, rawConnKey{}, conn)
}

// ServeHTTP is WhatsApp's websocket endpoint; it returns when the client has gone.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	raw, ok := r.Context().Value(rawConnKey{}).(net.Conn)
	if !ok || !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		http.NotFound(w, r)
		return
	}
	if !s.enter() {
		http.Error(w, "closing", http.StatusServiceUnavailable)
		return
	}
	defer s.clients.Done()
	// The Origin is WhatsApp's web page's, the host this one's: there is nothing to compare.
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		s.log.Debug("websocket refused", "action", "websocket_refused", "error", err)
		return
	}
	if _, _, closed := s.faults.strike(FaultClose, nil, atStage(StageWebsocket)); closed {
		_ = ws.CloseNow() // the fault is that nothing is said
		return
	}
	conn, err := link.Accept(s.ctx, ws, raw, s.identity, s.writeTimeout)
	if err != nil {
		s.log.Info("handshake failed", "action", "handshake_failed", "error", err)
		_ = ws.CloseNow() // nothing was agreed on, so there is nothing to say
		return
	}
	s.connections.Add(1)
	defer s.connections.Add(-1)
	newClient(s, conn).run()
}
