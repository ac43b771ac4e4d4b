// SPDX-License-Identifier: GPL-3.0-or-later

package endpoint

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestParseProxy(t *testing.T) {
	whatsapp, foreign := &Endpoint{}, &Endpoint{override: "127.0.0.1:1"}
	for text, want := range map[string]string{
		"http://proxy.example:3128":        "http://proxy.example:3128",
		"https://u:p%40@proxy.example":     "https://u:p%40@proxy.example:443",
		"socks5://192.0.2.1":               "socks5://192.0.2.1:1080",
		"http://[2001:db8::1]/":            "http://[2001:db8::1]:80",
		"ftp://secret@proxy.example":       "",
		"secret":                           "",
		"http://":                          "",
		"http:secret":                      "",
		"http://u:secret@proxy.example/a":  "",
		"http://u:secret@proxy.example?a":  "",
		"http://u:secret@proxy.example#a":  "",
		"http://u:secret@proxy.example:x":  "",
		"http://u:secret\x7f@proxy.exampl": "",
	} {
		proxy, err := whatsapp.ParseProxy(text)
		switch {
		case want == "" && (err == nil || strings.Contains(err.Error(), "secret")):
			t.Errorf("%q: %v %v", text, proxy, err)
		case want != "" && (err != nil || proxy.String() != want):
			t.Errorf("%q: %v %v", text, proxy, err)
		}
	}
	if proxy, err := whatsapp.ParseProxy(""); proxy != nil || err != nil {
		t.Errorf("%v %v", proxy, err)
	}
	for text, ok := range map[string]bool{
		"http://127.0.0.1:1": true, "socks5://[::1]:1": true, "http://localhost:1": false, "http://192.0.2.1:1": false,
	} {
		if _, err := foreign.ParseProxy(text); (err == nil) != ok {
			t.Errorf("%q with an endpoint: %v", text, err)
		}
	}
}

// testProxy forwards what is asked for and notes it; it speaks CONNECT and SOCKS5, both with a password.
type testProxy struct {
	net.Listener
	mu    sync.Mutex
	asked []string
}

func startProxy(t *testing.T) *testProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{Listener: listener}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(conn)
		}
	}()
	return p
}

func (p *testProxy) serve(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	first, err := reader.Peek(1)
	if err != nil {
		return
	}
	var target string
	if first[0] == 5 {
		target = socks(conn, reader)
	} else {
		target = tunnel(conn, reader)
	}
	p.mu.Lock()
	p.asked = append(p.asked, target)
	p.mu.Unlock()
	onward, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer onward.Close()
	go func() { _, _ = io.Copy(onward, reader) }()
	_, _ = io.Copy(conn, onward)
}

// tunnel is the server's side of CONNECT; the target is empty for a wrong password.
func tunnel(conn net.Conn, reader *bufio.Reader) string {
	request, err := http.ReadRequest(reader)
	if err != nil {
		return ""
	}
	if request.Header.Get("Proxy-Authorization") != "Basic dTpw" { // u:p
		_, _ = io.WriteString(conn, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
		return ""
	}
	_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
	return request.Host
}

// socks is the server's side of SOCKS5 for an IPv4 address (RFC 1928, RFC 1929).
func socks(conn net.Conn, reader *bufio.Reader) string {
	read := func(n int) []byte {
		data := make([]byte, n)
		_, _ = io.ReadFull(reader, data)
		return data
	}
	read(int(read(2)[1]))
	_, _ = conn.Write([]byte{5, 2})
	user := read(int(read(2)[1]))
	password := read(int(read(1)[0]))
	if string(user) != "u" || string(password) != "p" {
		_, _ = conn.Write([]byte{1, 1})
		return ""
	}
	_, _ = conn.Write([]byte{1, 0})
	request := read(10) // version, connect, reserved, IPv4, address, port
	_, _ = conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	port := int(request[8])<<8 | int(request[9])
	return (&net.TCPAddr{IP: request[4:8], Port: port}).String()
}

func TestProxyCarriesEverything(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) }))
	defer server.Close()
	override := server.Listener.Addr().String()
	where := &Endpoint{override: override, roots: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
	for _, scheme := range []string{"http", "socks5"} {
		proxy := startProxy(t)
		url, err := where.ParseProxy(scheme + "://u:p@" + proxy.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		response, err := (&http.Client{Transport: where.transport(url)}).Get("https://web.whatsapp.com/ws/chat")
		if err != nil {
			t.Fatal(scheme, err)
		}
		body, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		proxy.mu.Lock()
		if string(body) != "web.whatsapp.com" || !slices.Equal(proxy.asked, []string{override}) {
			t.Errorf("%s: %q over %v", scheme, body, proxy.asked)
		}
		proxy.mu.Unlock()
		wrong, _ := where.ParseProxy(scheme + "://u:secret@" + proxy.Addr().String())
		_, err = (&http.Client{Transport: where.transport(wrong)}).Get("https://web.whatsapp.com/ws/chat")
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s with a wrong password: %v", scheme, err)
		}
	}
}
