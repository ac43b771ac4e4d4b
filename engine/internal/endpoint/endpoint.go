// SPDX-License-Identifier: GPL-3.0-or-later

// Package endpoint decides which servers a session can reach: WhatsApp's, or one simulator on this machine and nothing else.
package endpoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"time"

	"go.mau.fi/whatsmeow"
)

const (
	dialTimeout     = 15 * time.Second
	tlsTimeout      = 10 * time.Second
	responseTimeout = 20 * time.Second
)

// Endpoint is where sessions connect to.
type Endpoint struct {
	override string // host:port; empty for WhatsApp
	roots    *x509.CertPool
}

// Parse reads the command line's endpoint, root key and CA file. A root key sets a variable of the whole process: call it once, before any session opens.
func Parse(address, rootKey, caFile string) (*Endpoint, error) {
	if address == "" {
		if rootKey != "" || caFile != "" {
			return nil, errors.New("--root-key and --ca-file are only accepted together with --endpoint: WhatsApp's own keys cannot be replaced")
		}
		return &Endpoint{}, nil
	}
	host, err := loopbackHost(address)
	if err != nil {
		return nil, err
	}
	if rootKey == "" || caFile == "" {
		return nil, errors.New("--endpoint needs --root-key and --ca-file")
	}
	key, err := hex.DecodeString(rootKey)
	if err != nil || len(key) != len(whatsmeow.WACertPubKey) {
		return nil, fmt.Errorf("--root-key is not a key of %d bytes in hexadecimal", len(whatsmeow.WACertPubKey))
	}
	roots, err := readRoots(caFile)
	if err != nil {
		return nil, err
	}
	copy(whatsmeow.WACertPubKey[:], key)
	return &Endpoint{override: host, roots: roots}, nil
}

func loopbackHost(address string) (string, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "wss" || u.Port() == "" {
		return "", fmt.Errorf("--endpoint %q is not of the form wss://127.0.0.1:PORT", address)
	}
	// Names are refused: what they resolve to can change.
	ip, err := netip.ParseAddr(u.Hostname())
	if err != nil || !ip.IsLoopback() {
		return "", fmt.Errorf("--endpoint %q is not a loopback address", address)
	}
	return u.Host, nil
}

func readRoots(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("--ca-file: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--ca-file %s holds no certificate", path)
	}
	return roots, nil
}

// Foreign reports whether sessions connect to something other than WhatsApp.
func (e *Endpoint) Foreign() bool { return e.override != "" }

// Apply sets the HTTP clients of one whatsmeow client: the sockets before and after login, and media.
func (e *Endpoint) Apply(client *whatsmeow.Client) {
	httpClient := &http.Client{Transport: e.transport()}
	client.SetPreLoginHTTPClient(httpClient)
	client.SetWebsocketHTTPClient(httpClient)
	client.SetMediaHTTPClient(httpClient)
}

func (e *Endpoint) transport() *http.Transport {
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}
	if !e.Foreign() {
		transport := http.DefaultTransport.(*http.Transport).Clone()
		transport.DialContext = dialer.DialContext
		transport.TLSHandshakeTimeout = tlsTimeout
		transport.ResponseHeaderTimeout = responseTimeout
		return transport
	}
	return &http.Transport{
		// Whatever host a URL names, and whatever proxy the environment names, every byte goes to the override.
		DialTLSContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return e.dialTLS(ctx, dialer, network)
		},
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("with --endpoint nothing is fetched without TLS")
		},
		ResponseHeaderTimeout: responseTimeout,
	}
}

func (e *Endpoint) dialTLS(ctx context.Context, dialer *net.Dialer, network string) (net.Conn, error) {
	plain, err := dialer.DialContext(ctx, network, e.override)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(e.override)
	if err != nil {
		return nil, errors.Join(err, plain.Close())
	}
	conn := tls.Client(plain, &tls.Config{RootCAs: e.roots, ServerName: host, MinVersion: tls.VersionTLS12})
	ctx, cancel := context.WithTimeout(ctx, tlsTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, plain.Close())
	}
	return conn, nil
}
