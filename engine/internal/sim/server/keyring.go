package server

import (
	"encoding/binary"
	"errors"
	"sync"
)

// lowKeys is the number of one-time keys below which the server asks the device for more; clients upload when they are
// told of fewer than five (whatsmeow prekeys.go, MinPreKeyCount).
const lowKeys = 5

var errBadKeys = errors.New("malformed keys")

// OneTimeKey is a public pre-key; it is given out once.
type OneTimeKey struct {
	ID     uint32
	Public [32]byte
}

// SignedKey is a signed public pre-key.
type SignedKey struct {
	ID        uint32
	Public    [32]byte
	Signature [64]byte
}

// Registration is what a device publishes about itself before any one-time key.
type Registration struct {
	ID       uint32
	Identity [32]byte
	Signed   SignedKey
}

// Bundle is what a sender needs to start a Signal session. OneTime is nil when the device has run out.
type Bundle struct {
	Registration
	OneTime *OneTimeKey
}

// keyring is the public keys of one device.
type keyring struct {
	mu           sync.Mutex
	registration Registration
	oneTime      []OneTimeKey
	known        map[uint32]struct{}
	warned       bool
}

func (k *keyring) register(r Registration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.registration = r
}

func (k *keyring) rotate(s SignedKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.registration.Signed = s
}

// upload adds one-time keys; a key that is already here is not added twice (a client repeats an upload whose answer
// it did not get).
func (k *keyring) upload(list []OneTimeKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known == nil {
		k.known = map[uint32]struct{}{}
	}
	for _, key := range list {
		if _, ok := k.known[key.ID]; ok {
			continue
		}
		k.known[key.ID] = struct{}{}
		k.oneTime = append(k.oneTime, key)
	}
	k.warned = k.warned && len(k.oneTime) < lowKeys
}

func (k *keyring) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.oneTime)
}

// take uses up one one-time key. Low is true once each time the supply falls under lowKeys.
func (k *keyring) take() (bundle Bundle, left int, low bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	bundle.Registration = k.registration
	if len(k.oneTime) > 0 {
		key := k.oneTime[0]
		k.oneTime = k.oneTime[1:]
		delete(k.known, key.ID)
		bundle.OneTime = &key
	}
	low = len(k.oneTime) < lowKeys && !k.warned
	k.warned = k.warned || low
	return bundle, len(k.oneTime), low
}

// parseUpload reads the children of `<iq xmlns=encrypt type=set>`.
func parseUpload(iq *Node) (Registration, []OneTimeKey, error) {
	var r Registration
	id, identity := childBytes(iq, "registration"), childBytes(iq, "identity")
	signed, err := parseSigned(iq.GetChildByTag("skey"))
	if err != nil || len(id) != 4 || len(identity) != 32 {
		return r, nil, errBadKeys
	}
	r = Registration{ID: binary.BigEndian.Uint32(id), Identity: [32]byte(identity), Signed: signed}
	list := iq.GetChildByTag("list")
	var keys []OneTimeKey
	for _, child := range list.GetChildren() {
		key, err := parseOneTime(child)
		if err != nil {
			return r, nil, err
		}
		keys = append(keys, key)
	}
	return r, keys, nil
}

func parseOneTime(n Node) (OneTimeKey, error) {
	id, public := childBytes(&n, "id"), childBytes(&n, "value")
	if len(id) != 3 || len(public) != 32 {
		return OneTimeKey{}, errBadKeys
	}
	return OneTimeKey{ID: uint24(id), Public: [32]byte(public)}, nil
}

func parseSigned(n Node) (SignedKey, error) {
	key, err := parseOneTime(n)
	signature := childBytes(&n, "signature")
	if err != nil || len(signature) != 64 {
		return SignedKey{}, errBadKeys
	}
	return SignedKey{ID: key.ID, Public: key.Public, Signature: [64]byte(signature)}, nil
}

// ParseRetryBundle reads the keys that a client puts into a retry receipt, if it did.
func ParseRetryBundle(receipt *Node) (Bundle, bool) {
	keys, ok := receipt.GetOptionalChildByTag("keys")
	id, identity := childBytes(receipt, "registration"), childBytes(&keys, "identity")
	if !ok || len(id) != 4 || len(identity) != 32 {
		return Bundle{}, false
	}
	signed, err := parseSigned(keys.GetChildByTag("skey"))
	if err != nil {
		return Bundle{}, false
	}
	bundle := Bundle{Registration: Registration{ID: binary.BigEndian.Uint32(id), Identity: [32]byte(identity), Signed: signed}}
	if one, err := parseOneTime(keys.GetChildByTag("key")); err == nil {
		bundle.OneTime = &one
	}
	return bundle, true
}

// Nodes is the bundle as it goes over the wire, in an answer to a key fetch or in a retry receipt.
func (b Bundle) Nodes() []Node {
	nodes := []Node{
		{Tag: "type", Content: []byte{keyType}},
		{Tag: "identity", Content: b.Identity[:]},
		{Tag: "skey", Content: []Node{
			{Tag: "id", Content: bytes24(b.Signed.ID)},
			{Tag: "value", Content: b.Signed.Public[:]},
			{Tag: "signature", Content: b.Signed.Signature[:]},
		}},
	}
	if b.OneTime != nil {
		nodes = append(nodes, Node{Tag: "key", Content: []Node{
			{Tag: "id", Content: bytes24(b.OneTime.ID)},
			{Tag: "value", Content: b.OneTime.Public[:]},
		}})
	}
	return nodes
}

// RegistrationNode is the bundle's registration id.
func (r Registration) RegistrationNode() Node {
	return Node{Tag: "registration", Content: binary.BigEndian.AppendUint32(nil, r.ID)}
}

// keyType is Curve25519's (libsignal ecc.DjbType).
const keyType = 5

func uint24(b []byte) uint32 { return uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]) }

func bytes24(v uint32) []byte { return []byte{byte(v >> 16), byte(v >> 8), byte(v)} }
