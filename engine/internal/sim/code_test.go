package sim_test

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
)

// askCode connects a new client that asks to be linked to a number and returns the code that it shows.
func (w *world) askCode(t testing.TB, number string) (*client, string) {
	t.Helper()
	c := w.open(t, filepath.Join(t.TempDir(), "client.db")).connect()
	expect[*events.QR](c)
	return c, c.pairPhone(number)
}

func (c *client) pairPhone(number string) string {
	c.t.Helper()
	code, err := c.PairPhone(c.t.Context(), number, true, whatsmeow.PairClientChrome, "Chrome (Linux)")
	if err != nil {
		c.t.Fatal(err)
	}
	return code
}

func (w *world) enterCode(number, code string) (status int, reason string) {
	w.Helper()
	var answer struct{ Error struct{ Code string } }
	status = w.call("POST", "/phones/"+number+"/pair-code", map[string]any{"code": code}, &answer)
	return status, answer.Error.Code
}

func TestPairByCode(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c, code := w.askCode(t, ana)
	// People write codes in many ways.
	if status, reason := w.enterCode(ana, strings.ToLower(strings.Replace(code, "-", " ", 1))); status != http.StatusOK {
		t.Fatalf("%d %s", status, reason)
	}
	if paired := expect[*events.PairSuccess](c); paired.ID.User != ana || paired.LID.Server != types.HiddenUserServer {
		t.Fatalf("%+v", paired)
	}
	expect[*events.Connected](c)
	if d := w.devices(ana); len(d) != 1 || d[0] != (device{1, true}) {
		t.Fatalf("%v", d)
	}
	c.receipt(c.say(bob, "linked by code", ""), types.ReceiptTypeDelivered)
	id := w.send(bob, ana, "welcome", 1)[0]
	if m := c.message(); m.Info.ID != id {
		t.Fatalf("%v", m)
	}
	if status, reason := w.enterCode(ana, code); status != http.StatusNotFound || reason != "unknown_code" {
		t.Fatalf("a code used twice: %d %s", status, reason)
	}
}

func TestPairingCodeErrors(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	if status, reason := w.enterCode(ana, "1234-567O"); status != http.StatusBadRequest || reason != "bad_request" {
		t.Fatalf("%d %s", status, reason)
	}
	c, code := w.askCode(t, ana)
	if status, reason := w.enterCode(bob, code); status != http.StatusNotFound || reason != "unknown_code" {
		t.Fatalf("another number: %d %s", status, reason)
	}
	wrong := "1111-1111"
	if status, reason := w.enterCode(ana, wrong); status != http.StatusConflict || reason != "wrong_code" {
		t.Fatalf("%d %s", status, reason)
	}
	if status, reason := w.enterCode(ana, code); status != http.StatusNotFound || reason != "unknown_code" {
		t.Fatalf("after a wrong code: %d %s", status, reason)
	}
	// A renewed code replaces the one before it.
	old := c.pairPhone(ana)
	code = c.pairPhone(ana)
	if old == code {
		t.Fatal("the same code twice")
	}
	if status, reason := w.enterCode(ana, code); status != http.StatusOK {
		t.Fatalf("%d %s", status, reason)
	}
	expect[*events.Connected](c)
	gone, code := w.askCode(t, bob)
	gone.Disconnect()
	until(t, "code unknown once its client has gone", func() bool {
		status, reason := w.enterCode(bob, code)
		return status == http.StatusNotFound && reason == "unknown_code"
	})
	if _, err := w.open(t, filepath.Join(t.TempDir(), "client.db")).connect().PairPhone(
		t.Context(), bob, true, whatsmeow.PairClientChrome, "no browser"); err == nil {
		t.Fatal("a display name that is no `Browser (OS)` was accepted")
	}
}

// TestCodeAfterQR has one client show both: whichever comes first links it.
func TestCodeAfterQR(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.open(t, filepath.Join(t.TempDir(), "client.db")).connect()
	qr := expect[*events.QR](c).Codes[0]
	code := c.pairPhone(ana)
	w.must("POST", "/phones/"+ana+"/scan", map[string]any{"qr": qr}, nil)
	expect[*events.Connected](c)
	if status, reason := w.enterCode(ana, code); status != http.StatusNotFound || reason != "unknown_code" {
		t.Fatalf("%d %s", status, reason)
	}
}
