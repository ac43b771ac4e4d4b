// SPDX-License-Identifier: GPL-3.0-or-later

package logs

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"go.mau.fi/libsignal/logger"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

func TestNothingPersonalReachesTheLog(t *testing.T) {
	var out bytes.Buffer
	log := New(&out, slog.LevelInfo)
	wa := Whatsmeow(log.With(KeySession, "15559998877"), nil)
	stanza := &waBinary.Node{
		Tag: "message", Attrs: waBinary.Attrs{"id": "3EB0", "notify": "Ana Secret", "from": types.NewJID("15551234567", types.DefaultUserServer)},
		Content: []byte("ciphertext"),
	}
	wa.Sub("Client").Warnf("Node handling took %s for %s", time.Second, stanza)
	wa.Errorf("Failed to get LID for %s: %v", types.NewJID("15551234567", types.DefaultUserServer), errors.New("no row for 15551234567"))
	wa.Sub("Recv").Debugf("%s", stanza)
	log.Error("x", KeyError, errors.New("key AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= of 15551234567"))
	text := out.String()
	for _, secret := range []string{"15551234567", "Ana Secret", "ciphertext", "AAAAAAAA"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is in the log:\n%s", secret, text)
		}
	}
	for _, wanted := range []string{`"session":"15559998877"`, "<message id=3EB0>", "…67@s.whatsapp.net", `"module":"Client"`} {
		if !strings.Contains(text, wanted) {
			t.Errorf("%q is not in the log:\n%s", wanted, text)
		}
	}
}

type recordingTap struct{ received, sent []string }

func (r *recordingTap) Received(n *waBinary.Node) { r.received = append(r.received, n.Tag) }
func (r *recordingTap) Sent(n *waBinary.Node)     { r.sent = append(r.sent, n.Tag) }

func TestTapSeesStanzas(t *testing.T) {
	tap := &recordingTap{}
	wa := Whatsmeow(slog.New(slog.DiscardHandler), tap)
	wa.Sub("Recv").Debugf("%s", &waBinary.Node{Tag: "success"})
	wa.Sub("Send").Debugf("%s", &waBinary.Node{Tag: "receipt"})
	wa.Sub("Send").Debugf("other line %s", "text")
	wa.Debugf("%s", &waBinary.Node{Tag: "message"})
	if len(tap.received) != 1 || tap.received[0] != "success" || len(tap.sent) != 1 || tap.sent[0] != "receipt" {
		t.Fatalf("%+v", tap)
	}
}

func TestLibsignalIsQuiet(t *testing.T) {
	var out bytes.Buffer
	SetupLibsignal(New(&out, slog.LevelDebug))
	logger.Debug("private key of the session")
	logger.Error("no session for ", "15551234567")
	if text := out.String(); strings.Contains(text, "private") || strings.Contains(text, "15551234567") || !strings.Contains(text, "no session") {
		t.Error(text)
	}
}

type stuck struct{ release chan struct{} }

func (s stuck) Write(p []byte) (int, error) { <-s.release; return len(p), nil }

func TestOutputNeverBlocks(t *testing.T) {
	w := stuck{release: make(chan struct{})}
	out := NewOutput(w)
	for range 2 * queuedLines {
		_, _ = out.Write([]byte("line\n"))
	}
	if out.Dropped() < queuedLines-1 {
		t.Fatalf("dropped %d", out.Dropped())
	}
	close(w.release)
	out.Close(5 * time.Second)
}
