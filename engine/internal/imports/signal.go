// SPDX-License-Identifier: GPL-3.0-or-later

package imports

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	groupRatchet "go.mau.fi/libsignal/groups/ratchet"
	groupRecord "go.mau.fi/libsignal/groups/state/record"
	"go.mau.fi/libsignal/kdf"
	"go.mau.fi/libsignal/keys/chain"
	"go.mau.fi/libsignal/keys/message"
	"go.mau.fi/libsignal/state/record"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/util/keys"
)

// Sessions of the JavaScript library libsignal (src/session_record.js) become those of this one: the same ratchet, written in another way. They are carried for
// reading only: the target counts as a copy, so what is sent begins new sessions. A mistake here, or an old source, can therefore not use a key twice; the worst
// is a message that does not decrypt and is asked for again.

const (
	signalVersion   = 3
	receivingChain  = 2
	openSession     = -1
	maxChains       = 5  // that this library keeps of a session
	maxStates       = 40 // archived
	maxMessageKeys  = 2000
	whyDamaged      = "damaged: begun anew, by a retry receipt"
	whyOwnSenderKey = "our own is made anew, and goes out with the next message to the group"
)

type jsChain struct {
	ChainKey struct {
		Counter int64
		Key     blob
	}
	ChainType   int
	MessageKeys map[string]blob
}

type jsSession struct {
	RegistrationID number `json:"registrationId"`
	CurrentRatchet struct {
		EphemeralKeyPair       struct{ PubKey, PrivKey blob }
		LastRemoteEphemeralKey blob
		PreviousCounter        int64
		RootKey                blob
	}
	IndexInfo struct {
		BaseKey, RemoteIdentityKey blob
		Closed                     int64
	}
	Chains map[string]*jsChain `json:"_chains"`
}

var errMalformed = errors.New("malformed")

// index turns JavaScript's number of the last key into the number of the next.
func (c *jsChain) index() (uint32, error) {
	if c.ChainKey.Counter < -1 || c.ChainKey.Counter >= math.MaxUint32 || (len(c.ChainKey.Key) != 32 && len(c.ChainKey.Key) != 0) {
		return 0, errMalformed
	}
	return uint32(c.ChainKey.Counter + 1), nil
}

// convert is one chain in our library's form. One without a key has ended; what is left of it are keys of messages that may still come.
func (c *jsChain) convert(public blob) (*record.ChainStructure, error) {
	index, err := c.index()
	if err != nil || !isPublic(public) || len(c.MessageKeys) > maxMessageKeys {
		return nil, errMalformed
	}
	key := c.ChainKey.Key
	if len(key) == 0 {
		key = make([]byte, 32)
	}
	result := &record.ChainStructure{SenderRatchetKeyPublic: public, ChainKey: &chain.KeyStructure{Key: key, Index: index}}
	for _, number := range slices.Sorted(maps.Keys(c.MessageKeys)) {
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil || len(c.MessageKeys[number]) != 32 {
			return nil, errMalformed
		}
		derived, err := kdf.DeriveSecrets(c.MessageKeys[number], nil, []byte(message.KdfSalt), message.DerivedSecretsSize)
		if err != nil {
			return nil, err
		}
		iv := message.CipherKeyLength + message.MacKeyLength
		result.MessageKeys = append(result.MessageKeys, &message.KeysStructure{
			CipherKey: derived[:message.CipherKeyLength], MacKey: derived[message.CipherKeyLength:iv], IV: derived[iv:], Index: uint32(n),
		})
	}
	return result, nil
}

// isPublic reports whether a key is as both libraries write public ones: with the byte that says which curve.
func isPublic(b blob) bool { return len(b) == 33 && b[0] == curveKeyPrefix }

func (s *jsSession) convert(own *store.Device) (*record.StateStructure, error) {
	ratchet, info := &s.CurrentRatchet, &s.IndexInfo
	pair := pair{Private: ratchet.EphemeralKeyPair.PrivKey, Public: ratchet.EphemeralKeyPair.PubKey}
	if _, err := pair.keyPair("the ratchet key"); err != nil {
		return nil, err
	}
	if len(ratchet.RootKey) != 32 || !isPublic(ratchet.EphemeralKeyPair.PubKey) || !isPublic(info.BaseKey) || !isPublic(info.RemoteIdentityKey) ||
		ratchet.PreviousCounter < -1 || ratchet.PreviousCounter > math.MaxUint32 {
		return nil, errMalformed
	}
	state := &record.StateStructure{
		LocalIdentityPublic: publicBytes(own.IdentityKey), LocalRegistrationID: own.RegistrationID,
		RemoteIdentityPublic: info.RemoteIdentityKey, RemoteRegistrationID: uint32(s.RegistrationID),
		RootKey: ratchet.RootKey, SenderBaseKey: info.BaseKey, SessionVersion: signalVersion, PreviousCounter: uint32(max(ratchet.PreviousCounter, 0)),
	}
	// Nothing is sent in it, but the key pair of the sending chain is what the next turn of the ratchet is made with.
	state.SenderChain = &record.ChainStructure{
		SenderRatchetKeyPublic: ratchet.EphemeralKeyPair.PubKey, SenderRatchetKeyPrivate: ratchet.EphemeralKeyPair.PrivKey,
		ChainKey: &chain.KeyStructure{Key: make([]byte, 32)},
	}
	var err error
	state.ReceiverChains, err = s.receiverChains()
	return state, err
}

// receiverChains are the latest last. Of the others those are dropped first that have nothing left in them.
func (s *jsSession) receiverChains() (list []*record.ChainStructure, err error) {
	last := base64.StdEncoding.EncodeToString(s.CurrentRatchet.LastRemoteEphemeralKey)
	rank := func(public string) int {
		c := s.Chains[public]
		switch {
		case public == last:
			return 2
		case len(c.ChainKey.Key) > 0 || len(c.MessageKeys) > 0:
			return 1
		}
		return 0
	}
	order := slices.Sorted(maps.Keys(s.Chains))
	slices.SortStableFunc(order, func(a, b string) int { return rank(a) - rank(b) })
	for _, public := range order {
		c := s.Chains[public]
		if c.ChainType != receivingChain {
			continue
		}
		key, err := base64.StdEncoding.DecodeString(public)
		if err != nil {
			return nil, errMalformed
		}
		converted, err := c.convert(key)
		if err != nil {
			return nil, err
		}
		list = append(list, converted)
	}
	return list[max(0, len(list)-maxChains):], nil
}

func publicBytes(key *keys.KeyPair) []byte {
	return append([]byte{curveKeyPrefix}, key.Pub[:]...)
}

var (
	// An address of JavaScript's library, with the kind of account behind the number; and that of a sender in a group.
	sessionName   = regexp.MustCompile(`^([0-9]{1,32}(?:_[0-9]{1,3})?)\.([0-9]{1,5})$`)
	senderKeyName = regexp.MustCompile(`^([0-9-]{1,64}@g\.us)--([0-9]{1,32}(?:_[0-9]{1,3})?)--([0-9]{1,5})$`)
)

// sessions carries what can be read of the Signal sessions.
func (b *baileys) sessions(ctx context.Context, names []string, _ *credentials) error {
	damaged := 0
	for _, file := range named(names, "session-") {
		match := sessionName.FindStringSubmatch(file[1])
		var stored struct {
			Sessions map[string]*jsSession `json:"_sessions"`
		}
		missing, err := b.read(file[0], &stored)
		if missing || err == nil && len(stored.Sessions) == 0 {
			continue
		}
		structure := convertSessions(stored.Sessions, b.store.Device)
		if err != nil || match == nil || structure == nil {
			damaged++
			continue
		}
		encoded := store.SignalProtobufSerializer.Session.Serialize(structure)
		if err := b.store.PutSession(ctx, match[1]+":"+match[2], encoded); err != nil {
			return err
		}
		b.report.carry("sessions", 1)
	}
	b.report.leave("sessions", damaged, whyDamaged)
	return nil
}

// convertSessions puts the open one first; nil when none is whole.
func convertSessions(sessions map[string]*jsSession, own *store.Device) *record.SessionStructure {
	order := slices.Collect(maps.Values(sessions))
	order = slices.DeleteFunc(order, func(s *jsSession) bool { return s == nil })
	newest := func(s *jsSession) int64 {
		if s.IndexInfo.Closed == openSession {
			return math.MaxInt64
		}
		return s.IndexInfo.Closed
	}
	slices.SortFunc(order, func(x, y *jsSession) int {
		switch {
		case newest(x) > newest(y):
			return -1
		case newest(x) < newest(y):
			return 1
		}
		return 0
	})
	var states []*record.StateStructure
	for _, session := range order {
		if state, err := session.convert(own); err == nil && len(states) <= maxStates {
			states = append(states, state)
		}
	}
	if len(states) == 0 {
		return nil
	}
	return &record.SessionStructure{SessionState: states[0], PreviousStates: states[1:]}
}

type jsSenderKey struct {
	SenderKeyID    *uint32 `json:"senderKeyId"`
	SenderChainKey struct {
		Iteration uint32
		Seed      blob
	}
	SenderSigningKey  struct{ Public blob }
	SenderMessageKeys []struct {
		Iteration uint32
		Seed      blob
	}
}

func (k *jsSenderKey) convert() (*groupRecord.SenderKeyStateStructure, error) {
	if k.SenderKeyID == nil || len(k.SenderChainKey.Seed) != 32 || !isPublic(k.SenderSigningKey.Public) || len(k.SenderMessageKeys) > maxMessageKeys {
		return nil, errMalformed
	}
	state := &groupRecord.SenderKeyStateStructure{
		KeyID: *k.SenderKeyID, SigningKeyPublic: k.SenderSigningKey.Public,
		SenderChainKey: &groupRatchet.SenderChainKeyStructure{Iteration: k.SenderChainKey.Iteration, ChainKey: k.SenderChainKey.Seed},
	}
	for _, key := range k.SenderMessageKeys {
		derived, err := groupRatchet.NewSenderMessageKey(key.Iteration, key.Seed)
		if err != nil || len(key.Seed) != 32 {
			return nil, errMalformed
		}
		state.Keys = append(state.Keys, groupRatchet.NewStructFromSenderMessageKey(derived))
	}
	return state, nil
}

// senderKeys carries those of others. Our own would be used on, and is made anew instead.
func (b *baileys) senderKeys(ctx context.Context, names []string, _ *credentials) error {
	own, damaged := 0, 0
	device := b.store.Device
	for _, file := range named(names, "sender-key-") {
		if strings.HasPrefix(file[1], "memory-") {
			continue
		}
		match := senderKeyName.FindStringSubmatch(file[1])
		var text blob
		missing, err := b.read(file[0], &text)
		if missing {
			continue
		}
		var list []jsSenderKey
		if err == nil {
			err = json.Unmarshal(text, &list)
		}
		if err != nil || match == nil {
			damaged++
			continue
		}
		sender := match[2] + ":" + match[3]
		if sender == device.ID.SignalAddress().String() || sender == device.LID.SignalAddress().String() {
			own++
			continue
		}
		structure := &groupRecord.SenderKeyStructure{}
		for i := len(list) - 1; i >= 0; i-- { // the latest is last there, and first here
			if state, err := list[i].convert(); err == nil {
				structure.SenderKeyStates = append(structure.SenderKeyStates, state)
			}
		}
		if len(structure.SenderKeyStates) == 0 {
			damaged++
			continue
		}
		if err := device.SenderKeys.PutSenderKey(ctx, match[1], sender, store.SignalProtobufSerializer.SenderKeyRecord.Serialize(structure)); err != nil {
			return err
		}
		b.report.carry("sender_keys", 1)
	}
	b.report.leave("sender_keys", damaged, whyDamaged)
	b.report.leave("own_sender_keys", own, whyOwnSenderKey)
	return nil
}
