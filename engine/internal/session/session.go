// SPDX-License-Identifier: GPL-3.0-or-later

// Package session runs one generation of one session: a whatsmeow client on its own database, from open to a terminal event or a close.
//
// It decides nothing: it does not reconnect, retry or pace. Its rules come from measurements of whatsmeow (see docs/engine-protocol.md):
// a handler that fails cancels the context of the client before it returns, so that nothing is acknowledged behind the daemon's back.
package session

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/store"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/endpoint"
	"warren/engine/internal/frames"
	"warren/engine/internal/logs"
	"warren/engine/internal/state"
	"warren/engine/internal/waversion"
)

const (
	sendQueue       = 64
	historyQueue    = 16
	lifecycleQueue  = 32
	retryReceipts   = 1       // answered in parallel; whatsmeow's default has no bound
	walLimit        = 1 << 20 // bytes after which the write-ahead log is emptied
	checkpointEvery = time.Minute

	drainAtClose   = 5 * time.Second
	drainAfterDrop = 2 * time.Second
	settleBound    = time.Second
	recentReceipt  = 10 * time.Second
	barrierBound   = 2 * time.Second
	hangUpBound    = 2 * time.Second
	workersBound   = 3 * time.Second
	logoutBound    = 20 * time.Second
)

// Timing holds the durations that are part of the protocol.
type Timing struct {
	Answer      time.Duration // how long the daemon may take to answer an event; whatsmeow goes on without order after 300 s
	QRFirst     time.Duration
	QRNext      time.Duration
	PairRestart time.Duration // from pairing to WhatsApp's "restart required", which whatsmeow does not wait for
	ServerGrace time.Duration // from a 5xx refusal to the end of the connection
	DefaultSend time.Duration
	MaximumSend time.Duration

	ChangedIdentity time.Duration // between two "changed" events of these kinds
	ChangedOther    time.Duration

	Silence time.Duration // without a frame, after which the connection is reported
}

// DefaultTiming is what the protocol says.
func DefaultTiming() Timing {
	return Timing{
		Answer: 240 * time.Second, QRFirst: 60 * time.Second, QRNext: 20 * time.Second, PairRestart: 10 * time.Second,
		ServerGrace: 2 * time.Second, DefaultSend: 60 * time.Second, MaximumSend: 300 * time.Second,
		ChangedIdentity: 500 * time.Millisecond, ChangedOther: 5 * time.Second,
		Silence: silenceLimit,
	}
}

// Emitter sends events to the daemon. Event waits for room.
type Emitter interface {
	Event(ctx context.Context, event frames.Event) error
}

// Config is what all sessions of an engine share.
type Config struct {
	Out         Emitter
	Endpoint    *endpoint.Endpoint
	Log         *slog.Logger
	NextEventID func() int64
	Downloads   *semaphore.Weighted // bounds the histories in memory at one time, over all sessions
	WAVersion   *waversion.Keeper
	Timing      Timing
}

// Options of one generation.
type Options struct {
	Session    string
	Generation int64
	Dir        string
	Create     bool
	DeviceName string
	// PhoneNumber, digits in international form, pairs by code instead of by QR. A paired session ignores it.
	PhoneNumber string
	// MarkOnline shows the account as online to its contacts while the session is connected.
	MarkOnline bool
	Proxy      *url.URL // nil: none; from Endpoint.ParseProxy
}

// Session is one generation.
type Session struct {
	Options
	cfg *Config
	log *slog.Logger

	// base lives as long as the engine; ctx ends with the connection and is what whatsmeow acknowledges under.
	base   context.Context
	ctx    context.Context
	cancel context.CancelFunc

	version store.WAVersionContainer // of WhatsApp Web, that this generation claims to be

	store *state.Store
	cli   *whatsmeow.Client
	wire  *wire
	hand  *handoff

	inbox    chan any // to the loop
	sends    *sender
	history  chan *waE2E.HistorySyncNotification
	workers  sync.WaitGroup
	dialDone chan struct{}
	done     chan struct{}

	online      atomic.Bool
	offlineDone atomic.Bool
	loggingOut  atomic.Bool
	lastCode    atomic.Pointer[time.Time] // when the last QR code, or the pairing code, runs out

	endMu  sync.Mutex
	end    *ending
	ending chan struct{}

	// Of the loop.
	pairing        pairing
	historyStarted bool
	news           news // of the teardown, too, once the loop has ended
	pulse          pulse

	probing sync.Mutex
	probe   *ping // under way
}

// Open opens the session's directory. Nothing is connected before Run.
func Open(base context.Context, cfg *Config, options Options) (*Session, error) {
	s := &Session{
		Options: options, cfg: cfg, base: base,
		log:   cfg.Log.With(logs.KeySession, options.Session, logs.KeyGeneration, options.Generation),
		hand:  newHandoff(),
		inbox: make(chan any, lifecycleQueue), history: make(chan *waE2E.HistorySyncNotification, historyQueue),
		dialDone: make(chan struct{}), done: make(chan struct{}), ending: make(chan struct{}),
	}
	s.version, _ = cfg.WAVersion.Current()
	s.ctx, s.cancel = context.WithCancel(base)
	s.wire = &wire{onRefusal: func(code int) { s.post(refusal{code}) }}
	s.sends = newSender(s)
	log := logs.Whatsmeow(s.log, s.wire)
	opened, err := state.Open(base, options.Dir, state.Options{Create: options.Create, Log: log.Sub("Store"), OnDatabaseError: s.databaseFailed})
	if err != nil {
		s.cancel()
		return nil, err
	}
	s.store = opened
	s.cli = s.newClient(opened.Device)
	return s, nil
}

func (s *Session) newClient(device *store.Device) *whatsmeow.Client {
	cli := whatsmeow.NewClient(device, logs.Whatsmeow(s.log, s.wire))
	cli.BackgroundEventCtx = s.ctx
	cli.EnableAutoReconnect = false
	cli.DisableLoginAutoReconnect = true
	cli.SynchronousAck = true
	cli.EnableDecryptedEventBuffer = true
	cli.UseRetryMessageStore = true
	cli.ManualHistorySyncDownload = true
	cli.AutomaticMessageRerequestFromPhone = true
	cli.SendReportingTokens = true
	cli.SetMaxParallelRetryReceiptHandling(retryReceipts)
	// Without it a sender sees no second tick: receipts of a device that is not "available" do not count. It also holds when presence is "unavailable".
	cli.SetForceActiveDeliveryReceipts(true)
	// whatsmeow calls this without looking when WhatsApp refuses with 413 or 414.
	cli.RefreshCAT = func(context.Context) error { return errors.New("not a Messenger client") }
	cli.GetClientPayload = func() *waWa6.ClientPayload { return clientPayload(device, s.DeviceName, s.version) }
	cli.AddEventHandlerWithSuccessStatus(s.handle)
	s.cfg.Endpoint.Apply(cli, s.Proxy)
	return cli
}

// clientPayload is whatsmeow's, with this session's version, and its name for the phone's list of linked devices: whatsmeow has one of each for the whole process.
func clientPayload(device *store.Device, name string, version store.WAVersionContainer) *waWa6.ClientPayload {
	payload := device.GetClientPayload()
	waversion.Apply(payload, version)
	if payload.DevicePairingData == nil || name == "" {
		return payload
	}
	props := proto.CloneOf(store.DeviceProps)
	props.Os = proto.String(name)
	if encoded, err := proto.Marshal(props); err == nil {
		payload.DevicePairingData.DeviceProps = encoded
	}
	return payload
}

// Opened is the result of an open request.
type Opened struct {
	Paired bool   `json:"paired"`
	JID    string `json:"jid,omitempty"`
	LID    string `json:"lid,omitempty"`
}

// Opened tells what the directory held.
func (s *Session) Opened() Opened {
	if s.store.Device.ID == nil {
		return Opened{}
	}
	return Opened{Paired: true, JID: s.store.Device.ID.String(), LID: s.store.Device.LID.String()}
}

// Run connects, serves the session until it ends, closes everything, and sends the terminal event, if there is one.
func (s *Session) Run() {
	defer close(s.done)
	s.workers.Add(1)
	go s.guarded("sender", func() { defer s.workers.Done(); s.sends.run() })
	go s.guarded("connect", s.connect)
	s.guarded("loop", s.loop)
	end := s.currentEnding()
	s.guarded("teardown", func() { s.teardown(end) })
	if end.event != "" {
		s.emit(s.base, end.event, end.data)
	}
}

// Done is closed when the session's socket and database are closed and its last event is queued.
func (s *Session) Done() <-chan struct{} { return s.done }

// Answer settles the event that is with the daemon. It never blocks.
func (s *Session) Answer(id int64, ok bool) { s.hand.resolve(id, ok) }

// Close ends the session at the daemon's wish, waiting at most drain for its answer to the event it has. It reports false when the session was ending
// already: then its terminal event is on the way. It does not wait: see Done.
func (s *Session) Close(drain time.Duration) bool {
	return s.finish(&ending{drain: drain})
}

// DrainAtClose is how long an orderly Close waits for the daemon's answer.
const DrainAtClose = drainAtClose

// guarded keeps a panic of our own code inside the session.
func (s *Session) guarded(what string, fn func()) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in "+what, "panic", p, "stack", string(debug.Stack()))
			s.finish(internalEnding("a bug in the engine (%s): see its log", what))
		}
	}()
	fn()
}

// databaseFailed runs inside whatsmeow's decryption, before it decides what to tell WhatsApp.
func (s *Session) databaseFailed(err error) {
	s.log.Error("the database failed while a message was decrypted", logs.KeyError, err)
	s.finish(databaseEnding(err))
}

func (s *Session) connect() {
	defer close(s.dialDone)
	if err := s.cli.ConnectContext(s.ctx); err != nil && s.ctx.Err() == nil {
		s.finish(classifyConnect(err))
	}
}

// finish ends the session. The first ending wins; an abrupt one always stops whatsmeow from acknowledging, before it returns.
func (s *Session) finish(end *ending) bool {
	if end.abrupt {
		s.cancel()
	}
	s.endMu.Lock()
	defer s.endMu.Unlock()
	if s.end != nil {
		return false
	}
	s.end = end
	close(s.ending)
	return true
}

func (s *Session) currentEnding() *ending {
	s.endMu.Lock()
	defer s.endMu.Unlock()
	return s.end
}

// emit sends an event that nobody answers.
func (s *Session) emit(ctx context.Context, name string, data any) {
	err := s.cfg.Out.Event(ctx, frames.Event{Event: name, Session: s.Session, Generation: s.Generation, Data: data})
	if err != nil && ctx.Err() == nil {
		s.log.Error("an event could not be sent", "event", name, logs.KeyError, err)
	}
}

// teardown closes socket and database, in an order that neither loses nor repeats what the daemon has answered.
func (s *Session) teardown(end *ending) {
	s.online.Store(false)
	s.hand.drain(end.drain)
	if !end.abrupt && s.wire.waitSettled(settleBound, recentReceipt) && s.cli.IsConnected() {
		s.barrier()
	}
	s.hangUp()
	s.cancel()
	s.sends.close()
	if !waitFor(s.workers.Wait, workersBound) {
		s.log.Warn("a worker is still busy while the session closes")
	}
	if end.deleteDevice {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.base), workersBound)
		defer cancel()
		if err := s.store.DeleteDevice(ctx); err != nil {
			s.log.Error("the device row of an unlinked device stays", logs.KeyError, err)
		}
	}
	if err := s.store.Close(); err != nil {
		s.log.Warn("closing the database", logs.KeyError, err)
	}
	s.emitChange(s.base, s.store.LastChange())
	s.log.Info("session closed", "event", end.event)
}

// barrier makes one round trip, so that WhatsApp has every receipt written before it.
func (s *Session) barrier() {
	ctx, cancel := context.WithTimeout(s.ctx, barrierBound)
	defer cancel()
	//lint:ignore SA1019 whatsmeow has no public ping
	s.cli.DangerousInternals().SendKeepAlive(ctx)
}

// hangUp closes the socket. whatsmeow holds the lock that Disconnect needs while it dials, and a peer that is gone does not answer the closing handshake.
func (s *Session) hangUp() {
	select {
	case <-s.dialDone:
	default:
		s.cancel()
	}
	disconnect := func() {
		<-s.dialDone
		s.cli.Disconnect()
	}
	if waitFor(disconnect, hangUpBound) {
		return
	}
	s.cancel()
	s.log.Debug("the socket is slow to close")
}

// waitFor runs fn and waits for it at most bound.
func waitFor(fn func(), bound time.Duration) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn()
	}()
	select {
	case <-done:
		return true
	case <-time.After(bound):
		return false
	}
}

// Ending reports whether the generation is over or on its way out.
func (s *Session) Ending() bool {
	select {
	case <-s.ending:
		return true
	default:
		return false
	}
}
