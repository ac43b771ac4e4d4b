// SPDX-License-Identifier: GPL-3.0-or-later

package waversion

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/store"
)

// page is WhatsApp's web page; it counts how often it is asked for.
type page struct {
	asked    atomic.Int32
	revision uint32
	status   int
	body     string
	err      error
	block    chan struct{} // not nil: answers when it is closed
}

func (p *page) RoundTrip(request *http.Request) (*http.Response, error) {
	p.asked.Add(1)
	if p.block != nil {
		select {
		case <-p.block:
		case <-request.Context().Done():
			return nil, request.Context().Err()
		}
	}
	if p.err != nil {
		return nil, p.err
	}
	body := p.body
	if body == "" {
		body = fmt.Sprintf(`<script>{"client_revision":%d,"x":1}</script>`, p.revision)
	}
	status := http.StatusOK
	if p.status != 0 {
		status = p.status
	}
	return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(body)), Header: http.Header{}}, nil
}

var newer = store.WAVersionContainer{2, 3000, 2999999999}

func newKeeper(p *page, change func(*Options)) *Keeper {
	options := Options{HTTP: &http.Client{Transport: p}, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&options)
	}
	return New(options)
}

func run(t *testing.T, k *Keeper) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if condition() {
			return
		}
	}
	t.Fatalf("not reached: %s", what)
}

func TestRefreshAtStartAndCache(t *testing.T) {
	path := filepath.Join(t.TempDir(), "version.json")
	p := &page{revision: newer[2]}
	withCache := func(o *Options) { o.CachePath = path }
	first := newKeeper(p, withCache)
	if version, age := first.Current(); version != store.GetWAVersion() || age >= 0 {
		t.Fatalf("%s %s", version, age)
	}
	run(t, first)
	eventually(t, "the file", func() bool { _, err := os.Stat(path); return err == nil })
	if version, age := first.Current(); version != newer || age < 0 || age > time.Minute {
		t.Errorf("%s %s", version, age)
	}
	if files, _ := os.ReadDir(filepath.Dir(path)); len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
	second := newKeeper(p, withCache)
	if version, age := second.Current(); version != newer || age < 0 || age > time.Minute {
		t.Errorf("from the cache: %s %s", version, age)
	}
	run(t, second) // young: nobody is asked
	third := newKeeper(&page{err: errors.New("no network")}, withCache)
	run(t, third)
	if version, _ := third.Current(); version != newer || p.asked.Load() != 1 {
		t.Errorf("%s, asked %d times", version, p.asked.Load())
	}
}

func TestBadCacheIsNoCache(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "no version": `{}`, "zero": `{"version":"0.0.0"}`, "too large": `{"version":"2.3000.4294967296"}`,
		"older than the build": `{"version":"2.2000.1","confirmed_at":"2020-01-01T00:00:00Z"}`,
	} {
		path := filepath.Join(t.TempDir(), "version.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		k := newKeeper(&page{}, func(o *Options) { o.CachePath = path })
		if version, _ := k.Current(); version != store.GetWAVersion() {
			t.Errorf("%s: %s", name, version)
		}
	}
	path := filepath.Join(t.TempDir(), "version.json")
	if err := writeCache(path, cached{newer, time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	k := newKeeper(&page{}, func(o *Options) { o.CachePath = path })
	if version, age := k.Current(); version != newer || age >= 0 {
		t.Errorf("from the future: %s %s", version, age)
	}
}

func TestNothingIsAskedOfflineOrPinned(t *testing.T) {
	pinned := store.WAVersionContainer{2, 3000, 1}
	for name, change := range map[string]func(*Options){
		"offline": func(o *Options) { o.Offline = true },
		"pinned":  func(o *Options) { o.Pinned = pinned },
	} {
		p := &page{revision: newer[2]}
		k := newKeeper(p, change)
		before, _ := k.Current()
		k.Run(t.Context()) // returns
		k.Refused(before)
		k.BeforeOpen(t.Context())
		if after, age := k.Current(); after != before || age >= 0 || p.asked.Load() != 0 {
			t.Errorf("%s: %s, asked %d times", name, after, p.asked.Load())
		}
		if name == "pinned" && before != pinned {
			t.Errorf("%s", before)
		}
	}
}

func TestARefusedVersionIsRefreshedBeforeTheNextOpen(t *testing.T) {
	p := &page{revision: newer[2]}
	k := newKeeper(p, nil)
	k.BeforeOpen(t.Context())
	if p.asked.Load() != 0 {
		t.Fatal("asked without need")
	}
	old, _ := k.Current()
	k.Refused(old)
	var opens sync.WaitGroup
	for range 20 {
		opens.Add(1)
		go func() {
			defer opens.Done()
			k.BeforeOpen(t.Context())
			if version, _ := k.Current(); version != newer {
				t.Errorf("opens with %s", version)
			}
		}()
	}
	opens.Wait()
	k.Refused(old) // a straggler
	k.BeforeOpen(t.Context())
	if p.asked.Load() != 1 {
		t.Errorf("asked %d times", p.asked.Load())
	}
	// There is nothing newer: asked once more, and then not at every open.
	k.attempted = time.Now().Add(-time.Hour)
	k.Refused(newer)
	for range 3 {
		k.BeforeOpen(t.Context())
	}
	if p.asked.Load() != 2 {
		t.Errorf("asked %d times", p.asked.Load())
	}
}

func TestAnOpenDoesNotWaitLong(t *testing.T) {
	k := newKeeper(&page{block: make(chan struct{})}, nil)
	current, _ := k.Current()
	k.Refused(current)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	k.BeforeOpen(ctx)
	if version, _ := k.Current(); version != current {
		t.Error(version)
	}
}

func TestBadPages(t *testing.T) {
	for name, p := range map[string]*page{
		"refused":   {status: 403, body: strings.Repeat("secret page ", 1000)},
		"no number": {body: "hello"},
		"endless":   {body: strings.Repeat("x", maxPage) + `"client_revision":1,`},
		"broken":    {err: errors.New("cut")},
	} {
		k := newKeeper(p, nil)
		if err := k.refresh(t.Context(), false); err == nil || len(err.Error()) > maxErrorText {
			t.Errorf("%s: %v", name, err)
		}
		if version, age := k.Current(); version != store.GetWAVersion() || age >= 0 {
			t.Errorf("%s: %s", name, version)
		}
	}
	k := newKeeper(&page{revision: 1}, nil)
	if err := k.refresh(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if version, age := k.Current(); version != store.GetWAVersion() || age < 0 {
		t.Errorf("an older version is taken: %s", version)
	}
}

func TestApply(t *testing.T) {
	shared := store.BaseClientPayload.GetUserAgent().GetAppVersion().GetTertiary()
	payload := &waWa6.ClientPayload{UserAgent: &waWa6.ClientPayload_UserAgent{}, DevicePairingData: &waWa6.ClientPayload_DevicePairingRegistrationData{}}
	Apply(payload, newer)
	hash := newer.Hash()
	if payload.UserAgent.AppVersion.GetTertiary() != newer[2] || string(payload.DevicePairingData.BuildHash) != string(hash[:]) {
		t.Errorf("%v", payload)
	}
	if store.BaseClientPayload.GetUserAgent().GetAppVersion().GetTertiary() != shared {
		t.Error("the payload of the process was changed")
	}
}

func TestParse(t *testing.T) {
	for text, ok := range map[string]bool{
		"2.3000.1045649367": true, "2.3000.x": false, "2.3000": false, "2.3000.4294967296": false, "-1.2.3": false, "0.0.0": false, "": false,
	} {
		if _, err := Parse(text); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
}
