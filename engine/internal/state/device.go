// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"database/sql"
	"errors"
	"sync"
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
	device.PreKeys = &batchedPreKeys{PreKeyStore: device.PreKeys, db: c.db}
	device.EventBuffer = &guardedBuffer{EventBuffer: device.EventBuffer, onError: c.onError}
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

	mu      sync.Mutex
	cleared time.Time
}

func (b *guardedBuffer) GetBufferedEvent(ctx context.Context, hash [32]byte) (*store.BufferedEvent, error) {
	event, err := b.EventBuffer.GetBufferedEvent(ctx, hash)
	b.report(ctx, err)
	return event, err
}

func (b *guardedBuffer) DoDecryptionTxn(ctx context.Context, fn func(context.Context) error) error {
	err := b.EventBuffer.DoDecryptionTxn(ctx, fn)
	if isDatabaseError(err) {
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

func isDatabaseError(err error) bool {
	return err != nil && (errors.Is(err, dbutil.ErrTxn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, sql.ErrTxDone) || isDriverError(err))
}
