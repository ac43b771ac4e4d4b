package server

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"slices"
	"sort"
	"strings"
	"sync"

	"go.mau.fi/whatsmeow/types"
)

// maxDeviceID is the largest device number: binary XML carries it in one byte (whatsmeow binary/encoder.go, writeJID).
const maxDeviceID = 255

var errNoDeviceID = errors.New("the account has no free device number")

// Sink is where the stanzas of a primary device go. Receive is called without any lock of the server held and may
// call back into the server.
type Sink interface {
	Receive(stanza Node)
}

// Account is one phone number: a primary device (0) and the linked ones.
type Account struct {
	Number string
	LID    string
	Name   string

	primary *Device

	mu      sync.Mutex
	devices map[uint16]*Device
	lastID  uint16
	// lastKeyIndex counts pairings; a key index is never used twice.
	lastKeyIndex uint32
	// watchers have asked for the device list and hear of its changes, addressed the way they asked (PN or LID).
	watchers map[watcher]struct{}
}

type watcher struct {
	device  *Device
	lidMode bool
}

func newAccount(number, lid, name string) *Account {
	a := &Account{Number: number, LID: lid, Name: name, devices: map[uint16]*Device{}, watchers: map[watcher]struct{}{}}
	a.primary = &Device{Account: a}
	a.devices[0] = a.primary
	return a
}

// JID is the account's phone-number address.
func (a *Account) JID() types.JID { return types.NewJID(a.Number, types.DefaultUserServer) }

// LIDJID is the account's hidden address.
func (a *Account) LIDJID() types.JID { return types.NewJID(a.LID, types.HiddenUserServer) }

// Address is the account's address of either kind.
func (a *Account) Address(lidMode bool) types.JID {
	if lidMode {
		return a.LIDJID()
	}
	return a.JID()
}

// Device returns a device by number, or nil.
func (a *Account) Device(id uint16) *Device {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.devices[id]
}

// Devices returns all devices, the primary first, in the order of their numbers.
func (a *Account) Devices() []*Device {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sortedDevices()
}

func (a *Account) sortedDevices() []*Device {
	list := make([]*Device, 0, len(a.devices))
	for _, d := range a.devices {
		list = append(list, d)
	}
	slices.SortFunc(list, func(x, y *Device) int { return int(x.ID) - int(y.ID) })
	return list
}

// watch returns the devices and makes asker hear of every later change: no change can fall between the two.
func (a *Account) watch(asker *Device, lidMode bool) []*Device {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.watchers[watcher{asker, lidMode}] = struct{}{}
	return a.sortedDevices()
}

// reserve creates a linked device with the next free number; add makes it part of the account.
func (a *Account) reserve() (*Device, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for range maxDeviceID {
		a.lastID = a.lastID%maxDeviceID + 1
		if a.devices[a.lastID] == nil {
			a.lastKeyIndex++
			return &Device{Account: a, ID: a.lastID, KeyIndex: a.lastKeyIndex}, nil
		}
	}
	return nil, errNoDeviceID
}

// add makes a reserved device part of the account and returns who is to hear of it.
func (a *Account) add(d *Device) deviceChange {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.devices[d.ID] = d
	return a.change("add", d)
}

// remove takes a linked device out; ok is false if it is not there.
func (a *Account) remove(d *Device) (change deviceChange, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.devices[d.ID] != d {
		return deviceChange{}, false
	}
	delete(a.devices, d.ID)
	return a.change("remove", d), true
}

// deviceChange is a change of a device list, with what a notification about it says.
type deviceChange struct {
	verb            string
	device          *Device
	pnHash, lidHash string
	watchers        []watcher
}

func (a *Account) change(verb string, d *Device) deviceChange {
	c := deviceChange{verb: verb, device: d, pnHash: a.listHash(false), lidHash: a.listHash(true)}
	for w := range a.watchers {
		switch {
		case w.device.isRemoved():
			delete(a.watchers, w)
		case w.device != d:
			c.watchers = append(c.watchers, w)
		}
	}
	return c
}

// listHash is the hash of a device list that clients compare with their own (whatsmeow send.go, participantListHashV2).
func (a *Account) listHash(lidMode bool) string {
	list := make([]string, 0, len(a.devices))
	for _, d := range a.devices {
		list = append(list, d.Address(lidMode).ADString())
	}
	sort.Strings(list)
	sum := sha256.Sum256([]byte(strings.Join(list, "")))
	return "2:" + base64.RawStdEncoding.EncodeToString(sum[:6])
}
