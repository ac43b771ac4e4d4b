package control

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"warren/engine/internal/sim/server"
)

const (
	// maxFaultDelay is under the time whatsmeow waits for an answer: what is later is a freeze.
	maxFaultDelay = 70 * time.Second
	maxFaultLife  = 24 * time.Hour
	maxTimelock   = 365 * 24 * time.Hour
)

// defaultCodes are the codes of faults that have one.
var defaultCodes = map[server.FaultKind]int{
	server.FaultLogin: 503, server.FaultSend: 463, server.FaultQuery: 429, server.FaultPreKeys: 503,
}

// faultBody is a fault as it is asked for.
type faultBody struct {
	Kind    server.FaultKind
	Phone   string
	Device  uint16
	Code    int
	ExpireS int `json:"expire_s"`
	MS      int
	Stage   string
	XMLNS   string
	Of      string
	Empty   bool
	Count   *int
	Seconds float64
}

// faultAnswer is a fault in force.
type faultAnswer struct {
	ID     int              `json:"id"`
	Kind   server.FaultKind `json:"kind"`
	Phone  string           `json:"phone,omitempty"`
	Device uint16           `json:"device,omitempty"`
	// Left is how often it will still strike; null while it lasts.
	Left    *int `json:"left"`
	Strikes int  `json:"strikes"`
}

func (a *API) addFault(r *http.Request) (any, error) {
	var body faultBody
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	fault, err := a.fault(body)
	if err != nil {
		return nil, err
	}
	return map[string]any{"fault": a.srv.AddFault(fault)}, nil
}

// fault checks what was asked for.
func (a *API) fault(body faultBody) (server.Fault, error) {
	f := server.Fault{
		Kind: body.Kind, Device: body.Device, Code: body.Code, Expire: time.Duration(body.ExpireS) * time.Second,
		Delay: time.Duration(body.MS) * time.Millisecond, Stage: body.Stage, Namespace: body.XMLNS, Empty: body.Empty,
		Lasts: time.Duration(body.Seconds * float64(time.Second)),
	}
	if err := a.aim(&f, body); err != nil {
		return f, err
	}
	if f.Code == 0 {
		f.Code = defaultCodes[f.Kind]
	}
	if f.Lasts < 0 || f.Lasts > maxFaultLife || f.Code < 0 || f.Code > 999 || f.Expire < 0 {
		return f, badRequest("seconds: up to %d; code: three digits; expire_s: not negative", int(maxFaultLife/time.Second))
	}
	if err := shape(&f); err != nil {
		return f, err
	}
	return f, bound(&f, body.Count)
}

// aim finds whom the fault is about.
func (a *API) aim(f *server.Fault, body faultBody) error {
	if body.Phone != "" {
		p, err := a.byNumber(body.Phone, "unknown_phone")
		if err != nil {
			return err
		}
		f.Account = p.Account()
	} else if body.Device != 0 {
		return badRequest("a device needs its phone")
	}
	if body.Of != "" {
		p, err := a.byNumber(body.Of, "unknown_phone")
		if err != nil {
			return err
		}
		f.Of = p.Account()
	}
	return nil
}

// shape checks what only some kinds have.
func shape(f *server.Fault) error {
	switch f.Kind {
	case server.FaultLogin, server.FaultSend, server.FaultQuery, server.FaultPreKeys, server.FaultFreeze:
		return nil
	case server.FaultDelay:
		if f.Delay <= 0 || f.Delay > maxFaultDelay {
			return badRequest("ms: 1 to %d", maxFaultDelay/time.Millisecond)
		}
		return nil
	case server.FaultClose:
		return shapeClose(f)
	default:
		return badRequest("unknown kind %q", f.Kind)
	}
}

// shapeClose picks the stage: before the handshake the server does not know who is there.
func shapeClose(f *server.Fault) error {
	if f.Stage == "" {
		f.Stage = server.StageTCP
		if f.Account != nil {
			f.Stage = server.StageLogin
		}
	}
	switch {
	case f.Stage == server.StageLogin, f.Account == nil && (f.Stage == server.StageTCP || f.Stage == server.StageWebsocket):
		return nil
	case f.Stage == server.StageTCP || f.Stage == server.StageWebsocket:
		return badRequest("stage %s cannot be aimed at a phone", f.Stage)
	default:
		return badRequest("stage: tcp, websocket or login")
	}
}

// bound says when the fault ends by itself: a state (freeze, delay) after its seconds, anything else after one strike
// unless a count or a time is given.
func bound(f *server.Fault, count *int) error {
	state := f.Kind == server.FaultFreeze || f.Kind == server.FaultDelay
	switch {
	case state && count != nil:
		return badRequest("%s has no count", f.Kind)
	case count != nil && *count < 1:
		return badRequest("count: at least 1")
	case count != nil:
		f.Count = *count
	case !state && f.Lasts == 0:
		f.Count = 1
	}
	return nil
}

func (a *API) listFaults(*http.Request) (any, error) {
	list := []faultAnswer{}
	for _, f := range a.srv.Faults() {
		answer := faultAnswer{ID: f.ID, Kind: f.Kind, Device: f.Device, Strikes: f.Strikes}
		if f.Account != nil {
			answer.Phone = f.Account.Number
		}
		if f.Count > 0 {
			left := f.Count - f.Strikes
			answer.Left = &left
		}
		list = append(list, answer)
	}
	return map[string]any{"faults": list}, nil
}

func (a *API) liftFault(r *http.Request) (any, error) {
	id, err := strconv.Atoi(r.PathValue("fault"))
	if err != nil || !a.srv.LiftFault(id) {
		return nil, notFound("unknown_fault", "there is no fault %q in force", r.PathValue("fault"))
	}
	return empty{}, nil
}

func (a *API) liftFaults(*http.Request) (any, error) {
	for _, f := range a.srv.Faults() {
		a.srv.LiftFault(f.ID) // one that ended meanwhile is what was asked for
	}
	return empty{}, nil
}

// targets are the linked devices that the path names: one, or all of the phone.
func (a *API) targets(r *http.Request) ([]*server.Device, error) {
	if r.PathValue("device") != "" {
		d, err := a.device(r)
		return []*server.Device{d}, err
	}
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	return linked(p), nil
}

// strikeNow does something to every connection that the path names; none is a conflict.
func (a *API) strikeNow(r *http.Request, strike func(*server.Device) bool) (any, error) {
	devices, err := a.targets(r)
	if err != nil {
		return nil, err
	}
	struck := []uint16{}
	for _, d := range devices {
		if strike(d) {
			struck = append(struck, d.ID)
		}
	}
	if len(struck) == 0 {
		return nil, &apiError{http.StatusConflict, "not_connected", "no device is connected"}
	}
	return map[string]any{"devices": struck}, nil
}

func (a *API) streamError(r *http.Request) (any, error) {
	var body struct {
		Code     int
		Conflict string
	}
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.Code == 0 && body.Conflict == "" {
		return nil, badRequest("code or conflict is required")
	}
	code := ""
	if body.Code != 0 {
		code = fmt.Sprint(body.Code)
	}
	return a.strikeNow(r, func(d *server.Device) bool { return a.srv.StreamError(d, code, body.Conflict) })
}

func (a *API) failure(r *http.Request) (any, error) {
	var body struct {
		Code    int
		ExpireS int `json:"expire_s"`
	}
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.Code < 400 || body.Code > 999 || body.ExpireS < 0 {
		return nil, badRequest("code: 400 to 999; expire_s: not negative")
	}
	expire := time.Duration(body.ExpireS) * time.Second
	return a.strikeNow(r, func(d *server.Device) bool { return a.srv.Fail(d, body.Code, expire) })
}

func (a *API) malformed(r *http.Request) (any, error) {
	return a.strikeNow(r, a.srv.SendMalformed)
}

// timelock restricts an account, or lifts the restriction.
func (a *API) timelock(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	var body struct {
		Active  *bool
		Seconds float64
		Type    string
	}
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.Active == nil || body.Seconds < 0 || body.Seconds > maxTimelock.Seconds() {
		return nil, badRequest("active is required; seconds: up to %d", int(maxTimelock.Seconds()))
	}
	var until time.Time
	if body.Seconds > 0 {
		until = time.Now().Add(time.Duration(body.Seconds * float64(time.Second)))
	}
	return empty{}, a.srv.Timelock(p.Account(), *body.Active, until, body.Type)
}
