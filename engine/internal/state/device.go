// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"crypto/sha256"
	"sync"
	"sync/atomic"
	"time"

	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/util/keys"
)

// container puts our stores around whatsmeow's, also when a device gets its stores at pairing.
type container struct {
	store.DeviceContainer
	db      *dbutil.Database
	onError func(error)
	gate    chan struct{}
	stale   *staleSessions

	troubles *atomic.Int64 // of the disk, while keys of contacts were written
}

func (c *container) PutDevice(ctx context.Context, device *store.Device) error {
	initialised := device.Initialized
	err := c.DeviceContainer.PutDevice(ctx, device)
	if !initialised && device.Initialized {
		c.wrap(device)
	}
	return err
}

func (c *container) wrap(device *store.Device) {
	device.Container = c
	device.Identities = &thriftyIdentities{IdentityStore: device.Identities, db: c.db, own: device, noticed: c.noticed}
	device.PreKeys = &batchedPreKeys{PreKeyStore: device.PreKeys, db: c.db}
	device.Sessions = &guardedSessions{SessionStore: device.Sessions, db: c.db, stale: c.stale, read: map[string][sha256.Size]byte{}}
	device.EventBuffer = &guardedBuffer{EventBuffer: device.EventBuffer, onError: c.onError, gate: c.gate}
}

// batchedPreKeys writes new pre-keys in one transaction. whatsmeow writes each in its own, 812 of them at the first login: one fsync each.
type batchedPreKeys struct {
	store.PreKeyStore
	db *dbutil.Database
	// whatsmeow's store takes a lock inside these two calls. Taking ours first keeps a transaction from waiting for that lock
	// while its holder waits for the only connection.
	mu sync.Mutex
}

func (p *batchedPreKeys) GetOrGenPreKeys(ctx context.Context, count uint32) (list []*keys.PreKey, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	err = p.db.DoTxn(ctx, nil, func(ctx context.Context) (err error) {
		list, err = p.PreKeyStore.GetOrGenPreKeys(ctx, count)
		return err
	})
	return list, err
}

func (p *batchedPreKeys) GenOnePreKey(ctx context.Context) (*keys.PreKey, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.PreKeyStore.GenOnePreKey(ctx)
}

// retryStoreInterval is how often old outgoing messages are cleared. whatsmeow means 12 hours but never notes the time, and so does it at every send.
const retryStoreInterval = time.Hour

// guardedBuffer tells a failing database (a full disk) from a message that does not decrypt. whatsmeow treats both the same: it acknowledges the message.
type guardedBuffer struct {
	store.EventBuffer
	onError func(error)
	gate    chan struct{} // held by a decryption, or by PauseDecryption

	mu      sync.Mutex
	cleared time.Time
}

func (b *guardedBuffer) GetBufferedEvent(ctx context.Context, hash [32]byte) (*store.BufferedEvent, error) {
	event, err := b.EventBuffer.GetBufferedEvent(ctx, hash)
	b.report(ctx, err)
	return event, err
}

func (b *guardedBuffer) DoDecryptionTxn(ctx context.Context, fn func(context.Context) error) error {
	select {
	case b.gate <- struct{}{}:
		defer func() { <-b.gate }()
	case <-ctx.Done():
		return ctx.Err()
	}
	var inner error
	err := b.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
		inner = fn(context.WithValue(ctx, decrypting{}, true))
		return inner
	})
	// An error of the transaction itself, or of the database within it, says nothing about the message.
	if inner == nil || isDriverError(inner) {
		b.report(ctx, err)
	}
	return err
}

func (b *guardedBuffer) DeleteOldOutgoingEvents(ctx context.Context) error {
	b.mu.Lock()
	due := time.Since(b.cleared) > retryStoreInterval
	if due {
		b.cleared = time.Now()
	}
	b.mu.Unlock()
	if !due {
		return nil
	}
	return b.EventBuffer.DeleteOldOutgoingEvents(ctx)
}

func (b *guardedBuffer) report(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil && b.onError != nil {
		b.onError(err)
	}
}
