package server

import (
	"sync"

	"go.mau.fi/whatsmeow/types"
)

// Device is one device of an account: the primary one, whose stanzas go to a sink, or a linked one, whose stanzas wait
// in its mailbox until the client has receipted them.
type Device struct {
	Account *Account
	ID      uint16
	// KeyIndex is the pairing's number, signed into the device's identity.
	KeyIndex uint32

	// noiseKey is the Noise static key of the pairing connection: a login must use the same.
	noiseKey [32]byte
	keys     keyring
	sink     Sink

	mu      sync.Mutex
	box     mailbox
	client  *client
	removed bool
}

// JID is the device's phone-number address; the primary device's has no device part.
func (d *Device) JID() types.JID { return d.Address(false) }

// Address is the device's address of either kind.
func (d *Device) Address(lidMode bool) types.JID {
	jid := d.Account.Address(lidMode)
	jid.Device = d.ID
	return jid
}

// Connected tells whether the device is logged in.
func (d *Device) Connected() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.client != nil
}

// Pending is the number of stanzas the device has not receipted.
func (d *Device) Pending() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.box.live
}

func (d *Device) isRemoved() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.removed
}

// deliver hands a stanza to the device. For a linked device it stays pending under key until settle.
func (d *Device) deliver(node Node, key settleKey) {
	if d.sink != nil {
		d.sink.Receive(node)
		return
	}
	d.mu.Lock()
	if d.removed {
		d.mu.Unlock()
		return
	}
	d.box.put(node, key)
	client := d.client
	d.mu.Unlock()
	if client != nil {
		client.nudge()
	}
}

// settle removes the oldest pending stanza with this key: a stanza sent twice is settled twice.
func (d *Device) settle(key settleKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.box.settle(key)
}

// attach makes c the device's connection. It returns the connection that is thereby replaced, and what was pending
// before c came: those are redelivered as offline stanzas. ok is false if the device was removed meanwhile.
func (d *Device) attach(c *client) (replaced *client, offline backlog, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.removed {
		return nil, backlog{}, false
	}
	replaced, d.client = d.client, c
	return replaced, d.box.backlog(), true
}

func (d *Device) detach(c *client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client == c {
		d.client = nil
	}
}

// next returns the first pending stanza at or after position, if c is still the device's connection.
func (d *Device) next(c *client, position uint64) (entry, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client != c {
		return entry{}, false
	}
	return d.box.next(position)
}

// markRemoved closes the mailbox for good and returns the connection to say goodbye to, if any.
func (d *Device) markRemoved() *client {
	d.mu.Lock()
	defer d.mu.Unlock()
	client := d.client
	d.removed, d.client, d.box = true, nil, mailbox{}
	return client
}

func (d *Device) connection() *client {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.client
}
