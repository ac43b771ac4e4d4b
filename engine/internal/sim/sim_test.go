package sim_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"go.mau.fi/whatsmeow/util/keys"
	waLog "go.mau.fi/whatsmeow/util/log"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/sim"
)

// deadline is for what happens in milliseconds; it is long because the machine may be busy.
const deadline = 15 * time.Second

// rootKey is shared: whatsmeow pins one root per process.
var rootKey = keys.NewKeyPair()

func TestMain(m *testing.M) {
	whatsmeow.WACertPubKey = *rootKey.Pub
	if root, err := hex.DecodeString(os.Getenv(victimRoot)); err == nil && len(root) == 32 {
		whatsmeow.WACertPubKey = [32]byte(root)
	}
	os.Exit(m.Run())
}

// world is a simulator and the control API's client.
type world struct {
	testing.TB
	sim  *sim.Simulator
	dial *http.Client
}

func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldWith(t, sim.Config{})
}

func newWorldWith(t testing.TB, config sim.Config) *world {
	t.Helper()
	config.RootKey = rootKey
	s, err := sim.Start(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &world{TB: t, sim: s, dial: dialer(t, s.Endpoint(), s.CAPEM())}
}

// dialer connects every request to a simulator.
func dialer(t testing.TB, endpoint string, caPEM []byte) *http.Client {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(caPEM) {
		t.Fatal("the CA is no certificate")
	}
	address := strings.TrimPrefix(endpoint, "wss://")
	return &http.Client{Transport: &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		d := tls.Dialer{Config: &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}}
		return d.DialContext(ctx, "tcp", address)
	}}}
}

// call makes a control request and returns its status.
func (w *world) call(method, path string, body, answer any) int {
	w.Helper()
	var content io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			w.Fatal(err)
		}
		content = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(w.Context(), method, w.sim.ControlURL()+path, content)
	if err != nil {
		w.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		w.Fatal(err)
	}
	defer response.Body.Close()
	if answer != nil {
		if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
			w.Fatalf("%s %s: %v", method, path, err)
		}
	}
	return response.StatusCode
}

// must makes a control request that has to succeed.
func (w *world) must(method, path string, body, answer any) {
	w.Helper()
	if answer == nil {
		answer = &map[string]any{}
	}
	if status := w.call(method, path, body, answer); status != http.StatusOK {
		w.Fatalf("%s %s: status %d %v", method, path, status, answer)
	}
}

func (w *world) phone(number string) {
	w.Helper()
	w.must("POST", "/phones", map[string]any{"number": number, "name": "Phone " + number}, nil)
}

func (w *world) send(from, to, text string, count int) []string {
	w.Helper()
	var answer struct {
		MessageIDs []string `json:"message_ids"`
	}
	w.must("POST", "/phones/"+from+"/send", map[string]any{"to": to, "text": text, "count": count}, &answer)
	return answer.MessageIDs
}

type received struct {
	Stanzas, Undecryptable int
	Shown                  []struct {
		Index      int
		From       string
		FromDevice int `json:"from_device"`
		To, Group  string
		MessageID  string `json:"message_id"`
		Text, Kind string
		Timestamp  time.Time
	}
}

func (w *world) received(number, query string) (r received) {
	w.Helper()
	w.must("GET", "/phones/"+number+"/received"+query, nil, &r)
	return r
}

type sentMessage struct {
	MessageID   string `json:"message_id"`
	To          string
	ServerAck   bool     `json:"server_ack"`
	DeliveredTo []string `json:"delivered_to"`
	ReadBy      []string `json:"read_by"`
}

func (w *world) sent(number string) []sentMessage {
	w.Helper()
	var answer struct{ Messages []sentMessage }
	w.must("GET", "/phones/"+number+"/sent", nil, &answer)
	return answer.Messages
}

// pending is what the account's linked devices have not receipted.
func (w *world) pending(number string) (total int) {
	w.Helper()
	var answer struct{ Devices []struct{ ID, Pending int } }
	w.must("GET", "/phones/"+number+"/pending", nil, &answer)
	for _, d := range answer.Devices {
		total += d.Pending
	}
	return total
}

type device struct {
	ID        int
	Connected bool
}

func (w *world) devices(number string) []device {
	w.Helper()
	var answer struct {
		Phones []struct {
			Number  string
			Devices []device
		}
	}
	w.must("GET", "/phones", nil, &answer)
	for _, p := range answer.Phones {
		if p.Number == number {
			return p.Devices
		}
	}
	w.Fatalf("no phone %s", number)
	return nil
}

func (w *world) connections() int {
	w.Helper()
	var stats struct{ Connections int }
	w.must("GET", "/stats", nil, &stats)
	return stats.Connections
}

// until waits for a condition.
func until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// client is an unmodified whatsmeow client with its own SQLite file.
type client struct {
	*whatsmeow.Client
	t    testing.TB
	w    *world
	file string
	// events are all but messages, unfiltered.
	events chan any
	// messages are those that were accepted.
	messages chan *events.Message
	// refuse makes the handler fail: no receipt is sent.
	refuse atomic.Bool
}

// open opens a client on a database file.
func (w *world) open(t testing.TB, file string) *client {
	t.Helper()
	dsn := "file:" + file + "?_foreign_keys=on&_journal_mode=WAL&_busy_timeout=5000&_txlock=immediate&_synchronous=OFF"
	container, err := sqlstore.New(t.Context(), "sqlite3", dsn, nil)
	if err != nil {
		t.Fatal(err)
	}
	store, err := container.GetFirstDevice(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	log := waLog.Noop
	if os.Getenv("SIM_TEST_LOG") != "" {
		log = waLog.Stdout(filepath.Base(file), "DEBUG", false)
	}
	c := &client{
		Client: whatsmeow.NewClient(store, log), t: t, w: w, file: file,
		events: make(chan any, 10_000), messages: make(chan *events.Message, 10_000),
	}
	c.SetWebsocketHTTPClient(w.dial)
	c.SetPreLoginHTTPClient(w.dial)
	c.SetMediaHTTPClient(w.dial)
	c.SynchronousAck, c.EnableDecryptedEventBuffer, c.EnableAutoReconnect = true, true, false
	c.SetForceActiveDeliveryReceipts(true)
	c.AddEventHandlerWithSuccessStatus(c.onEvent)
	t.Cleanup(func() {
		c.Disconnect()
		if err := container.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *client) onEvent(event any) bool {
	message, ok := event.(*events.Message)
	if !ok {
		c.events <- event
		return true
	}
	if c.refuse.Load() {
		c.events <- message
		return false
	}
	c.messages <- message
	return true
}

// expect waits for an event of a type; others before it are dropped.
func expect[T any](c *client) T {
	c.t.Helper()
	timeout := time.After(deadline)
	for {
		select {
		case event := <-c.events:
			if wanted, ok := event.(T); ok {
				return wanted
			}
		case <-timeout:
			var zero T
			c.t.Fatalf("timed out: %T", zero)
		}
	}
}

// receipt waits for a receipt of a type for a message.
func (c *client) receipt(id string, kind types.ReceiptType) *events.Receipt {
	c.t.Helper()
	for {
		receipt := expect[*events.Receipt](c)
		if receipt.Type == kind && strings.Join(receipt.MessageIDs, ",") == id {
			return receipt
		}
	}
}

func (c *client) message() *events.Message {
	c.t.Helper()
	select {
	case message := <-c.messages:
		return message
	case <-time.After(deadline):
		c.t.Fatal("timed out: a message")
		return nil
	}
}

func (c *client) connect() *client {
	c.t.Helper()
	if err := c.Connect(); err != nil {
		c.t.Fatal(err)
	}
	return c
}

// again closes the client's connection and opens a new one in a new client on the same file, as after a restart.
func (c *client) again() *client {
	c.t.Helper()
	c.Disconnect()
	return c.w.open(c.t, c.file)
}

// link pairs a new client with a phone and waits until it is online.
func (w *world) link(t testing.TB, number string) *client {
	t.Helper()
	c := w.open(t, filepath.Join(t.TempDir(), "client.db"))
	c.connect()
	qr := expect[*events.QR](c)
	if len(qr.Codes) != 6 {
		t.Fatalf("%d codes", len(qr.Codes))
	}
	w.must("POST", "/phones/"+number+"/scan", map[string]any{"qr": qr.Codes[0]}, nil)
	expect[*events.PairSuccess](c)
	expect[*events.Connected](c)
	return c
}

func (c *client) say(to, text, id string) string {
	c.t.Helper()
	response, err := c.SendMessage(c.t.Context(), types.NewJID(to, types.DefaultUserServer),
		&waE2E.Message{Conversation: proto.String(text)}, whatsmeow.SendRequestExtra{ID: id})
	if err != nil {
		c.t.Fatal(err)
	}
	return response.ID
}

const (
	ana = "15550001"
	bob = "15550002"
)

func TestPairAndMessageBothWays(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	w.phone(bob)
	c := w.link(t, ana)
	if got := c.Store.ID.String(); got != ana+":1@s.whatsapp.net" {
		t.Fatalf("paired as %s", got)
	}
	if d := w.devices(ana); len(d) != 1 || d[0] != (device{1, true}) {
		t.Fatalf("devices: %v", d)
	}

	toClient := w.send(bob, ana, "hello Ana", 1)
	message := c.message()
	if message.Message.GetConversation() != "hello Ana" || message.Info.ID != toClient[0] || message.Info.PushName != "Phone "+bob {
		t.Fatalf("got %v", message)
	}
	until(t, "delivery receipt at the phone", func() bool {
		s := w.sent(bob)
		return len(s) == 1 && s[0].ServerAck && fmt.Sprint(s[0].DeliveredTo) == "[15550001:1@s.whatsapp.net 15550001@s.whatsapp.net]"
	})
	if err := c.MarkRead(t.Context(), toClient, time.Now(), message.Info.Chat, message.Info.Sender); err != nil {
		t.Fatal(err)
	}
	until(t, "read receipt at the phone", func() bool {
		return fmt.Sprint(w.sent(bob)[0].ReadBy) == "[15550001:1@s.whatsapp.net]"
	})

	id := c.say(bob, "hello Bob", "")
	c.receipt(id, types.ReceiptTypeDelivered)
	r := w.received(bob, "?from="+ana)
	if len(r.Shown) != 1 || r.Shown[0].Text != "hello Bob" || r.Shown[0].MessageID != id || r.Shown[0].FromDevice != 1 || r.Undecryptable != 0 {
		t.Fatalf("received: %+v", r)
	}
	w.must("POST", "/phones/"+bob+"/read", map[string]any{"from": ana, "message_ids": []string{id}}, nil)
	if read := c.receipt(id, types.ReceiptTypeRead); read.Sender.Device != 0 {
		t.Fatalf("read by %s", read.Sender)
	}
	// The client's own phone got its copy.
	until(t, "own copy", func() bool { return len(w.received(ana, "?from="+ana).Shown) == 1 })
	if own := w.received(ana, "?from="+ana).Shown[0]; own.Text != "hello Bob" || own.To != bob {
		t.Fatalf("own copy: %+v", own)
	}
	until(t, "nothing pending", func() bool { return w.pending(ana) == 0 })
}
