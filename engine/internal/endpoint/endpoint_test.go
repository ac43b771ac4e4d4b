// SPDX-License-Identifier: GPL-3.0-or-later

package endpoint

import (
	"context"
	"encoding/hex"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.mau.fi/whatsmeow"
)

func TestParseRefuses(t *testing.T) {
	key := strings.Repeat("ab", 32)
	before := whatsmeow.WACertPubKey
	for name, c := range map[string][3]string{
		"key alone":      {"", key, ""},
		"CA alone":       {"", "", "/ca.pem"},
		"not loopback":   {"wss://192.0.2.1:443", key, "/ca.pem"},
		"a name":         {"wss://localhost:443", key, "/ca.pem"},
		"no TLS":         {"ws://127.0.0.1:443", key, "/ca.pem"},
		"no port":        {"wss://127.0.0.1", key, "/ca.pem"},
		"no key":         {"wss://127.0.0.1:443", "", "/ca.pem"},
		"short key":      {"wss://127.0.0.1:443", "abcd", "/ca.pem"},
		"no such file":   {"wss://127.0.0.1:443", key, "/does/not/exist"},
		"no certificate": {"wss://127.0.0.1:443", key, os.DevNull},
	} {
		if _, err := Parse(c[0], c[1], c[2]); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if whatsmeow.WACertPubKey != before {
		t.Error("WhatsApp's key was replaced by a refused command line")
	}
	if where, err := Parse("", "", ""); err != nil || where.Foreign() {
		t.Errorf("%v %v", where, err)
	}
}

// TestNothingElseIsContacted asks for WhatsApp's own hosts and must land at the override.
func TestNothingElseIsContacted(t *testing.T) {
	before := whatsmeow.WACertPubKey
	defer func() { whatsmeow.WACertPubKey = before }()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) }))
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	key := strings.Repeat("ab", 32)
	where, err := Parse("wss://"+server.Listener.Addr().String(), key, ca)
	if err != nil || !where.Foreign() || hex.EncodeToString(whatsmeow.WACertPubKey[:]) != key {
		t.Fatalf("%v %v", where, err)
	}
	t.Setenv("HTTPS_PROXY", "http://192.0.2.1:1")
	client := &http.Client{Transport: where.transport(nil)}
	for _, host := range []string{"web.whatsapp.com", "mmg.whatsapp.net"} {
		response, err := client.Get("https://" + host + "/x")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if string(body) != host {
			t.Errorf("%q answered for %s", body, host)
		}
	}
	request, _ := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://mmg.whatsapp.net/x", nil)
	if response, err := client.Do(request); err == nil {
		_ = response.Body.Close()
		t.Error("a request without TLS went out")
	}
}
