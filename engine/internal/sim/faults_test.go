package sim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
)

// fault puts a fault in force and returns its path.
func (w *world) fault(body map[string]any) string {
	w.Helper()
	var answer struct{ Fault json.Number }
	w.must("POST", "/faults", body, &answer)
	return "/faults/" + answer.Fault.String()
}

func (w *world) lift(path string) {
	w.Helper()
	w.must("DELETE", path, nil, nil)
}

func (w *world) faults() int {
	w.Helper()
	var answer struct{ Faults []map[string]any }
	w.must("GET", "/faults", nil, &answer)
	return len(answer.Faults)
}

func (c *client) trySay(to, text string) error {
	_, err := c.SendMessage(c.t.Context(), types.NewJID(to, types.DefaultUserServer), &waE2E.Message{Conversation: proto.String(text)})
	return err
}

// TestLoginFailures refuses a login once in every way; the next one succeeds unless the client has deleted its store.
func TestLoginFailures(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.link(t, ana)
	for _, failing := range []struct {
		body  map[string]any
		check func(*client)
	}{
		{map[string]any{"code": 402, "expire_s": 3600}, func(c *client) {
			if ban := expect[*events.TemporaryBan](c); ban.Expire != time.Hour || ban.Code == 0 {
				t.Errorf("%+v", ban)
			}
		}},
		{map[string]any{"code": 405}, func(c *client) { expect[*events.ClientOutdated](c) }},
		{map[string]any{"code": 409}, func(c *client) {
			if f := expect[*events.ConnectFailure](c); f.Reason != 409 {
				t.Errorf("%+v", f)
			}
		}},
		{map[string]any{}, func(c *client) { expect[*events.Disconnected](c) }}, // 503
		{map[string]any{"code": 403}, func(c *client) {
			if out := expect[*events.LoggedOut](c); !out.OnConnect || out.Reason != events.ConnectFailureMainDeviceGone {
				t.Errorf("%+v", out)
			}
		}},
	} {
		failing.body["kind"], failing.body["phone"] = "login_failure", ana
		w.fault(failing.body)
		c = c.again().connect()
		failing.check(c)
		if n := w.faults(); n != 0 {
			t.Fatalf("%v: %d faults in force after the one strike", failing.body, n)
		}
	}
	w.fault(map[string]any{"kind": "login_failure", "code": 405, "count": 2})
	for range 2 {
		pairing := w.open(t, filepath.Join(t.TempDir(), "client.db")).connect()
		expect[*events.ClientOutdated](pairing)
	}
	w.link(t, ana)
}

// TestStreamErrors ends connections that are up.
func TestStreamErrors(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c, other := w.link(t, ana), w.link(t, bob)
	end := func(path string, body map[string]any) {
		t.Helper()
		w.must("POST", "/phones/"+ana+path, body, nil)
	}
	online := func() {
		t.Helper()
		c = c.again().connect()
		expect[*events.Connected](c)
	}
	end("/devices/1/stream-error", map[string]any{"conflict": "replaced"})
	expect[*events.StreamReplaced](c)
	online()
	end("/stream-error", map[string]any{"code": 503})
	expect[*events.Disconnected](c)
	online()
	c.DisableLoginAutoReconnect = true
	end("/devices/1/stream-error", map[string]any{"code": 515})
	expect[*events.ManualLoginReconnect](c)
	online()
	end("/stream-error", map[string]any{"code": 500})
	if e := expect[*events.StreamError](c); e.Code != "500" {
		t.Fatalf("%+v", e)
	}
	online()
	end("/devices/1/failure", map[string]any{"code": 402, "expire_s": 60})
	if ban := expect[*events.TemporaryBan](c); ban.Expire != time.Minute {
		t.Fatalf("%+v", ban)
	}
	online()
	end("/failure", map[string]any{"code": 405})
	expect[*events.ClientOutdated](c)
	online()
	end("/devices/1/failure", map[string]any{"code": 401})
	if out := expect[*events.LoggedOut](c); out.Reason != events.ConnectFailureLoggedOut {
		t.Fatalf("%+v", out)
	}
	until(t, "connection closed", func() bool { return w.connections() == 1 })
	if status := w.call("POST", "/phones/"+ana+"/stream-error", map[string]any{"code": 503}, nil); status != http.StatusConflict {
		t.Fatalf("status %d", status)
	}
	if !other.IsConnected() {
		t.Fatal("the other account's connection ended")
	}
}

// TestSendErrors refuses one message with 463, and one device query with 429.
func TestSendErrors(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c := w.link(t, ana)
	w.fault(map[string]any{"kind": "iq_error", "phone": ana, "xmlns": "usync"})
	if err := c.trySay(bob, "too fast"); !errors.Is(err, whatsmeow.ErrIQRateOverLimit) {
		t.Fatalf("%v", err)
	}
	w.fault(map[string]any{"kind": "send_error", "phone": ana, "device": 1})
	if err := c.trySay(bob, "refused"); !errors.Is(err, whatsmeow.ErrServerReturnedError) || !strings.Contains(err.Error(), "463") {
		t.Fatalf("%v", err)
	}
	c.receipt(c.say(bob, "accepted", ""), types.ReceiptTypeDelivered)
	if r := w.received(bob, ""); len(r.Shown) != 1 || r.Shown[0].Text != "accepted" {
		t.Fatalf("%+v", r)
	}
}

// TestPreKeyFaults makes pre-key fetches fail: whatsmeow then sends without a ciphertext for the recipient.
func TestPreKeyFaults(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c := w.link(t, ana)
	for _, body := range []map[string]any{{"of": bob}, {"empty": true, "of": bob}, {"empty": true}, {"code": 500}} {
		body["kind"], body["phone"] = "prekeys", ana
		w.fault(body)
		if err := c.trySay(bob, "goes nowhere"); err != nil {
			t.Fatalf("%v: %v", body, err)
		}
		if n := w.faults(); n != 0 {
			t.Fatalf("%v: it did not strike", body)
		}
	}
	if r := w.received(bob, ""); r.Stanzas != 0 {
		t.Fatalf("%+v", r)
	}
	c.receipt(c.say(bob, "arrives", ""), types.ReceiptTypeDelivered)
}

// TestFreeze makes a zombie of a connection, and then of a login.
func TestFreeze(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c, other := w.link(t, ana), w.link(t, bob)
	path := w.fault(map[string]any{"kind": "freeze", "phone": ana})
	id := w.send(bob, ana, "while frozen", 1)[0]
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.SendMessage(ctx, types.NewJID(bob, types.DefaultUserServer), &waE2E.Message{Conversation: proto.String("x")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	if n := len(c.messages); n != 0 || !c.IsConnected() || !w.devices(ana)[0].Connected {
		t.Fatalf("%d messages, connected %v", n, c.IsConnected())
	}
	other.message() // the copy of what its phone sent
	w.lift(path)
	if m := c.message(); m.Info.ID != id {
		t.Fatalf("%v", m)
	}
	w.fault(map[string]any{"kind": "freeze", "phone": ana, "seconds": 0.2})
	c = c.again().connect()
	until(t, "the end of the fault", func() bool { return w.faults() == 0 })
	select {
	case event := <-c.events:
		t.Fatalf("a connection that logged in while frozen got %T", event)
	case <-time.After(100 * time.Millisecond):
	}
	c = c.again().connect()
	expect[*events.Connected](c)
}

func TestSlowAnswers(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c := w.link(t, ana)
	path := w.fault(map[string]any{"kind": "delay", "phone": ana, "ms": 250})
	start := time.Now()
	if _, err := c.GetBlocklist(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 250*time.Millisecond {
		t.Fatalf("answered after %v", took)
	}
	w.lift(path)
	c.receipt(c.say(bob, "fast again", ""), types.ReceiptTypeDelivered)
}

func TestAcceptAndClose(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c := w.link(t, ana)
	w.fault(map[string]any{"kind": "accept_close", "count": 2})
	c = c.again()
	for range 2 {
		if err := c.Connect(); err == nil {
			t.Fatal("connected")
		}
	}
	// whatsmeow's Connect notices a close during the handshake only after 20 s, so this is a bare websocket.
	w.fault(map[string]any{"kind": "accept_close", "stage": "websocket"})
	ws, response, err := websocket.Dial(t.Context(), w.sim.Endpoint(), &websocket.DialOptions{HTTPClient: w.dial})
	if err != nil || response.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v", err)
	}
	if _, _, err := ws.Read(t.Context()); err == nil {
		t.Fatal("the websocket is open")
	}
	// whatsmeow has a data race with a server that closes before its first stanza (socket/framesocket.go, OnDisconnect): a
	// client of our own stands in, and only until the end of the handshake.
	login, err := proto.Marshal(&waWa6.ClientPayload{Username: proto.Uint64(15550001), Device: proto.Uint32(1)})
	if err != nil {
		t.Fatal(err)
	}
	w.fault(map[string]any{"kind": "accept_close", "phone": bob})
	path := w.fault(map[string]any{"kind": "accept_close", "phone": ana, "count": 2})
	fs, _ := w.shakeHands(login)
	until(t, "the close", func() bool { return !fs.IsConnected() })
	if n := w.faults(); n != 2 {
		t.Fatalf("%d faults left", n)
	}
	w.lift(path)
	c = c.again().connect()
	expect[*events.Connected](c)
}

func TestFaultRequests(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	for _, c := range []struct {
		method, path string
		body         map[string]any
		status       int
	}{
		{"POST", "/faults", map[string]any{"kind": "nothing"}, http.StatusBadRequest},
		{"POST", "/faults", map[string]any{"kind": "freeze", "count": 1}, http.StatusBadRequest},
		{"POST", "/faults", map[string]any{"kind": "delay"}, http.StatusBadRequest},
		{"POST", "/faults", map[string]any{"kind": "send_error", "count": 0}, http.StatusBadRequest},
		{"POST", "/faults", map[string]any{"kind": "send_error", "device": 1}, http.StatusBadRequest},
		{"POST", "/faults", map[string]any{"kind": "send_error", "seconds": -1}, http.StatusBadRequest},
		{"POST", "/faults", map[string]any{"kind": "send_error", "phone": "15559999"}, http.StatusNotFound},
		{"POST", "/faults", map[string]any{"kind": "prekeys", "of": "15559999"}, http.StatusNotFound},
		{"POST", "/faults", map[string]any{"kind": "accept_close", "stage": "tcp", "phone": ana}, http.StatusBadRequest},
		{"POST", "/faults", map[string]any{"kind": "accept_close", "stage": "late"}, http.StatusBadRequest},
		{"DELETE", "/faults/99", nil, http.StatusNotFound},
		{"POST", "/phones/" + ana + "/stream-error", map[string]any{}, http.StatusBadRequest},
		{"POST", "/phones/" + ana + "/failure", map[string]any{"code": 1}, http.StatusBadRequest},
		{"POST", "/phones/" + ana + "/malformed", map[string]any{}, http.StatusConflict},
		{"POST", "/phones/" + ana + "/devices/7/malformed", map[string]any{}, http.StatusNotFound},
	} {
		if status := w.call(c.method, c.path, c.body, nil); status != c.status {
			t.Errorf("%s %s %v: status %d, want %d", c.method, c.path, c.body, status, c.status)
		}
	}
	w.fault(map[string]any{"kind": "freeze"})
	w.fault(map[string]any{"kind": "send_error", "seconds": 60})
	if n := w.faults(); n != 2 {
		t.Fatalf("%d faults", n)
	}
	w.lift("/faults")
	if n := w.faults(); n != 0 {
		t.Fatalf("%d faults after lifting all", n)
	}
}

// TestMalformedFramePanicsTheClient runs a client in a process of its own: whatsmeow does not survive the frame.
func TestMalformedFramePanicsTheClient(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.link(t, ana)
	c.Disconnect()
	until(t, "offline", func() bool { return !w.devices(ana)[0].Connected })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	victim := exec.CommandContext(t.Context(), self, "-test.run", "^TestVictim$")
	victim.Stderr = &stderr
	victim.Env = append(os.Environ(), victimFile+"="+c.file, victimEndpoint+"="+w.sim.Endpoint(), victimCA+"="+string(w.sim.CAPEM()),
		victimRoot+"="+w.sim.RootKeyHex())
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the victim's login", func() bool { return w.devices(ana)[0].Connected })
	w.must("POST", "/phones/"+ana+"/devices/1/malformed", map[string]any{}, nil)
	var exit *exec.ExitError
	if err := victim.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(stderr.String(), "panic: interface conversion") {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	until(t, "connection gone", func() bool { return w.connections() == 0 })
	c = c.again().connect()
	expect[*events.Connected](c)
}

const (
	victimFile     = "SIM_TEST_VICTIM_FILE"
	victimEndpoint = "SIM_TEST_VICTIM_ENDPOINT"
	victimCA       = "SIM_TEST_VICTIM_CA"
	victimRoot     = "SIM_TEST_VICTIM_ROOT"
)

// TestVictim is the other process of TestMalformedFramePanicsTheClient, and nothing by itself.
func TestVictim(t *testing.T) {
	if os.Getenv(victimFile) == "" {
		return
	}
	w := &world{TB: t, dial: dialer(t, os.Getenv(victimEndpoint), []byte(os.Getenv(victimCA)))}
	c := w.open(t, os.Getenv(victimFile)).connect()
	expect[*events.Connected](c)
	<-t.Context().Done()
}
