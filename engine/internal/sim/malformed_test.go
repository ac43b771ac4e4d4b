package sim_test

import (
	"context"
	"crypto/rand"
	"testing"
	"time"

	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/socket"
	"go.mau.fi/whatsmeow/util/keys"
	waLog "go.mau.fi/whatsmeow/util/log"
	"google.golang.org/protobuf/proto"
)

// TestMalformedFramesEndTheConnection sends bytes that no client sends, some of which make whatsmeow's decoder panic: the
// connection ends, and nothing else.
func TestMalformedFramesEndTheConnection(t *testing.T) {
	w := newWorld(t)
	w.phone(ana)
	frames := [][]byte{
		{},                       // not even a flag byte
		{0},                      // no node
		{2, 1, 2, 3},             // "compressed"
		{0, 248, 1, 250, 250, 0}, // a JID in a JID where the tag should be
		{0, 248, 3, 3, 4, 250, 250, 250, 3, 3, 3, 3}, // and as an attribute
		{0, 249, 255, 255, 3},                        // a list longer than the frame
	}
	for range 20 {
		noise := make([]byte, 64)
		_, _ = rand.Read(noise)
		frames = append(frames, append([]byte{0}, noise...))
	}
	for _, frame := range frames {
		raw := w.raw()
		if err := raw.SendFrame(t.Context(), frame); err != nil {
			t.Fatal(err)
		}
		// Random bytes may be a stanza that means nothing; a client that goes away ends the connection too.
		time.AfterFunc(50*time.Millisecond, func() { raw.Stop(true, true) })
		until(t, "connection closed", func() bool { return w.connections() == 0 })
	}
	w.link(t, ana)
}

// TestBadPayloadIsRefused completes the handshake with a payload that neither logs in nor pairs.
func TestBadPayloadIsRefused(t *testing.T) {
	w := newWorld(t)
	w.raw()
	until(t, "connection closed", func() bool { return w.connections() == 0 })
}

// raw is a connection after the handshake, on which the test says what it likes.
func (w *world) raw() *socket.NoiseSocket {
	w.Helper()
	fs, nh := w.shakeHands(nil)
	ns, err := nh.Finish(w.Context(), fs, func(context.Context, []byte) {}, func(context.Context, *socket.NoiseSocket, bool) {})
	if err != nil {
		w.Fatal(err)
	}
	return ns
}

// shakeHands is a connection on which all of the handshake is said, with this payload at its end.
func (w *world) shakeHands(payload []byte) (*socket.FrameSocket, *socket.NoiseHandshake) {
	w.Helper()
	fs := socket.NewFrameSocket(waLog.Noop, w.dial)
	check := func(err error) {
		w.Helper()
		if err != nil {
			w.Fatal(err)
		}
	}
	check(fs.Connect(w.Context()))
	ephemeral, static := keys.NewKeyPair(), keys.NewKeyPair()
	nh := socket.NewNoiseHandshake()
	nh.Start(socket.NoiseStartPattern, fs.Header)
	nh.Authenticate(ephemeral.Pub[:])
	send := func(message *waWa6.HandshakeMessage) {
		data, err := proto.Marshal(message)
		check(err)
		check(fs.SendFrame(data))
	}
	send(&waWa6.HandshakeMessage{ClientHello: &waWa6.HandshakeMessage_ClientHello{Ephemeral: ephemeral.Pub[:]}})
	var answer waWa6.HandshakeMessage
	check(proto.Unmarshal(<-fs.Frames, &answer))
	hello := answer.GetServerHello()
	nh.Authenticate(hello.GetEphemeral())
	check(nh.MixSharedSecretIntoKey(*ephemeral.Priv, [32]byte(hello.GetEphemeral())))
	serverStatic, err := nh.Decrypt(hello.GetStatic())
	check(err)
	check(nh.MixSharedSecretIntoKey(*ephemeral.Priv, [32]byte(serverStatic)))
	_, err = nh.Decrypt(hello.GetPayload())
	check(err)
	finish := &waWa6.HandshakeMessage_ClientFinish{Static: nh.Encrypt(static.Pub[:])}
	check(nh.MixSharedSecretIntoKey(*static.Priv, [32]byte(hello.GetEphemeral())))
	finish.Payload = nh.Encrypt(payload)
	send(&waWa6.HandshakeMessage{ClientFinish: finish})
	return fs, nh
}
