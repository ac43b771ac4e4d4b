package server

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// FaultKind says what a fault does.
type FaultKind string

// Kinds of faults that wait for their occasion. What happens to a connection at once is in actions.go.
const (
	// FaultLogin answers a login, or a client that wants to be paired, with `<failure reason=Code/>`.
	FaultLogin FaultKind = "login_failure"
	// FaultSend acks a message with an error and delivers nothing (463: the account may not open this chat).
	FaultSend FaultKind = "send_error"
	// FaultQuery answers a query with an error (429: rate-overlimit).
	FaultQuery FaultKind = "iq_error"
	// FaultPreKeys makes a pre-key fetch fail: the query with an error, or, with Empty, the keys are left out of the answer.
	FaultPreKeys FaultKind = "prekeys"
	// FaultFreeze makes zombies: connections stay open, nothing is answered, and what the client says is lost.
	FaultFreeze FaultKind = "freeze"
	// FaultDelay makes answers late.
	FaultDelay FaultKind = "delay"
	// FaultClose accepts a connection and closes it at a Stage.
	FaultClose FaultKind = "accept_close"
)

// Stages at which FaultClose closes.
const (
	StageTCP       = "tcp"       // before TLS
	StageWebsocket = "websocket" // before the Noise handshake
	StageLogin     = "login"     // when the client has said who it is
)

// Fault is something that goes wrong on demand.
type Fault struct {
	Kind FaultKind
	// Account and Device are whom it concerns; nil and 0 mean all, pairing clients included.
	Account *Account
	Device  uint16
	// Code is the error's; Expire the end of a temporary ban (402).
	Code   int
	Expire time.Duration
	Delay  time.Duration
	Stage  string
	// Namespace restricts FaultQuery; "" is every query. Of restricts FaultPreKeys to one account's keys.
	Namespace string
	Of        *Account
	Empty     bool
	// Count is how often it strikes before it ends; 0 means until it is lifted. Lasts ends it too; 0 means never.
	Count int
	Lasts time.Duration
}

// FaultState is a fault in force.
type FaultState struct {
	ID int
	Fault
	Strikes int
}

// activeFault is a fault in force; done is closed at its end.
type activeFault struct {
	FaultState
	done  chan struct{}
	timer *time.Timer
}

// faults are those in force, in order of their making: the first that fits strikes.
type faults struct {
	mu     sync.Mutex
	list   []*activeFault
	lastID int
}

// AddFault puts a fault in force and returns its number.
func (s *Server) AddFault(f Fault) int {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.lastID++
	active := &activeFault{FaultState: FaultState{ID: s.faults.lastID, Fault: f}, done: make(chan struct{})}
	if f.Lasts > 0 {
		active.timer = time.AfterFunc(f.Lasts, func() { s.LiftFault(active.ID) })
	}
	s.faults.list = append(s.faults.list, active)
	return active.ID
}

// LiftFault ends a fault; false if it has ended already.
func (s *Server) LiftFault(id int) bool {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	i := slices.IndexFunc(s.faults.list, func(f *activeFault) bool { return f.ID == id })
	if i < 0 {
		return false
	}
	s.faults.end(i)
	return true
}

// Faults are those in force.
func (s *Server) Faults() []FaultState {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	list := make([]FaultState, len(s.faults.list))
	for i, f := range s.faults.list {
		list[i] = f.FaultState
	}
	return list
}

// end is called with the lock held.
func (f *faults) end(i int) {
	gone := f.list[i]
	f.list = slices.Delete(f.list, i, i+1)
	close(gone.done)
	if gone.timer != nil {
		gone.timer.Stop()
	}
}

// strike finds the first fault of a kind that concerns a device and fits, and counts; ok is false if there is none.
func (f *faults) strike(kind FaultKind, d *Device, fits func(*Fault) bool) (struck Fault, done <-chan struct{}, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, active := range f.list {
		if active.Kind != kind || !active.concerns(d) || (fits != nil && !fits(&active.Fault)) {
			continue
		}
		active.Strikes++
		if active.Count > 0 && active.Strikes >= active.Count {
			f.end(i)
		}
		return active.Fault, active.done, true
	}
	return Fault{}, nil, false
}

// concerns tells whether a fault is about a device; nil is a client that is not one yet.
func (f *Fault) concerns(d *Device) bool {
	if f.Account == nil {
		return true
	}
	return d != nil && d.Account == f.Account && (f.Device == 0 || d.ID == f.Device)
}

func atStage(stage string) func(*Fault) bool {
	return func(f *Fault) bool { return f.Stage == stage }
}

// RefusesTCP tells whether a connection that was just accepted is to be closed at once.
func (s *Server) RefusesTCP() bool {
	_, _, refused := s.faults.strike(FaultClose, nil, atStage(StageTCP))
	return refused
}

// frozen is the end of the fault that freezes this client, or nil.
func (c *client) frozen() <-chan struct{} {
	_, done, _ := c.srv.faults.strike(FaultFreeze, c.who.Load(), nil)
	return done
}

// thaw waits while the client is frozen; false when the connection ended meanwhile.
func (c *client) thaw(ctx context.Context) bool {
	for {
		done := c.frozen()
		if done == nil {
			return true
		}
		select {
		case <-done:
		case <-ctx.Done():
			return false
		}
	}
}

// due is when an answer may go out.
func (c *client) due() time.Time {
	if f, _, ok := c.srv.faults.strike(FaultDelay, c.who.Load(), nil); ok {
		return time.Now().Add(f.Delay)
	}
	return time.Time{}
}

// queryFault is the error that a query is answered with instead of its result, if any.
func (c *client) queryFault(device *Device, namespace string, child *Node) *iqError {
	f, _, ok := c.srv.faults.strike(FaultQuery, device, func(f *Fault) bool {
		return f.Namespace == "" || f.Namespace == namespace
	})
	if !ok && namespace == "encrypt" && child.Tag == "key" {
		f, _, ok = c.srv.faults.strike(FaultPreKeys, device, func(f *Fault) bool {
			return !f.Empty && (f.Of == nil || slices.ContainsFunc(child.GetChildrenByTag("user"), func(user Node) bool {
				return c.srv.Account(AttrJID(&user, "jid")) == f.Of
			}))
		})
	}
	if !ok {
		return nil
	}
	return &iqError{f.Code, iqErrorText(f.Code)}
}

// withoutKeys tells whether an account's keys are left out of the answer to one fetch.
func (c *client) withoutKeys(device *Device) func(*Account) bool {
	f, _, ok := c.srv.faults.strike(FaultPreKeys, device, func(f *Fault) bool { return f.Empty })
	return func(account *Account) bool { return ok && (f.Of == nil || f.Of == account) }
}

// iqErrorText is WhatsApp's word for a code (whatsmeow errors.go).
func iqErrorText(code int) string {
	texts := map[int]string{
		400: "bad-request", 401: "not-authorized", 403: "forbidden", 404: "item-not-found", 405: "not-allowed",
		406: "not-acceptable", 410: "gone", 419: "resource-limit", 423: "locked", 429: "rate-overlimit",
		500: "internal-server-error", 503: "service-unavailable", 530: "partial-server-error",
	}
	if text, ok := texts[code]; ok {
		return text
	}
	return "error"
}

// errFaultClose ends a connection that a fault closes.
var errFaultClose = errors.New("closed by a fault")
