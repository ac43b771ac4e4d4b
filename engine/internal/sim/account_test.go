package sim_test

import (
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.mau.fi/whatsmeow/appstate"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"go.mau.fi/whatsmeow/util/keys"
	"google.golang.org/protobuf/proto"
)

func TestUnlinkWhileConnected(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.link(t, ana)
	w.must("POST", "/phones/"+ana+"/devices/1/unlink", map[string]any{}, nil)
	if out := expect[*events.LoggedOut](c); out.OnConnect {
		t.Fatal("logged out on connect")
	}
	if d := w.devices(ana); len(d) != 0 {
		t.Fatalf("devices: %v", d)
	}
	until(t, "connection closed", func() bool { return w.connections() == 0 })
	if status := w.call("POST", "/phones/"+ana+"/devices/1/unlink", map[string]any{}, nil); status != http.StatusNotFound {
		t.Fatalf("second unlink: status %d", status)
	}
}

func TestUnlinkWhileAway(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.link(t, ana)
	c.Disconnect()
	w.must("POST", "/phones/"+ana+"/devices/1/unlink", map[string]any{}, nil)
	c = c.again().connect()
	if out := expect[*events.LoggedOut](c); !out.OnConnect || out.Reason != events.ConnectFailureLoggedOut {
		t.Fatalf("%+v", out)
	}
}

func TestLogout(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.link(t, ana)
	if err := c.Logout(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "device gone", func() bool { return len(w.devices(ana)) == 0 })
	// The account can be linked again; the device number is a new one.
	w.link(t, ana)
	if d := w.devices(ana); len(d) != 1 || d[0].ID != 2 {
		t.Fatalf("devices: %v", d)
	}
}

func TestSecondLoginReplacesTheFirst(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	first := w.link(t, ana)
	second := w.open(t, first.file).connect()
	expect[*events.Connected](second)
	expect[*events.StreamReplaced](first)
	id := w.send(bob, ana, "for the second", 1)[0]
	if m := second.message(); m.Info.ID != id {
		t.Fatalf("%v", m)
	}
	if n := len(first.messages); n != 0 {
		t.Fatalf("the replaced connection got %d messages", n)
	}
}

// TestForeignKeyIsRefused logs in as a device that exists, with another Noise key than it was paired with.
func TestForeignKeyIsRefused(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.link(t, ana)
	c = c.again()
	c.Store.NoiseKey = keys.NewKeyPair()
	c.connect()
	if out := expect[*events.LoggedOut](c); !out.OnConnect {
		t.Fatalf("%+v", out)
	}
}

func TestScanErrors(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	scan := func(number, qr string) (status int, code string) {
		var answer struct{ Error struct{ Code string } }
		status = w.call("POST", "/phones/"+number+"/scan", map[string]any{"qr": qr}, &answer)
		return status, answer.Error.Code
	}
	if status, code := scan(ana, "no qr"); status != http.StatusBadRequest || code != "bad_request" {
		t.Fatalf("%d %s", status, code)
	}
	c := w.open(t, filepath.Join(t.TempDir(), "client.db")).connect()
	qr := expect[*events.QR](c).Codes[0]
	if status, code := scan("15559999", qr); status != http.StatusNotFound || code != "unknown_phone" {
		t.Fatalf("%d %s", status, code)
	}
	c.Disconnect()
	until(t, "code unknown once its client has gone", func() bool {
		status, code := scan(ana, qr)
		return status == http.StatusNotFound && code == "unknown_qr"
	})
	c.connect()
	// The fifth code works, with or without the link that newer clients put before it; then none works any more.
	codes := expect[*events.QR](c).Codes
	_, plain, _ := strings.Cut(codes[4], "#")
	if status, code := scan(ana, plain); status != http.StatusOK {
		t.Fatalf("%d %s", status, code)
	}
	if status, code := scan(bob, codes[5]); status != http.StatusNotFound || code != "unknown_qr" {
		t.Fatalf("%d %s", status, code)
	}
	expect[*events.Connected](c)
}

// TestClientRefusesPairing has a QR code whose secret is not the client's: it refuses the identity.
func TestClientRefusesPairing(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	c := w.open(t, filepath.Join(t.TempDir(), "client.db")).connect()
	qr := expect[*events.QR](c).Codes[0]
	c.Store.AdvSecretKey = make([]byte, 32)
	var answer struct{ Error struct{ Code string } }
	if status := w.call("POST", "/phones/"+ana+"/scan", map[string]any{"qr": qr}, &answer); status != http.StatusConflict || answer.Error.Code != "pairing_failed" {
		t.Fatalf("%d %v", status, answer)
	}
	expect[*events.PairError](c)
	if d := w.devices(ana); len(d) != 0 {
		t.Fatalf("devices: %v", d)
	}
}

func TestControlErrors(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	for _, c := range []struct {
		method, path string
		body         any
		status       int
	}{
		{"POST", "/phones", map[string]any{"number": ana}, http.StatusConflict},
		{"POST", "/phones", map[string]any{"number": "+15550009"}, http.StatusBadRequest},
		{"POST", "/phones", map[string]any{"number": "13135550002"}, http.StatusBadRequest},
		{"POST", "/phones", map[string]any{"numero": "15550009"}, http.StatusBadRequest},
		{"POST", "/phones/15550009/send", map[string]any{"to": ana, "text": "x"}, http.StatusNotFound},
		{"POST", "/phones/" + ana + "/send", map[string]any{"to": "15550009", "text": "x"}, http.StatusNotFound},
		{"POST", "/phones/" + ana + "/send", map[string]any{"to": ana, "text": "x", "kind": "image"}, http.StatusBadRequest},
		{"POST", "/phones/" + ana + "/send", map[string]any{"to": ana, "text": "x", "count": 0}, http.StatusBadRequest},
		{"POST", "/phones/" + ana + "/read", map[string]any{"from": ana, "message_ids": []string{}}, http.StatusBadRequest},
		{"GET", "/phones/" + ana + "/received?after=x", nil, http.StatusBadRequest},
		{"POST", "/phones/" + ana + "/devices/1/drop", map[string]any{}, http.StatusNotFound},
		{"POST", "/phones/" + ana + "/devices/0/unlink", map[string]any{}, http.StatusNotFound},
		{"GET", "/nothing", nil, http.StatusNotFound},
	} {
		var answer struct {
			Error struct{ Code, Message string }
		}
		if status := w.call(c.method, c.path, c.body, &answer); status != c.status || answer.Error.Code == "" || answer.Error.Message == "" {
			t.Errorf("%s %s %v: status %d %+v", c.method, c.path, c.body, status, answer)
		}
	}
}

// TestQueries asks what an engine asks besides messages.
func TestQueries(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c := w.link(t, ana)
	ctx := t.Context()
	numbers, err := c.IsOnWhatsApp(ctx, []string{"+" + bob, "+15559999"})
	if err != nil || len(numbers) != 2 || !numbers[0].IsIn || numbers[0].Query != "+"+bob || numbers[0].PhoneNumber.User != bob || numbers[1].IsIn {
		t.Fatalf("%+v %v", numbers, err)
	}
	jid := types.NewJID(bob, types.DefaultUserServer)
	users, err := c.GetUserInfo(ctx, []types.JID{jid})
	if err != nil || users[jid].LID.Server != types.HiddenUserServer || len(users[jid].Devices) != 1 {
		t.Fatalf("%+v %v", users, err)
	}
	for _, name := range appstate.AllPatchNames {
		if err := c.FetchAppState(ctx, name, true, false); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if blocked, err := c.GetBlocklist(ctx); err != nil || len(blocked.JIDs) != 0 {
		t.Fatalf("%+v %v", blocked, err)
	}
	if settings, err := c.TryFetchPrivacySettings(ctx, true); err != nil || settings.ReadReceipts != types.PrivacySettingAll {
		t.Fatalf("%+v %v", settings, err)
	}
	if groups, err := c.GetJoinedGroups(ctx); err != nil || len(groups) != 0 {
		t.Fatalf("%+v %v", groups, err)
	}
	if _, err := c.GetGroupInfo(ctx, types.NewJID("1203630", types.GroupServer)); err == nil {
		t.Fatal("a group that does not exist")
	}
	nobody := types.NewJID("15559999", types.DefaultUserServer)
	if _, err := c.SendMessage(ctx, nobody, &waE2E.Message{Conversation: proto.String("x")}); err == nil {
		t.Fatal("a message to nobody was accepted")
	}
	c.Store.PushName = "Ana"
	if err := c.SendPresence(ctx, types.PresenceAvailable); err != nil {
		t.Fatal(err)
	}
	var stats struct{ Connections, Logins, StanzasIn, StanzasOut, Goroutines int }
	w.must("GET", "/stats", nil, &stats)
	if stats.Connections != 1 || stats.Logins != 1 || stats.Goroutines == 0 {
		t.Fatalf("%+v", stats)
	}
}

// TestLowKeys uses up a client's one-time keys: the server asks for more.
func TestLowKeys(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	ours, theirs := w.link(t, ana), w.link(t, bob)
	target := *ours.Store.ID
	count := func() int {
		//lint:ignore SA1019 there is no other way to ask, and the version is pinned
		n, err := ours.DangerousInternals().GetServerPreKeyCount(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := count()
	asked := slices.Repeat([]types.JID{target}, before-4)
	//lint:ignore SA1019 there is no other way to ask, and the version is pinned
	if _, err := theirs.DangerousInternals().FetchPreKeys(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	// whatsmeow uploads 50 when it hears of fewer than five.
	until(t, "an upload", func() bool { return count() == 54 })
}
