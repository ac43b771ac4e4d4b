// SPDX-License-Identifier: GPL-3.0-or-later

package frames

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"
)

func TestDecodeRequestAndAnswer(t *testing.T) {
	in, err := Decode([]byte(`{"op":"send","id":17,"session":"acme","generation":3,"to":"1@lid","text":"hé","timeout_ms":5,"later":"ignored"}`))
	if err != nil {
		t.Fatal(err)
	}
	want := Request{Op: "send", ID: 17, Session: "acme", Generation: 3, To: "1@lid", Text: "hé", TimeoutMS: 5}
	if in.Request == nil || *in.Request != want || in.Answer != nil {
		t.Fatalf("got %+v", in)
	}
	in, err = Decode([]byte(`{"answer":5,"session":"acme","generation":3,"ok":true}`))
	if err != nil {
		t.Fatal(err)
	}
	if in.Answer == nil || *in.Answer != (Answer{ID: 5, Session: "acme", Generation: 3, OK: true}) {
		t.Fatalf("got %+v", in)
	}
}

func TestDecodeRefusesWhatIsNoFrame(t *testing.T) {
	for _, line := range []string{
		"", "null", "[]", "1", "{", `{}`, `{"op":"ping"}`, `{"op":"ping","id":0}`, `{"op":"ping","id":"1"}`, `{"op":"x","id":1,"answer":2}`,
		`{"answer":1,"session":"a","generation":1}`, `{"op":"open","id":1,"create":"yes"}`, "{\"op\":\"\xff\",\"id\":1}", `{"op":"ping","id":1}{}`,
	} {
		if in, err := Decode([]byte(line)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: got %+v, %v", line, in, err)
		}
	}
}

func TestReaderUnderAnySplit(t *testing.T) {
	stream := `{"op":"ping","id":1,"session":""}` + "\n" + `{"answer":2,"session":"a","generation":1,"ok":false}` + "\n"
	for name, r := range map[string]io.Reader{
		"whole": strings.NewReader(stream), "bytes": iotest.OneByteReader(strings.NewReader(stream)), "half": iotest.HalfReader(strings.NewReader(stream)),
	} {
		reader := NewReader(r)
		first, err1 := reader.Next()
		second, err2 := reader.Next()
		_, err3 := reader.Next()
		if err1 != nil || err2 != nil || first.Request == nil || second.Answer == nil || !errors.Is(err3, io.EOF) {
			t.Errorf("%s: %v %v %v", name, err1, err2, err3)
		}
	}
}

func TestReaderSizeCap(t *testing.T) {
	frame := func(size int) string {
		head, tail := `{"op":"send","id":1,"text":"`, "\"}\n"
		return head + strings.Repeat("x", size-len(head)-len(tail)) + tail
	}
	if _, err := NewReader(strings.NewReader(frame(MaxFrame))).Next(); err != nil {
		t.Fatalf("the longest frame is refused: %v", err)
	}
	if _, err := NewReader(strings.NewReader(frame(MaxFrame + 1))).Next(); !errors.Is(err, ErrTooLong) {
		t.Fatalf("got %v", err)
	}
	if _, err := NewReader(strings.NewReader(`{"op":"pi`)).Next(); !errors.Is(err, io.EOF) {
		t.Fatalf("a cut line is no end of file: %v", err)
	}
}

func TestEncodeSizeCap(t *testing.T) {
	if _, err := Encode(Event{Event: "message", Data: strings.Repeat("x", MaxFrame)}); !errors.Is(err, ErrTooLong) {
		t.Fatalf("got %v", err)
	}
	line, err := Encode((&Request{ID: 4, Session: "a"}).Reply(nil, nil))
	if err != nil || string(line) != `{"re":4,"session":"a","ok":true,"result":{}}`+"\n" {
		t.Fatalf("%q %v", line, err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"op":"send","id":17,"session":"acme","generation":3,"text":"hi"}`))
	f.Add([]byte(`{"answer":5,"session":"acme","generation":3,"ok":true}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		in, err := Decode(line)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v", err)
			}
			return
		}
		if (in.Request == nil) == (in.Answer == nil) {
			t.Fatal("neither or both")
		}
		if in.Request == nil {
			return
		}
		again, err := json.Marshal(in.Request)
		if err != nil {
			t.Fatal(err)
		}
		second, err := Decode(again)
		if err != nil || *second.Request != *in.Request {
			t.Fatalf("round trip: %+v %+v %v", in.Request, second.Request, err)
		}
	})
}

// slowPipe accepts nothing until it is opened.
type slowPipe struct {
	open chan struct{}
	mu   sync.Mutex
	buf  bytes.Buffer
}

func (p *slowPipe) Write(b []byte) (int, error) {
	<-p.open
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.buf.Write(b)
}

func TestWriterKeepsOrderAndBoundsEvents(t *testing.T) {
	pipe := &slowPipe{open: make(chan struct{})}
	w := NewWriter(pipe, func(err error) { t.Errorf("failed: %v", err) })
	big := strings.Repeat("x", MaxFrame-1000)
	sent := 0
	for ; sent < 100; sent++ {
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		err := w.Event(ctx, Event{Event: "message", ID: int64(sent + 1), Data: big})
		cancel()
		if err != nil {
			break
		}
	}
	if sent != eventBudget/MaxFrame {
		t.Fatalf("%d events of 1 MiB were taken in while nobody read", sent)
	}
	w.Respond(Response{Re: 1, OK: true}) // must not wait
	close(pipe.open)
	w.Close(5 * time.Second)
	lines := strings.Split(strings.TrimSpace(pipe.buf.String()), "\n")
	if len(lines) != sent+1 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, line := range lines[:sent] {
		var event Event
		if err := json.Unmarshal([]byte(line), &event); err != nil || event.ID != int64(i+1) {
			t.Fatalf("line %d: id %d %v", i, event.ID, err)
		}
	}
	if err := w.Event(context.Background(), Event{Event: "qr"}); !errors.Is(err, ErrWriterClosed) {
		t.Fatalf("got %v", err)
	}
}

func TestWriterReportsADaemonThatNeverReads(t *testing.T) {
	pipe := &slowPipe{open: make(chan struct{})}
	failed := make(chan error, 1)
	w := NewWriter(pipe, func(err error) { failed <- err })
	text := strings.Repeat("x", 1<<19)
	for range 2*responseBudget/(1<<19) + 2 {
		w.Respond(Response{Re: 1, OK: true, Result: text})
	}
	select {
	case err := <-failed:
		if !errors.Is(err, ErrOverflow) {
			t.Errorf("got %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("no failure reported")
	}
	close(pipe.open)
	w.Close(5 * time.Second)
}
