// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/mattn/go-sqlite3"
	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store"
)

// Change says what has been written since somebody last asked. The larger one counts for both.
type Change uint32

// Kinds of change.
const (
	NoChange Change = iota
	// OtherChange: what a conversation changes all the time.
	OtherChange
	// IdentityChange: what makes a restored copy without it heal badly: the device, contacts' identity keys, our pre-keys, app-state keys, new Signal sessions.
	IdentityChange
)

// Bits of changes.pending.
const (
	otherBit uint32 = 1 << iota
	identityBit
	deviceBit // the device row was written, perhaps with what it held before
)

// changes notes what is written to a database, from SQLite's update hook: it is told of each row, within the transaction.
type changes struct {
	pending atomic.Uint32
	wake    chan struct{} // a token when pending has got a new bit

	device [sha256.Size]byte // the row as it was last reported
	paired bool
}

func newChanges() *changes { return &changes{wake: make(chan struct{}, 1)} }

// hook runs within whatsmeow's statements. It must be cheap.
func (c *changes) hook(op int, _, table string, _ int64) {
	c.mark(changeOf(op, table))
}

func (c *changes) mark(bit uint32) {
	if bit == 0 || c.pending.Or(bit)&bit != 0 {
		return
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// changeOf sorts the writing of one row.
func changeOf(op int, table string) uint32 {
	switch table {
	case "whatsmeow_device":
		return deviceBit
	case "whatsmeow_app_state_sync_keys", "whatsmeow_identity_keys":
		return identityBit
	case "whatsmeow_pre_keys":
		if op == sqlite3.SQLITE_DELETE {
			return otherBit // it was used; a copy that still has it does no harm
		}
		return identityBit
	case "whatsmeow_sessions":
		if op == sqlite3.SQLITE_INSERT {
			return identityBit
		}
		return otherBit
	case "whatsmeow_event_buffer", "warren_stale_sessions", versionTable:
		return 0 // the first two come with a change of a session
	}
	return otherBit
}

// Changed receives a token when something has been written, or something that matters more than what is pending.
func (s *Store) Changed() <-chan struct{} { return s.changes.wake }

// PendingChange tells what TakeChange would at most return now. It costs nothing.
func (s *Store) PendingChange() Change {
	switch pending := s.changes.pending.Load(); {
	case pending&(identityBit|deviceBit) != 0:
		return IdentityChange
	case pending != 0:
		return OtherChange
	}
	return NoChange
}

// TakeChange returns what has been written since the last call, and forgets it. A snapshot from now on holds it: the call waits for the transaction
// that it was written in. Without a device row there is nothing worth a copy, and no change.
func (s *Store) TakeChange(ctx context.Context) (Change, error) {
	pending := s.changes.pending.Swap(0)
	if pending == 0 {
		return NoChange, nil
	}
	device, paired, err := deviceDigest(ctx, s.raw)
	if err != nil {
		s.changes.mark(pending)
		return NoChange, err
	}
	changed := device != s.changes.device
	s.changes.device, s.changes.paired = device, paired
	switch {
	case !paired:
		return NoChange, nil
	case changed, pending&identityBit != 0:
		return IdentityChange, nil
	case pending&otherBit != 0:
		return OtherChange, nil
	}
	return NoChange, nil
}

// LastChange tells, after Close, what was not taken before.
func (s *Store) LastChange() Change { return s.last }

// takeLast is TakeChange at the end. Without an answer of the database the worse is assumed.
func (s *Store) takeLast(ctx context.Context) Change {
	change, err := s.TakeChange(ctx)
	if err != nil && s.changes.paired {
		return IdentityChange
	}
	return change
}

// deviceDigest reads the device row through the session's only connection: when it has it, no transaction is open.
func deviceDigest(ctx context.Context, raw *sql.DB) (digest [sha256.Size]byte, paired bool, err error) {
	rows, err := raw.QueryContext(ctx, "SELECT * FROM whatsmeow_device")
	if err != nil {
		return digest, false, err
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return digest, false, err
	}
	values := make([]any, len(columns))
	for i := range values {
		values[i] = new(any)
	}
	hash := sha256.New()
	for rows.Next() {
		if err := rows.Scan(values...); err != nil {
			return digest, false, err
		}
		for _, value := range values {
			fmt.Fprintf(hash, "%v\n", *value.(*any))
		}
		paired = true
	}
	hash.Sum(digest[:0])
	return digest, paired, rows.Err()
}

// thriftyIdentities does not write an identity key that is there already. whatsmeow writes one for each device of each message that it sends.
type thriftyIdentities struct {
	store.IdentityStore
	db      *dbutil.Database
	own     *store.Device
	noticed func(error) error
}

func (i *thriftyIdentities) PutIdentity(ctx context.Context, address string, key [32]byte) error {
	var known []byte
	err := i.db.QueryRow(ctx, "SELECT identity FROM whatsmeow_identity_keys WHERE our_jid=$1 AND their_id=$2", i.own.GetJID().String(), address).Scan(&known)
	switch {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return i.noticed(err)
	case string(known) == string(key[:]):
		return nil
	}
	return i.noticed(i.IdentityStore.PutIdentity(ctx, address, key))
}
