// SPDX-License-Identifier: GPL-3.0-or-later

package engine

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/store"

	"warren/engine/internal/endpoint"
	"warren/engine/internal/frames"
	"warren/engine/internal/session"
	"warren/engine/internal/waversion"
)

// asker answers as web.whatsapp.com and counts.
type asker struct {
	asked atomic.Int32
	block chan struct{}
}

func (a *asker) RoundTrip(request *http.Request) (*http.Response, error) {
	a.asked.Add(1)
	select {
	case <-a.block:
	case <-request.Context().Done():
		return nil, request.Context().Err()
	}
	return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(`{"client_revision":2999999999,`))}, nil
}

// serve runs an engine and returns what sends a ping to it, and its version cache.
func serve(t *testing.T, where *endpoint.Endpoint, web *asker) (ping func() map[string]any, cache string) {
	t.Helper()
	ours, theirs := net.Pipe()
	cache = filepath.Join(t.TempDir(), "version.json")
	status := make(chan int, 1)
	go func() {
		status <- Run(Options{
			Pipe: theirs, Endpoint: where, Log: slog.New(slog.DiscardHandler), MaxSessions: 1, Stop: make(chan struct{}),
			VersionCache: cache, VersionHTTP: &http.Client{Transport: web},
		})
	}()
	t.Cleanup(func() {
		_ = ours.Close()
		if got := <-status; got != ExitOK {
			t.Errorf("exit status %d", got)
		}
	})
	lines := bufio.NewReader(ours)
	read := func() (frame struct{ Result map[string]any }) {
		t.Helper()
		_ = ours.SetDeadline(time.Now().Add(5 * time.Second))
		line, err := lines.ReadBytes('\n')
		if err != nil || json.Unmarshal(line, &frame) != nil {
			t.Fatalf("%q %v", line, err)
		}
		return frame
	}
	read() // hello
	return func() map[string]any {
		t.Helper()
		if _, err := io.WriteString(ours, `{"op":"ping","id":1,"session":""}`+"\n"); err != nil {
			t.Fatal(err)
		}
		return read().Result
	}, cache
}

func TestVersionIsAskedForInTheBackground(t *testing.T) {
	where, err := endpoint.Parse("", "", "")
	if err != nil {
		t.Fatal(err)
	}
	web := &asker{block: make(chan struct{})}
	ping, cache := serve(t, where, web)
	// The engine serves while nobody answers.
	if result := ping(); result["wa_version"] != store.GetWAVersion().String() || result["wa_version_age_s"] != nil {
		t.Errorf("%v", result)
	}
	close(web.block)
	end := time.Now().Add(5 * time.Second)
	for ping()["wa_version"] != "2.3000.2999999999" {
		if time.Now().After(end) {
			t.Fatal("the version is not taken")
		}
	}
	if age := ping()["wa_version_age_s"]; age == nil || age.(float64) > 5 {
		t.Errorf("age %v", age)
	}
	for {
		if _, err := os.Stat(cache); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the version is not cached")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestAStopDoesNotWaitForAVersion stops while an open waits for a new version after a refusal.
func TestAStopDoesNotWaitForAVersion(t *testing.T) {
	web := waversion.New(waversion.Options{HTTP: &http.Client{Transport: &asker{block: make(chan struct{})}}, Log: slog.New(slog.DiscardHandler)})
	version, _ := web.Current()
	web.Refused(version)
	e := &Engine{Options: Options{Log: slog.New(slog.DiscardHandler)}, web: web}
	e.ctx, e.cancel = context.WithCancel(t.Context())
	e.opens, e.refuse = context.WithCancel(e.ctx)
	time.AfterFunc(20*time.Millisecond, func() { e.refuseNew() })
	start := time.Now()
	if s, err := e.openUnlessStopping(&session.Options{}); s != nil || err == nil || err.Code != frames.CodeBusy || time.Since(start) > 5*time.Second {
		t.Errorf("%v %v after %s", s, err, time.Since(start))
	}
}

func TestVersionIsNotAskedForWithAnEndpoint(t *testing.T) {
	key := whatsmeow.WACertPubKey
	defer func() { whatsmeow.WACertPubKey = key }()
	where, err := endpoint.Parse("wss://127.0.0.1:9", strings.Repeat("ab", 32), "testdata/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	web := &asker{block: make(chan struct{})}
	close(web.block)
	ping, cache := serve(t, where, web)
	for range 50 {
		if result := ping(); result["wa_version"] != store.GetWAVersion().String() || result["wa_version_age_s"] != nil {
			t.Fatalf("%v", result)
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := os.Stat(cache); web.asked.Load() != 0 || err == nil {
		t.Errorf("asked %d times", web.asked.Load())
	}
}
