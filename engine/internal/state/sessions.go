// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"

	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
)

// ErrSessionChanged means that a Signal session changed while a message was encrypted with it. Nothing has been written or sent: encrypt again.
var ErrSessionChanged = errors.New("the Signal session changed while it was used")

// decrypting marks the context of whatsmeow's decryption transaction.
type decrypting struct{}

// guardedSessions keeps sending from overwriting what receiving has stored. whatsmeow decrypts in one transaction, but encrypts by reading sessions,
// working on them, and writing them back without looking: a message from the same contact in between is forgotten, and with it a turn of the ratchet or the
// whole session of a first contact. Here a session is only written back when it is still the one that was read.
type guardedSessions struct {
	store.SessionStore
	db    *dbutil.Database
	stale *staleSessions

	mu   sync.Mutex
	read map[string][sha256.Size]byte // what was last read outside of a decryption, by address
}

func (g *guardedSessions) GetSession(ctx context.Context, address string) ([]byte, error) {
	session, err := g.SessionStore.GetSession(ctx, address)
	if err == nil && ctx.Value(decrypting{}) == nil {
		g.note(address, session)
		if g.stale.has(address) {
			return nil, nil
		}
	}
	return session, err
}

func (g *guardedSessions) HasSession(ctx context.Context, address string) (bool, error) {
	if ctx.Value(decrypting{}) == nil && g.stale.has(address) {
		return false, nil
	}
	return g.SessionStore.HasSession(ctx, address)
}

func (g *guardedSessions) MigratePNToLID(ctx context.Context, pn, lid types.JID) error {
	if err := g.SessionStore.MigratePNToLID(ctx, pn, lid); err != nil {
		return err
	}
	return g.stale.migrate(ctx, pn, lid)
}

func (g *guardedSessions) GetManySessions(ctx context.Context, addresses []string) (map[string][]byte, error) {
	sessions, err := g.SessionStore.GetManySessions(ctx, addresses)
	if err == nil && ctx.Value(decrypting{}) == nil {
		for address, session := range sessions {
			g.note(address, session)
			if g.stale.has(address) {
				sessions[address] = nil
			}
		}
	}
	return sessions, err
}

func (g *guardedSessions) PutSession(ctx context.Context, address string, session []byte) error {
	if ctx.Value(decrypting{}) != nil {
		return g.putDecrypted(ctx, address, session)
	}
	return g.PutManySessions(ctx, map[string][]byte{address: session})
}

// putDecrypted stores a session that has decrypted a message.
func (g *guardedSessions) putDecrypted(ctx context.Context, address string, session []byte) error {
	before, err := g.SessionStore.GetSession(ctx, address)
	if err != nil {
		return err
	}
	return g.SessionStore.PutSession(ctx, address, repair(before, session))
}

func (g *guardedSessions) PutManySessions(ctx context.Context, sessions map[string][]byte) error {
	if ctx.Value(decrypting{}) != nil {
		return g.SessionStore.PutManySessions(ctx, sessions)
	}
	var renewed []string
	err := g.db.DoTxn(ctx, nil, func(ctx context.Context) (err error) {
		renewed, err = g.putEncrypted(ctx, sessions)
		return err
	})
	if err == nil {
		for _, address := range renewed {
			g.stale.renewed(address)
		}
	}
	return err
}

// putEncrypted stores sessions that have encrypted a message, in a transaction. It tells which of them replace stale ones.
func (g *guardedSessions) putEncrypted(ctx context.Context, sessions map[string][]byte) (renewed []string, err error) {
	addresses := make([]string, 0, len(sessions))
	for address := range sessions {
		addresses = append(addresses, address)
	}
	current, err := g.SessionStore.GetManySessions(ctx, addresses)
	if err != nil {
		return nil, err
	}
	write := make(map[string][]byte, len(sessions))
	for _, address := range addresses {
		if !g.unchanged(address, current[address]) {
			return nil, ErrSessionChanged
		}
		write[address] = sessions[address]
		if !g.stale.has(address) {
			continue
		}
		renewed = append(renewed, address)
		if old := current[address]; old != nil {
			write[address] = archive(old, sessions[address])
		}
		if err := g.stale.renew(ctx, address); err != nil {
			return nil, err
		}
	}
	return renewed, g.SessionStore.PutManySessions(ctx, write)
}

func (g *guardedSessions) DeleteSession(ctx context.Context, address string) error {
	err := g.SessionStore.DeleteSession(ctx, address)
	if err == nil && ctx.Value(decrypting{}) == nil {
		g.note(address, nil)
	}
	return err
}

func (g *guardedSessions) note(address string, session []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.read[address] = sha256.Sum256(session)
}

// unchanged reports whether the session is the one that was read. A reading serves one write.
func (g *guardedSessions) unchanged(address string, current []byte) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	read, known := g.read[address]
	delete(g.read, address)
	return known && read == sha256.Sum256(current)
}
