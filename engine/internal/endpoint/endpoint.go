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

// Apply sets the HTTP clients of one whatsmeow client: the sockets before and after login, and media. proxy is from ParseProxy.
func (e *Endpoint) Apply(client *whatsmeow.Client, proxy *url.URL) {
	httpClient := &http.Client{Transport: e.transport(proxy)}
	client.SetPreLoginHTTPClient(httpClient)
	client.SetWebsocketHTTPClient(httpClient)
	client.SetMediaHTTPClient(httpClient)
}

func (e *Endpoint) transport(proxy *url.URL) http.RoundTripper {
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}
	if e.Foreign() {
		return e.redirected(dialer, proxy)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext = dialer.DialContext
	transport.TLSHandshakeTimeout = tlsTimeout
	transport.ResponseHeaderTimeout = responseTimeout
	if proxy != nil {
		transport.Proxy = http.ProxyURL(proxy)
	}
	return transport
}

// redirected sends every request to the override, whatever host its URL names. The dialer is held to that once more: nothing but the override, or the
// session's proxy, is ever contacted; a proxy that the environment names is not asked.
func (e *Endpoint) redirected(dialer *net.Dialer, proxy *url.URL) http.RoundTripper {
	allowed := e.override
	if proxy != nil {
		allowed = proxy.Host
	}
	return &redirection{to: e.override, inner: &http.Transport{
		Proxy: http.ProxyURL(proxy),
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if address != allowed {
				return nil, fmt.Errorf("with --endpoint %s is not contacted", address)
			}
			return dialer.DialContext(ctx, network, address)
		},
		TLSClientConfig:       &tls.Config{RootCAs: e.roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   tlsTimeout,
		ResponseHeaderTimeout: responseTimeout,
	}}
}

type redirection struct {
	to    string
	inner *http.Transport
}

func (r *redirection) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.URL.Scheme != "https" {
		if request.Body != nil {
			_ = request.Body.Close()
		}
		return nil, errors.New("with --endpoint nothing is fetched without TLS")
	}
	redirected := request.Clone(request.Context())
	if redirected.Host == "" {
		redirected.Host = request.URL.Host
	}
	redirected.URL.Host = r.to
	return r.inner.RoundTrip(redirected)
}

// CloseIdleConnections is what http.Client looks for.
func (r *redirection) CloseIdleConnections() { r.inner.CloseIdleConnections() }
