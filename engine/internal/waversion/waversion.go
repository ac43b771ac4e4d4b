// SPDX-License-Identifier: GPL-3.0-or-later

// Package waversion keeps the version of WhatsApp Web that sessions claim to be. WhatsApp refuses one (405) a few months after it has gone; asking which is
// current is the cure without a new build.
package waversion

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/store"

	"warren/engine/internal/logs"
)

const (
	refreshEvery = 24 * time.Hour
	retryEvery   = 15 * time.Minute
	youngCache   = time.Hour // younger than that the start asks nobody: an engine that crashes again and again must not ask each time
	forcedEvery  = time.Minute
	fetchBound   = 30 * time.Second
	openBound    = 10 * time.Second // how long an open waits for a forced refresh

	maxPage      = 8 << 20
	maxErrorText = 200
)

// Options of a Keeper.
type Options struct {
	Offline   bool                     // nothing is ever contacted: sessions connect to a simulator
	Pinned    store.WAVersionContainer // not zero: this version, whatever WhatsApp says
	CachePath string                   // empty: nothing is kept over a restart
	HTTP      *http.Client             // nil: the default
	Log       *slog.Logger
}

// Keeper knows the version. whatsmeow's own variable for it is not safe to change while sessions connect, so it is left alone.
type Keeper struct {
	Options
	fetching chan struct{} // holds a token during a fetch

	mu        sync.Mutex
	version   store.WAVersionContainer
	confirmed time.Time // when WhatsApp was last heard to serve it; zero: never
	attempted time.Time
	outdated  bool
}

// New starts with the pinned version, else with the newer of the cached one and whatsmeow's own.
func New(options Options) *Keeper {
	if options.HTTP == nil {
		options.HTTP = http.DefaultClient
	}
	k := &Keeper{Options: options, fetching: make(chan struct{}, 1), version: store.GetWAVersion()}
	switch {
	case !options.Pinned.IsZero():
		k.version = options.Pinned
	case !options.Offline && options.CachePath != "":
		k.load()
	}
	return k
}

func (k *Keeper) load() {
	cached, err := readCache(k.CachePath)
	if err != nil {
		k.Log.Warn("the cached version of WhatsApp Web cannot be used", logs.KeyError, err)
		return
	}
	k.adopt(cached.version, cached.confirmed)
}

// asks reports whether WhatsApp may be asked at all.
func (k *Keeper) asks() bool { return !k.Offline && k.Pinned.IsZero() }

// Run refreshes the version until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	if !k.asks() {
		return
	}
	wait := time.Duration(0)
	if _, age := k.Current(); age >= 0 && age < youngCache {
		wait = refreshEvery - age
	}
	for {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = refreshEvery
		if err := k.refresh(ctx, false); err != nil {
			wait = retryEvery
		}
	}
}

// Current returns the version and how long ago WhatsApp was heard to serve it; negative: never.
func (k *Keeper) Current() (store.WAVersionContainer, time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.confirmed.IsZero() {
		return k.version, -1
	}
	return k.version, max(time.Since(k.confirmed), 0)
}

// Apply puts a version in the place of whatsmeow's.
func Apply(payload *waWa6.ClientPayload, version store.WAVersionContainer) {
	payload.UserAgent.AppVersion = version.ProtoAppVersion()
	if payload.DevicePairingData != nil {
		hash := version.Hash()
		payload.DevicePairingData.BuildHash = hash[:]
	}
}

// Refused notes that WhatsApp no longer takes a version.
func (k *Keeper) Refused(version store.WAVersionContainer) {
	if !k.Pinned.IsZero() {
		k.Log.Warn("WhatsApp refuses the version that --wa-version demands", "wa_version", version.String())
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	// A session that started with an older one says nothing about the current one.
	k.outdated = k.outdated || version == k.version
}

// BeforeOpen waits for a new version when WhatsApp has refused the current one, but never long: then the session tries with what there is.
func (k *Keeper) BeforeOpen(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, openBound)
	defer cancel()
	if k.needsRefresh() {
		_ = k.refresh(ctx, true) // it has logged its error
	}
}

func (k *Keeper) needsRefresh() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asks() && k.outdated
}

// refresh asks once, however many want to know at the same time. refused: only because the current version was refused.
func (k *Keeper) refresh(ctx context.Context, refused bool) error {
	began := time.Now()
	select {
	case k.fetching <- struct{}{}:
		defer func() { <-k.fetching }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if !k.due(began, refused) {
		return nil
	}
	version, err := k.fetch(ctx)
	if err != nil {
		k.Log.Warn("the current version of WhatsApp Web could not be found out", logs.KeyError, err)
		return err
	}
	now := time.Now()
	current := k.adopt(version, now)
	k.Log.Info("version of WhatsApp Web", "wa_version", current.String())
	if k.CachePath == "" {
		return nil
	}
	if err := writeCache(k.CachePath, cached{version: current, confirmed: now}); err != nil {
		k.Log.Warn("the version of WhatsApp Web could not be cached", logs.KeyError, err)
	}
	return nil
}

// due is false when somebody else has asked since, or, for a version that was refused, a moment ago: asking again at once brings the same.
func (k *Keeper) due(began time.Time, refused bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if refused && !k.outdated {
		return false // somebody else's answer came while we waited for our turn
	}
	if k.attempted.After(began) || k.outdated && !k.attempted.IsZero() && time.Since(k.attempted) < forcedEvery {
		return false
	}
	k.attempted = time.Now()
	return true
}

// adopt takes a version that WhatsApp serves. A build may know a newer one: WhatsApp serves several at a time.
func (k *Keeper) adopt(version store.WAVersionContainer, confirmed time.Time) store.WAVersionContainer {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.version.LessThan(version) {
		k.version, k.outdated = version, false
	}
	k.confirmed = confirmed
	return k.version
}

func (k *Keeper) fetch(ctx context.Context) (store.WAVersionContainer, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchBound)
	defer cancel()
	client := *k.HTTP
	client.Transport = bounded{client.Transport}
	version, err := whatsmeow.GetLatestVersion(ctx, &client)
	if err != nil {
		// whatsmeow puts whole pages into its errors.
		text := err.Error()
		return store.WAVersionContainer{}, errors.New(text[:min(len(text), maxErrorText)])
	}
	return *version, nil
}

// bounded limits what a response may hold: whatsmeow reads it to its end.
type bounded struct{ inner http.RoundTripper }

func (b bounded) RoundTrip(request *http.Request) (*http.Response, error) {
	inner := b.inner
	if inner == nil {
		inner = http.DefaultTransport
	}
	response, err := inner.RoundTrip(request)
	if err != nil {
		return nil, fmt.Errorf("ask WhatsApp: %w", err)
	}
	response.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(response.Body, maxPage), response.Body}
	return response, nil
}
