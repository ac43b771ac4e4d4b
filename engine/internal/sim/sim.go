// Package sim is a WhatsApp server with virtual phones, on loopback, which an unmodified whatsmeow client accepts. The
// contract is docs/simulator.md.
package sim

import (
	"encoding/hex"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"time"

	"go.mau.fi/whatsmeow/util/keys"

	"warren/engine/internal/sim/control"
	"warren/engine/internal/sim/noise"
	"warren/engine/internal/sim/random"
	"warren/engine/internal/sim/server"
)

const (
	headerTimeout = 10 * time.Second
	writeTimeout  = 10 * time.Second
)

// Config says where to listen. The zero value means free ports on 127.0.0.1, a new root key and no logs.
type Config struct {
	Listen, Control string
	// RootKey signs the Noise certificates. A client process can pin one root only, so simulators that are to serve the
	// same process one after the other share it.
	RootKey *keys.KeyPair
	// WriteTimeout is how long a client may not read before it is cut; 0 means 10 s.
	WriteTimeout time.Duration
	// Seed makes keys and ids repeat themselves; docs/simulator.md says which.
	Seed *uint64
	Log  *slog.Logger
}

// Simulator is a running simulator.
type Simulator struct {
	// API creates and drives phones; it is also what the control address serves.
	API *control.API

	srv             *server.Server
	identity        *noise.Identity
	caPEM           []byte
	wa, control     *http.Server
	waAddr, ctlAddr net.Addr
}

// Start starts a simulator.
func Start(cfg Config) (*Simulator, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var source random.Source
	if cfg.Seed != nil {
		source = random.Seeded(*cfg.Seed)
	}
	serverKeys := source.Stream("noise")
	if root := serverKeys.KeyPair(); cfg.RootKey == nil {
		cfg.RootKey = root
	}
	if cfg.WriteTimeout == 0 {
		cfg.WriteTimeout = writeTimeout
	}
	identity, err := noise.NewIdentity(cfg.RootKey, serverKeys.KeyPair(), serverKeys.KeyPair(), time.Now())
	if err != nil {
		return nil, err
	}
	tlsConfig, caPEM, err := newTLS(time.Now())
	if err != nil {
		return nil, err
	}
	waListener, err := listenLoopback(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("endpoint: %w", err)
	}
	controlListener, err := listenLoopback(cfg.Control)
	if err != nil {
		_ = waListener.Close() // nothing was served on it
		return nil, fmt.Errorf("control: %w", err)
	}
	srv := server.New(identity, cfg.WriteTimeout, source, cfg.Log)
	s := &Simulator{
		API: control.New(srv, source, cfg.Log), srv: srv, identity: identity, caPEM: caPEM,
		waAddr: waListener.Addr(), ctlAddr: controlListener.Addr(),
	}
	// http.Server writes TLS handshakes that fail, and the like, to this logger.
	httpLog := slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug)
	s.wa = newHTTP(srv, httpLog)
	s.wa.TLSConfig, s.wa.ConnContext = tlsConfig, server.ConnContext
	s.control = newHTTP(s.API, httpLog)
	go s.serve(cfg.Log, func() error { return s.wa.ServeTLS(faultyListener{waListener, srv}, "", "") })
	go s.serve(cfg.Log, func() error { return s.control.Serve(controlListener) })
	return s, nil
}

func newHTTP(handler http.Handler, errorLog *log.Logger) *http.Server {
	return &http.Server{Handler: handler, ReadHeaderTimeout: headerTimeout, ErrorLog: errorLog}
}

func (s *Simulator) serve(log *slog.Logger, run func() error) {
	if err := run(); !errors.Is(err, http.ErrServerClosed) {
		log.Error("listener failed", "action", "listener_failed", "error", err)
	}
}

// faultyListener closes what it accepted when a fault says so.
type faultyListener struct {
	net.Listener
	srv *server.Server
}

func (l faultyListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || !l.srv.RefusesTCP() {
			return conn, err
		}
		_ = conn.Close() // nothing was said on it
	}
}

// listenLoopback refuses every address that another machine could reach.
func listenLoopback(address string) (net.Listener, error) {
	if address == "" {
		address = "127.0.0.1:0"
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("%q is not a loopback address", host)
	}
	return net.Listen("tcp", address)
}

// Endpoint is the websocket address for clients.
func (s *Simulator) Endpoint() string { return "wss://" + s.waAddr.String() }

// ControlURL is the base of the control API.
func (s *Simulator) ControlURL() string { return "http://" + s.ctlAddr.String() }

// Root is the public key that clients must pin.
func (s *Simulator) Root() [32]byte { return s.identity.Root }

// RootKeyHex is Root in hexadecimal.
func (s *Simulator) RootKeyHex() string { return hex.EncodeToString(s.identity.Root[:]) }

// CAPEM is the certificate of the CA to trust.
func (s *Simulator) CAPEM() []byte { return s.caPEM }

// Close cuts all connections at once: the simulator keeps nothing that would need an orderly end.
func (s *Simulator) Close() error {
	err := errors.Join(s.wa.Close(), s.control.Close())
	s.srv.Close()
	return err
}
