// Package control is the simulator's HTTP API: what a person does with a phone, and what a test wants to know. The
// contract is docs/simulator.md.
package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.mau.fi/whatsmeow/types"

	"warren/engine/internal/sim/phone"
	"warren/engine/internal/sim/random"
	"warren/engine/internal/sim/server"
)

const (
	maxBody = 4 << 20
	// maxCount bounds one send request; it also bounds how long the request may take.
	maxCount = 100_000
)

var numberPattern = regexp.MustCompile(`^[1-9][0-9]{4,14}$`)

// apiError is an error as the API answers it.
type apiError struct {
	status  int
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

func badRequest(format string, args ...any) error {
	return &apiError{http.StatusBadRequest, "bad_request", fmt.Sprintf(format, args...)}
}

func notFound(code, format string, args ...any) error {
	return &apiError{http.StatusNotFound, code, fmt.Sprintf(format, args...)}
}

// API is the control API's handler.
type API struct {
	srv    *server.Server
	random random.Source
	log    *slog.Logger
	mux    *http.ServeMux

	// patterns are all requests there are.
	patterns []string

	mu     sync.RWMutex
	phones map[string]*phone.Phone
	order  []string
}

// New creates the API of a server without phones.
func New(srv *server.Server, source random.Source, log *slog.Logger) *API {
	a := &API{srv: srv, random: source, log: log, mux: http.NewServeMux(), phones: map[string]*phone.Phone{}}
	a.handle("POST /phones", a.addPhone)
	a.handle("GET /phones", a.listPhones)
	a.handle("POST /phones/{number}/scan", a.scan)
	a.handle("POST /phones/{number}/pair-code", a.pairCode)
	a.handle("POST /phones/{number}/send", a.send)
	a.handle("POST /phones/{number}/read", a.read)
	a.handle("GET /phones/{number}/received", a.received)
	a.handle("GET /phones/{number}/sent", a.sent)
	a.handle("GET /phones/{number}/pending", a.pending)
	a.handle("POST /phones/{number}/devices/{device}/drop", a.drop)
	a.handle("POST /phones/{number}/devices/{device}/unlink", a.unlink)
	for _, scope := range []string{"POST /phones/{number}/", "POST /phones/{number}/devices/{device}/"} {
		a.handle(scope+"stream-error", a.streamError)
		a.handle(scope+"failure", a.failure)
		a.handle(scope+"malformed", a.malformed)
	}
	a.handle("POST /phones/{number}/timelock", a.timelock)
	a.handle("POST /faults", a.addFault)
	a.handle("GET /faults", a.listFaults)
	a.handle("DELETE /faults", a.liftFaults)
	a.handle("DELETE /faults/{fault}", a.liftFault)
	a.handle("POST /phones/{number}/settings", a.settings)
	a.handle("POST /groups", a.createGroup)
	a.handle("GET /groups", a.listGroups)
	a.handle("GET /stats", a.stats)
	return a
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	if _, pattern := a.mux.Handler(r); pattern == "" {
		a.write(w, nil, notFound("not_found", "no such request: %s %s", r.Method, r.URL.Path))
		return
	}
	a.mux.ServeHTTP(w, r)
}

type empty struct{}

func (a *API) handle(pattern string, fn func(*http.Request) (any, error)) {
	a.patterns = append(a.patterns, pattern)
	a.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		answer, err := fn(r)
		a.write(w, answer, err)
	})
}

func (a *API) write(w http.ResponseWriter, answer any, err error) {
	status := http.StatusOK
	if err != nil {
		known := &apiError{http.StatusInternalServerError, "internal", err.Error()}
		errors.As(err, &known)
		status, answer = known.status, map[string]any{"error": known}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		a.log.Debug("answer not written", "action", "answer_lost", "error", err)
	}
}

// decode reads a request's body.
func decode(r *http.Request, into any) error {
	decoder := json.NewDecoder(r.Body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return badRequest("body: %v", err)
	}
	return nil
}

// phone finds the phone that the path names.
func (a *API) phone(r *http.Request) (*phone.Phone, error) {
	return a.byNumber(r.PathValue("number"), "unknown_phone")
}

func (a *API) byNumber(number, code string) (*phone.Phone, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if p := a.phones[number]; p != nil {
		return p, nil
	}
	return nil, notFound(code, "there is no phone %q", number)
}

// device finds the linked device that the path names.
func (a *API) device(r *http.Request) (*server.Device, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	id, err := strconv.ParseUint(r.PathValue("device"), 10, 16)
	if err == nil && id > 0 {
		if d := p.Account().Device(uint16(id)); d != nil {
			return d, nil
		}
	}
	return nil, notFound("unknown_device", "the phone has no linked device %q", r.PathValue("device"))
}

type phoneAnswer struct {
	Number string `json:"number"`
	JID    string `json:"jid"`
	LID    string `json:"lid"`
}

func describe(p *phone.Phone) phoneAnswer {
	account := p.Account()
	return phoneAnswer{account.Number, account.JID().String(), account.LIDJID().String()}
}

func (a *API) addPhone(r *http.Request) (any, error) {
	var body struct{ Number, Name string }
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	p, err := a.AddPhone(body.Number, body.Name)
	if err != nil {
		return nil, err
	}
	return describe(p), nil
}

// AddPhone creates an account with its phone.
func (a *API) AddPhone(number, name string) (*phone.Phone, error) {
	// Clients take some numbers for WhatsApp's own bots and send to them without encryption.
	if !numberPattern.MatchString(number) || types.NewJID(number, types.DefaultUserServer).IsBot() {
		return nil, badRequest("number: 5 to 15 digits, not beginning with 0, and no bot's")
	}
	p, err := phone.New(a.srv, number, name, a.random, a.log)
	if errors.Is(err, server.ErrAccountExists) {
		return nil, &apiError{http.StatusConflict, "phone_exists", fmt.Sprintf("there is a phone %q already", number)}
	} else if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.phones[number] = p
	a.order = append(a.order, number)
	return p, nil
}

func (a *API) listPhones(*http.Request) (any, error) {
	type device struct {
		ID        int  `json:"id"`
		Connected bool `json:"connected"`
	}
	type item struct {
		phoneAnswer
		Name    string   `json:"name"`
		Devices []device `json:"devices"`
	}
	a.mu.RLock()
	order := slices.Clone(a.order)
	a.mu.RUnlock()
	items := []item{}
	for _, number := range order {
		p, err := a.byNumber(number, "unknown_phone")
		if err != nil {
			return nil, err
		}
		entry := item{phoneAnswer: describe(p), Name: p.Account().Name, Devices: []device{}}
		for _, d := range linked(p) {
			entry.Devices = append(entry.Devices, device{int(d.ID), d.Connected()})
		}
		items = append(items, entry)
	}
	return map[string]any{"phones": items}, nil
}

// linked are a phone's linked devices: without the phone itself.
func linked(p *phone.Phone) []*server.Device {
	return slices.DeleteFunc(p.Account().Devices(), func(d *server.Device) bool { return d.ID == 0 })
}

func (a *API) scan(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	var body struct{ QR string }
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	return paired(p.Scan(r.Context(), strings.TrimSpace(body.QR)))
}

func (a *API) pairCode(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	var body struct{ Code string }
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	return paired(p.EnterCode(r.Context(), body.Code))
}

func paired(device *server.Device, err error) (any, error) {
	switch {
	case errors.Is(err, phone.ErrBadQR), errors.Is(err, phone.ErrBadCode):
		return nil, badRequest("%v", err)
	case errors.Is(err, server.ErrUnknownQR):
		return nil, notFound("unknown_qr", "%v (expired)", err)
	case errors.Is(err, server.ErrUnknownCode):
		return nil, notFound("unknown_code", "%v by a code", err)
	case errors.Is(err, phone.ErrWrongCode):
		return nil, &apiError{http.StatusConflict, "wrong_code", err.Error()}
	case errors.Is(err, server.ErrPairingFailed):
		return nil, &apiError{http.StatusConflict, "pairing_failed", err.Error()}
	case err != nil:
		return nil, err
	}
	return map[string]any{"device": device.ID}, nil
}

func (a *API) send(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	body := struct {
		To, Text, Kind string
		Count          *int
	}{Kind: "text"}
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	to, err := a.recipient(p, body.To)
	if err != nil {
		return nil, err
	}
	if body.Kind != "text" || body.Text == "" {
		return nil, badRequest("kind must be text, and text must not be empty")
	}
	if body.Count != nil && (*body.Count < 1 || *body.Count > maxCount) {
		return nil, badRequest("count: 1 to %d", maxCount)
	}
	ids, err := sendAll(r, to, texts(body.Text, body.Count))
	if err != nil {
		return nil, err
	}
	return map[string]any{"message_ids": ids}, nil
}

// texts are `<text>` alone, or `<text> 1` … `<text> n`.
func texts(text string, count *int) []string {
	if count == nil || *count == 1 {
		return []string{text}
	}
	list := make([]string, *count)
	for i := range list {
		list[i] = fmt.Sprintf("%s %d", text, i+1)
	}
	return list
}

// sendAll stops when the caller has gone.
func sendAll(r *http.Request, send func(string) (string, error), list []string) ([]string, error) {
	ids := make([]string, 0, len(list))
	for _, text := range list {
		if err := r.Context().Err(); err != nil {
			return nil, err
		}
		id, err := send(text)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func (a *API) read(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	var body struct {
		From       string
		MessageIDs []string `json:"message_ids"`
	}
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	from, err := a.byNumber(body.From, "unknown_sender")
	if err != nil {
		return nil, err
	}
	if len(body.MessageIDs) == 0 {
		return nil, badRequest("message_ids must not be empty")
	}
	p.Read(from.Account(), body.MessageIDs)
	return empty{}, nil
}

func (a *API) received(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	after := 0
	if text := r.URL.Query().Get("after"); text != "" {
		if after, err = strconv.Atoi(text); err != nil {
			return nil, badRequest("after: %v", err)
		}
	}
	return p.Received(r.URL.Query().Get("from"), after), nil
}

func (a *API) sent(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	return map[string]any{"messages": p.Sent(r.URL.Query().Get("to"))}, nil
}

func (a *API) pending(r *http.Request) (any, error) {
	p, err := a.phone(r)
	if err != nil {
		return nil, err
	}
	type device struct {
		ID      int `json:"id"`
		Pending int `json:"pending"`
	}
	devices := []device{}
	for _, d := range linked(p) {
		devices = append(devices, device{int(d.ID), d.Pending()})
	}
	return map[string]any{"devices": devices}, nil
}

func (a *API) drop(r *http.Request) (any, error) {
	d, err := a.device(r)
	if err != nil {
		return nil, err
	}
	if !a.srv.Drop(d) {
		return nil, &apiError{http.StatusConflict, "not_connected", "the device is not connected"}
	}
	return empty{}, nil
}

func (a *API) unlink(r *http.Request) (any, error) {
	d, err := a.device(r)
	if err != nil {
		return nil, err
	}
	if !a.srv.Unlink(d) {
		return nil, notFound("unknown_device", "the device is unlinked already")
	}
	return empty{}, nil
}

func (a *API) stats(*http.Request) (any, error) {
	return struct {
		server.Stats
		Goroutines int `json:"goroutines"`
	}{a.srv.Stats(), runtime.NumGoroutine()}, nil
}
