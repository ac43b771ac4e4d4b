// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mattn/go-sqlite3"
	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"golang.org/x/sync/semaphore"

	"warren/engine/internal/endpoint"
	"warren/engine/internal/frames"
	"warren/engine/internal/waversion"
)

// recorder is the daemon's side: it keeps events and may answer them.
type recorder struct {
	mu     sync.Mutex
	events []frames.Event
	answer func(frames.Event)
	fail   error
}

func (r *recorder) Event(_ context.Context, event frames.Event) error {
	if _, err := frames.Encode(event); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return r.fail
	}
	r.events = append(r.events, event)
	if event.ID != 0 && r.answer != nil {
		go r.answer(event)
	}
	return nil
}

func (r *recorder) named(name string) (list []frames.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, event := range r.events {
		if event.Event == name {
			list = append(list, event)
		}
	}
	return list
}

// newSession opens a session on a new directory; it is never connected.
func newSession(t *testing.T, timing Timing) (*Session, *recorder) {
	t.Helper()
	out := &recorder{}
	where, err := endpoint.Parse("", "", "")
	if err != nil {
		t.Fatal(err)
	}
	var id int64
	cfg := &Config{
		Out: out, Endpoint: where, Log: slog.New(slog.DiscardHandler), Timing: timing, Downloads: semaphore.NewWeighted(1),
		WAVersion:   waversion.New(waversion.Options{Offline: true, Log: slog.New(slog.DiscardHandler)}),
		NextEventID: func() int64 { id++; return id },
	}
	s, err := Open(context.Background(), cfg, Options{Session: "acme", Generation: 1, Dir: t.TempDir(), Create: true, DeviceName: "Test"})
	if err != nil {
		t.Fatal(err)
	}
	close(s.dialDone)
	t.Cleanup(func() {
		s.finish(&ending{})
		s.teardown(s.currentEnding())
	})
	return s, out
}

func quick() Timing {
	timing := DefaultTiming()
	timing.Answer, timing.QRFirst, timing.QRNext = 50*time.Millisecond, 30*time.Millisecond, 10*time.Millisecond
	timing.PairRestart, timing.ServerGrace = 30*time.Millisecond, 30*time.Millisecond
	return timing
}

// runLoop runs the loop to its end and returns the ending.
func runLoop(t *testing.T, s *Session) *ending {
	t.Helper()
	if !waitFor(s.loop, 5*time.Second) {
		t.Fatal("the session does not end")
	}
	return s.currentEnding()
}

func reasonOf(end *ending) string {
	if data, ok := end.data.(disconnectedData); ok {
		return data.Reason
	}
	return end.event
}

func TestQRRotation(t *testing.T) {
	s, out := newSession(t, quick())
	start := time.Now()
	s.handle(&events.QR{Codes: []string{"a", "b", "c"}})
	end := runLoop(t, s)
	if reasonOf(end) != reasonQRExpired {
		t.Fatalf("%+v", end)
	}
	if took := time.Since(start); took < 50*time.Millisecond {
		t.Errorf("expired after %s", took)
	}
	want := []qrData{{"a", 30, 2}, {"b", 10, 1}, {"c", 10, 0}}
	got := out.named("qr")
	if len(got) != len(want) {
		t.Fatalf("%v", got)
	}
	for i := range want {
		if got[i].Data != want[i] {
			t.Errorf("%v instead of %v", got[i].Data, want[i])
		}
	}
}

func TestPairingCode(t *testing.T) {
	for name, c := range map[string]struct {
		answer  pairingCode
		reason  string
		message string
		code    int
	}{
		"shown until the QR codes would end": {pairingCode{code: "ABCD-1234"}, reasonQRExpired, "was not entered", 0},
		"bad number":                         {pairingCode{err: &whatsmeow.IQError{Code: 400}}, reasonPairingFailed, "phone number", 400},
		"rate limit":                         {pairingCode{err: fmt.Errorf("asked: %w", &whatsmeow.IQError{Code: 429})}, reasonPairingFailed, "too many codes", 429},
		"not international":                  {pairingCode{err: whatsmeow.ErrPhoneNumberIsNotInternational}, reasonPairingFailed, "international", 0},
		"silence":                            {pairingCode{err: context.DeadlineExceeded}, reasonPairingFailed, "in time", 0},
		"the connection went":                {pairingCode{err: whatsmeow.ErrNotConnected}, reasonQRExpired, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s, out := newSession(t, quick())
			s.PhoneNumber = "15550001"
			timer := stoppedTimer()
			s.pairing.codes, s.pairing.shown = []string{"a", "b"}, 2 // as asked already
			s.pairing.expires = time.Now().Add(40 * time.Millisecond)
			s.serve(&events.QR{Codes: []string{"a", "b"}}, timer, stoppedTimer())
			s.serve(c.answer, timer, stoppedTimer())
			if !s.Ending() {
				s.showQR(timer) // as when time is up
			}
			data := s.currentEnding().data.(disconnectedData)
			if data.Reason != c.reason || !strings.Contains(data.Message, c.message) || data.Code != c.code {
				t.Errorf("%+v", data)
			}
			shown := out.named("pairing_code")
			if len(out.named("qr")) != 0 || (len(shown) == 1) != (c.answer.err == nil) {
				t.Fatalf("%v", out.events)
			}
			if len(shown) == 1 {
				if got := shown[0].Data.(pairingCodeData); got.Code != "ABCD-1234" || got.TTLMS <= 0 || got.TTLMS > 40 {
					t.Errorf("%+v", got)
				}
			}
		})
	}
}

// TestPairingCodeWithoutAConnection runs the real request, which cannot succeed.
func TestPairingCodeWithoutAConnection(t *testing.T) {
	s, out := newSession(t, quick())
	s.PhoneNumber = "15550001"
	start := time.Now()
	s.handle(&events.QR{Codes: []string{"a", "b"}})
	if end := runLoop(t, s); reasonOf(end) != reasonQRExpired || time.Since(start) < 40*time.Millisecond {
		t.Errorf("%+v after %s", end, time.Since(start))
	}
	if len(out.events) != 0 {
		t.Errorf("%v", out.events)
	}
}

// TestTheConnectionEndsWithTheCodes: WhatsApp hangs up when its codes are used up, and its clock is not ours.
func TestTheConnectionEndsWithTheCodes(t *testing.T) {
	for name, c := range map[string]struct {
		number string
		first  time.Duration
		codes  []string
		paired bool
		reason string
	}{
		"early, of one code":  {"", time.Minute, []string{"a"}, false, reasonNetwork},
		"not the last code":   {"", time.Second, []string{"a", "b"}, false, reasonNetwork},
		"the last code":       {"", time.Second, []string{"a"}, false, reasonQRExpired},
		"paired meanwhile":    {"", time.Second, []string{"a"}, true, reasonNetwork},
		"early, pairing code": {"15550001", time.Minute, []string{"a", "b"}, false, reasonNetwork},
		"late, pairing code":  {"15550001", time.Second, []string{"a", "b"}, false, reasonQRExpired},
	} {
		t.Run(name, func(t *testing.T) {
			timing := quick()
			timing.QRFirst = c.first
			s, _ := newSession(t, timing)
			s.PhoneNumber = c.number
			s.serve(&events.QR{Codes: c.codes}, stoppedTimer(), stoppedTimer())
			if c.paired {
				pairDevice(t, s)
			}
			s.handle(&events.Disconnected{})
			if end := s.currentEnding(); reasonOf(end) != c.reason {
				t.Errorf("%+v", end)
			}
		})
	}
}

func TestDisplayName(t *testing.T) {
	for name, want := range map[string]string{"": "Chrome (Linux)", "Warren": "Chrome (Linux)", "Edge (Windows)": "Edge (Windows)", "Edge (x)": "Chrome (Linux)"} {
		if got := displayName(name); got != want {
			t.Errorf("%q: %q", name, got)
		}
	}
}

func TestPairedComesBeforeRestart(t *testing.T) {
	for name, evts := range map[string][]any{
		"in order":                    {&events.PairSuccess{}, &events.ManualLoginReconnect{}},
		"the restart overtakes":       {&events.ManualLoginReconnect{}, &events.PairSuccess{}},
		"WhatsApp forgets to restart": {&events.PairSuccess{}},
	} {
		t.Run(name, func(t *testing.T) {
			s, out := newSession(t, quick())
			s.handle(&events.QR{Codes: []string{"a"}})
			pairDevice(t, s)
			for _, evt := range evts {
				s.handle(evt)
			}
			if end := runLoop(t, s); reasonOf(end) != reasonRestartRequired {
				t.Fatalf("%+v", end)
			}
			if paired := out.named("paired"); len(paired) != 1 || !strings.HasPrefix(paired[0].Data.(pairedData).JID, "15550001") {
				t.Fatalf("%v", paired)
			}
		})
	}
}

func pairDevice(t *testing.T, s *Session) {
	t.Helper()
	id := types.NewADJID("15550001", 0, 1)
	device := s.store.Device
	device.ID, device.LID = &id, types.JID{User: "900001", Device: 1, Server: types.HiddenUserServer}
	device.Account = &waAdv.ADVSignedDeviceIdentity{
		Details: []byte{1}, AccountSignature: make([]byte, 64), AccountSignatureKey: make([]byte, 32), DeviceSignature: make([]byte, 64),
	}
	if err := device.Save(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func node(tag string, attrs waBinary.Attrs, children ...waBinary.Node) waBinary.Node {
	if children == nil {
		return waBinary.Node{Tag: tag, Attrs: attrs}
	}
	return waBinary.Node{Tag: tag, Attrs: attrs, Content: children}
}

// TestWhatsAppEndsTheConnection feeds stanzas to the real whatsmeow client, because what it reports of them changes with its version.
func TestWhatsAppEndsTheConnection(t *testing.T) {
	failure := func(code string, more ...string) waBinary.Node {
		attrs := waBinary.Attrs{"reason": code, "location": "frc"}
		for i := 0; i < len(more); i += 2 {
			attrs[more[i]] = more[i+1]
		}
		return node("failure", attrs)
	}
	conflict := func(kind string) waBinary.Node { return node("conflict", waBinary.Attrs{"type": kind}) }
	cases := []struct {
		name   string
		stanza waBinary.Node
		reason string
		code   int
	}{
		{"515", node("stream:error", waBinary.Attrs{"code": "515"}), reasonRestartRequired, 515},
		{"replaced", node("stream:error", nil, conflict("replaced")), reasonReplaced, 0},
		{"unlinked", node("stream:error", waBinary.Attrs{"code": "401"}, conflict("device_removed")), "logged_out", 401},
		{"stream 503", node("stream:error", waBinary.Attrs{"code": "503"}), reasonServer, 503},
		{"stream 500", node("stream:error", waBinary.Attrs{"code": "500"}), reasonServer, 500},
		{"stream unknown", node("stream:error", nil, node("xml-not-well-formed", nil)), reasonServer, 0},
		{"failure 401", failure("401"), "logged_out", 401},
		{"failure 403", failure("403"), "logged_out", 403},
		{"failure 406", failure("406"), "logged_out", 406},
		{"failure 402", failure("402", "code", "101", "expire", "3600"), reasonTemporaryBan, 402},
		{"failure 405", failure("405"), reasonClientOutdated, 405},
		{"failure 409", failure("409"), reasonFailure, 409},
		{"failure 413", failure("413"), reasonFailure, 0},
		{"failure 418", failure("418"), reasonFailure, 418},
		{"failure 500", failure("500"), reasonServer, 500},
		{"failure 501", failure("501"), reasonServer, 501},
		{"failure 503", failure("503"), reasonServer, 503},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s, _ := newSession(t, quick())
			pairDevice(t, s)
			feed(t, s, c.stanza)
			end := runLoop(t, s)
			code := 0
			switch data := end.data.(type) {
			case disconnectedData:
				code = data.Code
				if until, err := time.Parse(time.RFC3339, data.Until); c.reason == reasonTemporaryBan && (err != nil || time.Until(until) < 59*time.Minute) {
					t.Errorf("until %q", data.Until)
				}
			case loggedOutData:
				code = data.Code
				if data.OnConnect != strings.HasPrefix(c.name, "failure") || !end.deleteDevice {
					t.Errorf("%+v", data)
				}
			}
			if reasonOf(end) != c.reason || code != c.code {
				t.Errorf("got %s %d: %+v", reasonOf(end), code, end.data)
			}
		})
	}
}

// feed has whatsmeow receive a stanza.
func feed(t *testing.T, s *Session, stanza waBinary.Node) {
	t.Helper()
	payload, err := waBinary.Marshal(stanza)
	if err != nil {
		t.Fatal(err)
	}
	queue := make(chan *waBinary.Node, 1)
	//lint:ignore SA1019 the only way to hand the client a stanza
	internals := s.cli.DangerousInternals()
	internals.HandleFrame(s.ctx, payload, queue)
	go internals.HandlerQueueLoop(s.ctx, s.ctx, queue)
}

func TestConnectErrors(t *testing.T) {
	if reason := reasonOf(classifyConnect(errors.New("dial: refused"))); reason != reasonNetwork {
		t.Error(reason)
	}
}

func message(id, text string) *events.Message {
	evt := &events.Message{
		Info: types.MessageInfo{
			ID: id, Timestamp: time.Unix(1700000000, 0),
			MessageSource: types.MessageSource{Chat: types.NewJID("900002", types.HiddenUserServer), Sender: types.NewJID("900002", types.HiddenUserServer)},
		},
		RawMessage: text_(text),
	}
	return evt.UnwrapRaw()
}

func TestHandlerWaitsForTheAnswer(t *testing.T) {
	for name, answer := range map[string]*bool{"yes": ptr(true), "no": ptr(false), "silence": nil} {
		t.Run(name, func(t *testing.T) {
			s, out := newSession(t, quick())
			pairDevice(t, s)
			if answer != nil {
				out.answer = func(event frames.Event) { s.Answer(event.ID, *answer) }
			}
			ok := s.handle(message("A", "hi"))
			want := answer != nil && *answer
			if ok != want {
				t.Fatalf("the handler returned %v", ok)
			}
			if want {
				if s.Ending() {
					t.Fatal("the session ends")
				}
				return
			}
			// Nothing may be acknowledged after the handler has failed, whatever whatsmeow makes of it.
			if s.ctx.Err() == nil {
				t.Error("the client's context is alive")
			}
			if end := s.currentEnding(); end == nil || reasonOf(end) != reasonHandlerTimeout || !end.abrupt {
				t.Errorf("%+v", end)
			}
		})
	}
}

func TestPanicInTheHandlerIsNoSuccess(t *testing.T) {
	s, _ := newSession(t, quick())
	s.cfg.NextEventID = func() int64 { panic("bug") }
	if s.handle(message("A", "hi")) {
		t.Fatal("a panic counts as success")
	}
	if end := s.currentEnding(); end == nil || reasonOf(end) != reasonInternal || s.ctx.Err() == nil {
		t.Fatalf("%+v", end)
	}
}

func TestDatabaseFailureEndsTheSessionAtOnce(t *testing.T) {
	for failure, reason := range map[error]string{errors.New("malformed"): reasonInternal, error(syscall.ENOSPC): reasonDiskTrouble} {
		s, _ := newSession(t, quick())
		s.databaseFailed(failure)
		if end := s.currentEnding(); end == nil || reasonOf(end) != reason || s.ctx.Err() == nil {
			t.Fatalf("%v: %+v", failure, end)
		}
	}
}

func TestADiskThatFailsUnderASend(t *testing.T) {
	s, _ := newSession(t, quick())
	s.wire.watch("A", func() {})
	full := fmt.Errorf("failed to store: %w", sqlite3.Error{Code: sqlite3.ErrFull})
	if got := s.sendFailed(full); got.Code != frames.CodeDiskTrouble {
		t.Errorf("before the message is written: %v", got)
	}
	s.wire.Sent(&waBinary.Node{Tag: "message", Attrs: waBinary.Attrs{"id": "A"}})
	if got := s.sendFailed(full); got.Code != frames.CodeDisconnected {
		t.Errorf("after it: %v", got)
	}
	s.wire.watch("B", func() {})
	if got := s.sendFailed(full); got.Code != frames.CodeDiskTrouble {
		t.Errorf("the next message: %v", got)
	}
}

func TestLongMessageFitsInAFrame(t *testing.T) {
	s, out := newSession(t, DefaultTiming())
	pairDevice(t, s)
	out.answer = func(event frames.Event) { s.Answer(event.ID, true) }
	if !s.handle(message("A", strings.Repeat("\x01é", 1<<20))) {
		t.Fatal("refused: it would come back for ever")
	}
	got := out.named("message")
	if len(got) != 1 {
		t.Fatalf("%d events", len(got))
	}
	data := got[0].Data.(*messageData)
	if !data.Truncated || len(data.Text) < 100_000 {
		t.Errorf("truncated %v, %d bytes", data.Truncated, len(data.Text))
	}
	ids := make([]string, 50_000)
	for i := range ids {
		ids[i] = "3EB0123456789ABCDEF012"
	}
	receipt := &events.Receipt{MessageSource: message("", "").Info.MessageSource, MessageIDs: ids, Type: types.ReceiptTypeRead}
	if !s.handle(receipt) {
		t.Fatal("refused")
	}
	total := 0
	for _, event := range out.named("receipt") {
		total += len(event.Data.(*receiptData).MessageIDs)
	}
	if total != len(ids) {
		t.Errorf("%d of %d ids", total, len(ids))
	}
}

func TestDrainWaitsForTheAnswerAndRefusesTheRest(t *testing.T) {
	s, out := newSession(t, DefaultTiming())
	pairDevice(t, s)
	handed := make(chan frames.Event, 1)
	out.answer = func(event frames.Event) { handed <- event }
	first := make(chan bool, 1)
	go func() { first <- s.handle(message("A", "one")) }()
	event := <-handed
	drained := make(chan struct{})
	go func() { s.hand.drain(5 * time.Second); close(drained) }()
	for !s.hand.isClosed() {
		time.Sleep(time.Millisecond)
	}
	if s.handle(message("B", "two")) {
		t.Error("an event was handed over while the session closes")
	}
	select {
	case <-drained:
		t.Fatal("it did not wait for the answer")
	default:
	}
	s.Answer(event.ID, true)
	if !<-first {
		t.Error("the answer came too late")
	}
	<-drained
	if len(out.named("message")) != 1 {
		t.Error("the second message got out")
	}
}

func TestDrainGivesUp(t *testing.T) {
	s, out := newSession(t, DefaultTiming())
	pairDevice(t, s)
	handed := make(chan struct{}, 1)
	out.answer = func(frames.Event) { handed <- struct{}{} }
	first := make(chan bool, 1)
	go func() { first <- s.handle(message("A", "one")) }()
	<-handed
	s.hand.drain(10 * time.Millisecond)
	if <-first {
		t.Error("an unanswered event counts as taken over")
	}
}

func TestReceiptIsWaitedFor(t *testing.T) {
	w := &wire{}
	if w.waitSettled(time.Second, time.Second) {
		t.Error("nothing was accepted")
	}
	w.accepted("A")
	time.AfterFunc(20*time.Millisecond, func() { w.Sent(&waBinary.Node{Tag: "receipt", Attrs: waBinary.Attrs{"id": "A"}}) })
	start := time.Now()
	if !w.waitSettled(5*time.Second, time.Minute) {
		t.Error("a recent receipt is not remembered")
	}
	if took := time.Since(start); took < 15*time.Millisecond || took > 4*time.Second {
		t.Errorf("waited %s", took)
	}
	w.Sent(&waBinary.Node{Tag: "receipt", Attrs: waBinary.Attrs{"id": "A"}})
}

func TestSendsAreBounded(t *testing.T) {
	s, _ := newSession(t, DefaultTiming())
	s.online.Store(true)
	answers := make(chan string, sendQueue+2)
	reply := func(_ any, err *frames.Error) { answers <- err.Code }
	request := func() *frames.Request {
		return &frames.Request{MessageID: "A", To: "15550002@s.whatsapp.net", Text: "x", TimeoutMS: 60_000}
	}
	for range sendQueue {
		s.Send(request(), reply)
	}
	s.Send(request(), reply)
	if code := <-answers; code != frames.CodeBusy {
		t.Fatal(code)
	}
	s.cancel()
	s.sends.close()
	s.sends.run()
	for range sendQueue {
		if code := <-answers; code != frames.CodeNotConnected {
			t.Fatal(code)
		}
	}
	s.Send(request(), reply)
	if code := <-answers; code != frames.CodeNotConnected {
		t.Fatal(code)
	}
}

func TestSendTimesOutInTheQueue(t *testing.T) {
	s, _ := newSession(t, DefaultTiming())
	s.online.Store(true)
	answers := make(chan string, 2)
	s.Send(&frames.Request{MessageID: "A", To: "15550002@s.whatsapp.net", Text: "x", TimeoutMS: 10}, func(_ any, err *frames.Error) { answers <- err.Code })
	if code := <-answers; code != frames.CodeTimeout {
		t.Fatal(code)
	}
}

func TestClassifySend(t *testing.T) {
	server := func(code string) error { return errors.Join(whatsmeow.ErrServerReturnedError, errors.New("x "+code)) }
	for _, c := range []struct {
		err    error
		code   string
		server int
	}{
		{server("463"), frames.CodeRestricted, 463},
		{server("429"), frames.CodeRateLimited, 429},
		{server("479"), frames.CodeRejected, 479},
		{&whatsmeow.IQError{Code: 429, Text: "rate-overlimit"}, frames.CodeRateLimited, 429},
		{&whatsmeow.IQError{Code: 404, Text: "item-not-found"}, frames.CodeRecipientNotFound, 404},
		{whatsmeow.ErrMessageTimedOut, frames.CodeTimeout, 0},
		{whatsmeow.ErrIQTimedOut, frames.CodeTimeout, 0},
		{&whatsmeow.DisconnectedError{Action: "message send"}, frames.CodeDisconnected, 0},
		{context.Canceled, frames.CodeDisconnected, 0},
		{whatsmeow.ErrNotConnected, frames.CodeNotConnected, 0},
		{errors.New("failed to send message node: broken pipe"), frames.CodeDisconnected, 0},
		{fmt.Errorf("prefetch: %w", syscall.EROFS), frames.CodeDiskTrouble, 0},
		{errors.New("surprise"), frames.CodeInternal, 0},
	} {
		if got := classifySend(c.err); got.Code != c.code || got.ServerCode != c.server {
			t.Errorf("%v: %+v", c.err, got)
		}
	}
}

func TestWireTellsWhoGotACiphertext(t *testing.T) {
	w := &wire{}
	recipient, own := types.JID{User: "900002", Device: 1, Server: types.HiddenUserServer}, types.JID{User: "900001", Server: types.HiddenUserServer}
	stanza := func(id string, jids ...types.JID) *waBinary.Node {
		var to []waBinary.Node
		for _, jid := range jids {
			to = append(to, node("to", waBinary.Attrs{"jid": jid}, node("enc", nil)))
		}
		n := node("message", waBinary.Attrs{"id": id}, node("participants", nil, to...))
		return &n
	}
	reached := func() bool { return w.reachedAny(func(jid types.JID) bool { return jid.User == "900002" }) }
	sent := 0
	w.watch("A", func() { sent++ })
	w.Sent(stanza("B", recipient))
	w.Sent(stanza("A", own))
	if reached() || sent != 1 {
		t.Error("a message for our own phone alone counts")
	}
	w.watch("A", func() { sent++ })
	w.Sent(stanza("A", own, recipient))
	if !reached() || sent != 2 {
		t.Error("a message for the recipient does not count")
	}
}

func TestDeviceNameIsTheSessionsOwn(t *testing.T) {
	s, _ := newSession(t, DefaultTiming())
	payload := s.cli.GetClientPayload()
	if !strings.Contains(string(payload.GetDevicePairingData().GetDeviceProps()), "Test") {
		t.Error("the name is missing")
	}
}

func ptr[T any](value T) *T { return &value }

func TestDataIsAsDocumented(t *testing.T) {
	encoded, err := json.Marshal(convertMessage(message("A", "hi"), func(types.JID) types.JID { return types.EmptyJID }, true))
	want := `{"chat":"900002@lid","sender":"900002@lid","from_me":false,"group":false,"message_id":"A","timestamp":"2023-11-14T22:13:20Z",` +
		`"push_name":"","kind":"text","text":"hi","offline":true}`
	if err != nil || string(encoded) != want {
		t.Errorf("%s %v", encoded, err)
	}
}
