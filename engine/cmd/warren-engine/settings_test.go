// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"database/sql"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// connectProxy is an HTTP proxy on loopback that can do nothing but CONNECT.
type connectProxy struct {
	address string

	mu       sync.Mutex
	targets  []string
	accounts []string
}

func startConnectProxy(t *testing.T) *connectProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &connectProxy{address: listener.Addr().String()}
	server := &http.Server{Handler: p}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return p
}

func (p *connectProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.targets = append(p.targets, r.Method+" "+r.Host)
	p.accounts = append(p.accounts, r.Header.Get("Proxy-Authorization"))
	p.mu.Unlock()
	onward, err := net.Dial("tcp", r.Host)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer onward.Close()
	conn, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
	go func() { _, _ = io.Copy(onward, buffered) }()
	_, _ = io.Copy(conn, onward)
}

func TestProxy(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	d.must("close", "acme", 2, nil)
	proxy := startConnectProxy(t)
	open := func(url string) map[string]any { return map[string]any{"dir": dir, "proxy": url} }
	for _, wrong := range []string{"ftp://user:hunter2@127.0.0.1", "http://user:hunter2@proxy.example:1", "hunter2", "http://user:hunter2@127.0.0.1:x"} {
		d.refused("bad_request", "open", "acme", 3, open(wrong))
	}
	d.must("open", "acme", 3, open("http://user:hunter2@"+proxy.address))
	d.event("acme", 3, "connected")
	if sent := d.send("acme", 3, "VIAPROXY", jidOf(other), "through"); !sent.OK {
		t.Errorf("%v", sent.Error)
	}
	eventually(t, "the phone shows it", func() bool { return slices.Equal(sim.shown(t, other, own), []string{"through"}) })
	want := "CONNECT " + strings.TrimPrefix(sim.Endpoint, "wss://")
	proxy.mu.Lock()
	if len(proxy.targets) == 0 || slices.ContainsFunc(proxy.targets, func(target string) bool { return target != want }) {
		t.Errorf("asked for %v instead of %s", proxy.targets, want)
	}
	if proxy.accounts[0] != "Basic dXNlcjpodW50ZXIy" {
		t.Errorf("credentials %v", proxy.accounts)
	}
	proxy.mu.Unlock()
	d.must("close", "acme", 3, nil)
	// Without its proxy the session does not connect some other way.
	d.must("open", "acme", 4, open("socks5://user:hunter2@127.0.0.1:1"))
	end := d.event("acme", 4, "disconnected")
	if end.text("reason") != "network" {
		t.Errorf("%v", end.Data)
	}
	everything := d.stderr.String()
	for _, f := range d.all(func(frame) bool { return true }) {
		for _, part := range []map[string]any{f.Data, f.Error} {
			if message, ok := part["message"].(string); ok {
				everything += message
			}
		}
	}
	if strings.Contains(everything, "hunter2") {
		t.Error("the proxy's password is in the log or in a frame")
	}
}

func TestPresence(t *testing.T) {
	sim, d, dir := pairedEngine(t)
	if strings.Contains(d.stderr.String(), "presence told") {
		t.Error("presence was told without a name")
	}
	d.must("close", "acme", 2, nil)
	// The simulator has no app state, which is where a device learns its account's name.
	database, err := sql.Open("sqlite3", "file:"+filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := database.Exec("UPDATE whatsmeow_device SET push_name='Ana'"); err != nil {
		t.Fatal(err)
	}
	_ = database.Close()
	for i, word := range []string{"unavailable", "available"} {
		generation := int64(3 + i)
		d.must("open", "acme", generation, map[string]any{"dir": dir, "mark_online": word == "available"})
		d.event("acme", generation, "connected")
		eventually(t, "presence "+word, func() bool { return strings.Contains(d.stderr.String(), `"presence":"`+word+`"`) })
		// The sender sees its two ticks either way.
		id := sim.sendTo(t, other, own, "hello", 1)[0]
		eventually(t, "delivered while "+word, func() bool { return slices.Contains(sim.deliveredTo(t, other, id), own+":1@s.whatsapp.net") })
		d.must("close", "acme", generation, nil)
	}
}

// deliveredTo lists the devices that have sent a delivery receipt for a message of this phone.
func (s *simulator) deliveredTo(t testing.TB, number, id string) (devices []string) {
	t.Helper()
	for _, entry := range s.call(t, "GET", "/phones/"+number+"/sent", nil)["messages"].([]any) {
		message := entry.(map[string]any)
		if list, ok := message["delivered_to"].([]any); ok && message["message_id"] == id {
			for _, device := range list {
				devices = append(devices, device.(string))
			}
		}
	}
	return devices
}
