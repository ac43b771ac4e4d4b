// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"database/sql"
	"fmt"
	"sync"

	"go.mau.fi/libsignal/state/record"
	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
)

// A copy may be older than what its session has sent since. To send on in such a Signal session would use keys a second time: the recipient takes the message
// for one that it has, and shows nothing; and two texts under one key are no secret. So a copy says of itself that it is one, and in what is opened from it
// the first message to each device begins a new session. The old one stays archived, and still decrypts what comes in it.

// skippedPreKeys is by how much the numbers of pre-keys go on behind those of a copy, which does not know the ones that have been uploaded since: a number that
// contacts may still be given must not get another key. Who uses one that is not known here is asked to begin again, by a retry receipt.
const skippedPreKeys = 5000

// copyMark is the user_version of a copy that has not been opened. That of a store in use is 0.
const copyMark = 1

// staleSessions are the sessions of a restored copy in which nothing may be sent.
type staleSessions struct {
	db *dbutil.Database

	mu        sync.Mutex
	addresses map[string]struct{}
}

// loadStale reads which sessions are stale, and makes them so when this is the first time that a copy is opened.
func loadStale(ctx context.Context, raw *sql.DB, db *dbutil.Database, device *store.Device) (*staleSessions, error) {
	stale := &staleSessions{db: db, addresses: map[string]struct{}{}}
	var mark, known int
	if err := raw.QueryRowContext(ctx, "PRAGMA user_version").Scan(&mark); err != nil {
		return nil, err
	}
	if mark == copyMark {
		if err := markStale(ctx, db, device); err != nil {
			return nil, fmt.Errorf("restored copy: %w", err)
		}
	}
	if err := raw.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master WHERE name='warren_stale_sessions'").Scan(&known); err != nil || known == 0 {
		return stale, err
	}
	rows, err := raw.QueryContext(ctx, "SELECT their_id FROM warren_stale_sessions")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var address string
		if err := rows.Scan(&address); err != nil {
			return nil, err
		}
		stale.addresses[address] = struct{}{}
	}
	return stale, rows.Err()
}

func markStale(ctx context.Context, db *dbutil.Database, device *store.Device) error {
	return db.DoTxn(ctx, nil, func(ctx context.Context) error {
		for _, statement := range []string{
			"CREATE TABLE IF NOT EXISTS warren_stale_sessions (their_id TEXT PRIMARY KEY)",
			"INSERT OR IGNORE INTO warren_stale_sessions SELECT their_id FROM whatsmeow_sessions",
			"PRAGMA user_version=0",
		} {
			if _, err := db.Exec(ctx, statement); err != nil {
				return err
			}
		}
		if device.ID == nil {
			return nil
		}
		// whatsmeow numbers on from the last one there is.
		_, err := db.Exec(ctx, `INSERT INTO whatsmeow_pre_keys (jid, key_id, key, uploaded)
			SELECT jid, max(key_id) + $1, randomblob(32), true FROM whatsmeow_pre_keys GROUP BY jid HAVING max(key_id) + $1 < 1<<24`, skippedPreKeys)
		if err != nil {
			return err
		}
		// Our own sender keys have been used on, too. A new one goes to everybody with the next message.
		_, err = db.Exec(ctx, "DELETE FROM whatsmeow_sender_keys WHERE sender_id IN ($1, $2)",
			device.ID.SignalAddress().String(), device.LID.SignalAddress().String())
		return err
	})
}

func (s *staleSessions) has(address string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, stale := s.addresses[address]
	return stale
}

// renew stores, within a transaction, that a new session has been begun. renewed is to be called once that is committed.
func (s *staleSessions) renew(ctx context.Context, address string) error {
	_, err := s.db.Exec(ctx, "DELETE FROM warren_stale_sessions WHERE their_id=$1", address)
	return err
}

func (s *staleSessions) renewed(address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.addresses, address)
}

// migrate follows whatsmeow when it files the sessions of a phone number under its LID.
func (s *staleSessions) migrate(ctx context.Context, pn, lid types.JID) error {
	from, to := pn.SignalAddressUser()+":", lid.SignalAddressUser()+":"
	s.mu.Lock()
	defer s.mu.Unlock()
	for address := range s.addresses {
		if len(address) <= len(from) || address[:len(from)] != from {
			continue
		}
		moved := to + address[len(from):]
		if _, err := s.db.Exec(ctx, "UPDATE OR REPLACE warren_stale_sessions SET their_id=$1 WHERE their_id=$2", moved, address); err != nil {
			return err
		}
		delete(s.addresses, address)
		s.addresses[moved] = struct{}{}
	}
	return nil
}

// archive puts the states of an old session behind those of a new one, in which they still decrypt.
func archive(old, fresh []byte) []byte {
	serializer := store.SignalProtobufSerializer.Session
	was, err := serializer.Deserialize(old)
	if err != nil {
		return fresh // what cannot be read decrypts nothing either
	}
	is, err := serializer.Deserialize(fresh)
	if err != nil {
		return fresh
	}
	for _, state := range append([]*record.StateStructure{was.SessionState}, was.PreviousStates...) {
		if len(is.PreviousStates) < maxArchived {
			is.PreviousStates = append(is.PreviousStates, state)
		}
	}
	return serializer.Serialize(is)
}
