// Package link turns a websocket into WhatsApp stanzas: length-prefixed frames, Noise, binary XML.
package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/coder/websocket"
	waBinary "go.mau.fi/whatsmeow/binary"

	"warren/engine/internal/sim/noise"
)

const (
	// HandshakeTimeout bounds websocket upgrade to ClientFinish; whatsmeow waits as long for its half.
	HandshakeTimeout = 20 * time.Second
	lengthSize       = 3
	frameMaxSize     = 1 << 24
	headerSize       = 4
)

// edgeRouting is how a client prefixes the routing information it was given at an earlier login.
var edgeRouting = []byte{'E', 'D', 0, 1}

// connHeader begins every connection; the fourth byte is the version of the token dictionary.
var connHeader = []byte{'W', 'A', 6}

// ErrMalformed is returned for bytes that are no WhatsApp frame or stanza.
var ErrMalformed = errors.New("malformed frame")

// Conn is one client's connection. ReadNode and WriteNode may run side by side, each from one goroutine.
type Conn struct {
	ws           *websocket.Conn
	raw          net.Conn
	writeTimeout time.Duration
	result       *noise.Result
	buffer       []byte
}

// Accept runs the Noise handshake on a fresh websocket. Raw is the connection under it, for Abort; writeTimeout is how
// long one frame may take to leave before its reader counts as gone.
func Accept(ctx context.Context, ws *websocket.Conn, raw net.Conn, identity *noise.Identity, writeTimeout time.Duration) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, HandshakeTimeout)
	defer cancel()
	ws.SetReadLimit(frameMaxSize + headerSize + lengthSize)
	c := &Conn{ws: ws, raw: raw, writeTimeout: writeTimeout}
	prologue, err := c.readHeader(ctx)
	if err != nil {
		return nil, fmt.Errorf("connection header: %w", err)
	}
	c.result, err = identity.Respond(handshakeFrames{c, ctx}, prologue)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Payload is the encoded ClientPayload of the handshake.
func (c *Conn) Payload() []byte { return c.result.Payload }

// ClientStatic is the client's Noise key.
func (c *Conn) ClientStatic() [32]byte { return c.result.ClientStatic }

// ReadNode returns the next stanza. It never panics: whatsmeow's decoder does on some malformed frames.
func (c *Conn) ReadNode(ctx context.Context) (node *waBinary.Node, err error) {
	defer func() {
		if p := recover(); p != nil {
			node, err = nil, fmt.Errorf("%w: decoder: %v", ErrMalformed, p)
		}
	}()
	frame, err := c.readFrame(ctx)
	if err != nil {
		return nil, err
	}
	plaintext, err := c.result.Recv.Open(frame)
	if err != nil {
		return nil, fmt.Errorf("decrypt frame: %w", err)
	}
	if len(plaintext) == 0 {
		return nil, fmt.Errorf("%w: empty", ErrMalformed)
	}
	unpacked, err := waBinary.Unpack(plaintext)
	if err != nil {
		return nil, fmt.Errorf("unpack frame: %w", err)
	}
	return waBinary.Unmarshal(unpacked)
}

// WriteNode sends one stanza.
func (c *Conn) WriteNode(ctx context.Context, node waBinary.Node) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("encode %s: %v", node.Tag, p)
		}
	}()
	data, err := waBinary.Marshal(node)
	if err != nil {
		return fmt.Errorf("encode %s: %w", node.Tag, err)
	}
	return c.WritePlain(ctx, data)
}

// WritePlain sends any bytes as a frame: with them a client can be given what is no stanza.
func (c *Conn) WritePlain(ctx context.Context, data []byte) error {
	return c.writeFrame(ctx, c.result.Send.Seal(data))
}

// Close says goodbye on the websocket and closes it.
func (c *Conn) Close() {
	_ = c.ws.Close(websocket.StatusNormalClosure, "") // the peer may be gone already: nothing is left to do then
}

// Abort cuts the TCP connection with a reset: no TLS alert, no websocket close.
func (c *Conn) Abort() {
	tcp := c.raw
	if wrapped, ok := tcp.(*tls.Conn); ok {
		tcp = wrapped.NetConn()
	}
	if t, ok := tcp.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // fails only on a closed connection
	}
	_ = tcp.Close()
	_ = c.ws.CloseNow() // releases the websocket's own goroutines and buffers
}

// readHeader reads the bytes before the first frame; they are not length-prefixed.
func (c *Conn) readHeader(ctx context.Context) ([]byte, error) {
	first, err := c.take(ctx, headerSize)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(first, edgeRouting) {
		if _, err := c.readFrame(ctx); err != nil {
			return nil, err
		}
		if first, err = c.take(ctx, headerSize); err != nil {
			return nil, err
		}
	}
	if !bytes.HasPrefix(first, connHeader) {
		return nil, ErrMalformed
	}
	return first, nil
}

func (c *Conn) readFrame(ctx context.Context) ([]byte, error) {
	prefix, err := c.take(ctx, lengthSize)
	if err != nil {
		return nil, err
	}
	return c.take(ctx, int(prefix[0])<<16|int(prefix[1])<<8|int(prefix[2]))
}

// take returns the next n bytes of the stream: frames need not match websocket messages.
func (c *Conn) take(ctx context.Context, n int) ([]byte, error) {
	for len(c.buffer) < n {
		kind, data, err := c.ws.Read(ctx)
		if err != nil {
			return nil, err
		}
		if kind != websocket.MessageBinary {
			return nil, fmt.Errorf("%w: text message", ErrMalformed)
		}
		if len(c.buffer) == 0 {
			c.buffer = data
		} else {
			c.buffer = append(c.buffer, data...)
		}
	}
	// The capacity is cut so that nobody who appends to a frame writes into the next one.
	taken := c.buffer[:n:n]
	c.buffer = c.buffer[n:]
	return taken, nil
}

func (c *Conn) writeFrame(ctx context.Context, data []byte) error {
	if len(data) >= frameMaxSize {
		return fmt.Errorf("frame of %d bytes is too long", len(data))
	}
	ctx, cancel := context.WithTimeout(ctx, c.writeTimeout)
	defer cancel()
	frame := make([]byte, lengthSize, lengthSize+len(data))
	frame[0], frame[1], frame[2] = byte(len(data)>>16), byte(len(data)>>8), byte(len(data))
	return c.ws.Write(ctx, websocket.MessageBinary, append(frame, data...))
}

// handshakeFrames is Conn for the duration of the handshake.
type handshakeFrames struct {
	conn *Conn
	ctx  context.Context //nolint:containedctx // lives as long as one call of Accept
}

func (f handshakeFrames) ReadFrame() ([]byte, error)   { return f.conn.readFrame(f.ctx) }
func (f handshakeFrames) WriteFrame(data []byte) error { return f.conn.writeFrame(f.ctx, data) }
