// SPDX-License-Identifier: GPL-3.0-or-later

package imports

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/libsignal/groups"
	"go.mau.fi/libsignal/keys/identity"
	"go.mau.fi/libsignal/keys/prekey"
	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/session"
	"go.mau.fi/libsignal/state/record"
	"go.mau.fi/libsignal/util/optional"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/util/keys"
	waLog "go.mau.fi/whatsmeow/util/log"

	"warren/engine/internal/state"
)

var serializer = store.SignalProtobufSerializer

// party is one side of a conversation.
type party struct {
	t      *testing.T
	device *store.Device
	other  *protocol.SignalAddress
}

// newParty has a store of its own and the identity given.
func newParty(t *testing.T, own *keys.KeyPair, number string, other types.JID) *party {
	t.Helper()
	s, err := state.Open(t.Context(), t.TempDir(), state.Options{Create: true, Log: waLog.Noop})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	d := s.Device
	jid := types.NewADJID(number, 0, 3)
	d.ID, d.LID, d.IdentityKey, d.SignedPreKey, d.RegistrationID, d.Account = &jid, types.EmptyJID, own, own.CreateSignedPreKey(1), 98, identityOf(own)
	if err := d.Save(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &party{t: t, device: d, other: other.SignalAddress()}
}

func (p *party) cipher() *session.Cipher {
	return session.NewCipher(session.NewBuilderFromSignal(p.device, p.other, serializer), p.other)
}

func (p *party) begin(with *party) {
	p.t.Helper()
	one, err := with.device.PreKeys.GenOnePreKey(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	signed := with.device.SignedPreKey
	bundle := prekey.NewBundle(with.device.RegistrationID, p.other.DeviceID(), optional.NewOptionalUint32(one.KeyID), signed.KeyID,
		ecc.NewDjbECPublicKey(*one.Pub), ecc.NewDjbECPublicKey(*signed.Pub), *signed.Signature, identity.NewKey(ecc.NewDjbECPublicKey(*with.device.IdentityKey.Pub)))
	if err := session.NewBuilderFromSignal(p.device, p.other, serializer).ProcessBundle(context.Background(), bundle); err != nil {
		p.t.Fatal(err)
	}
}

func (p *party) encrypt(text string) protocol.CiphertextMessage {
	p.t.Helper()
	message, err := p.cipher().Encrypt(context.Background(), []byte(text))
	if err != nil {
		p.t.Fatal(err)
	}
	return message
}

func (p *party) reads(message protocol.CiphertextMessage, want string) {
	p.t.Helper()
	var plain []byte
	err := p.device.EventBuffer.DoDecryptionTxn(context.Background(), func(ctx context.Context) (err error) {
		if pre, ok := message.(*protocol.PreKeySignalMessage); ok {
			plain, err = p.cipher().DecryptMessage(ctx, pre)
		} else {
			plain, err = p.cipher().Decrypt(ctx, message.(*protocol.SignalMessage))
		}
		return err
	})
	if err != nil || string(plain) != want {
		p.t.Fatalf("%q instead of %q: %v", plain, want, err)
	}
}

func text64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// step is the chain's key derivation: 1 gives the seed of a message's key, 2 the next chain key.
func step(key []byte, n byte) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte{n})
	return mac.Sum(nil)
}

// inJavaScript writes a session as JavaScript's library has it that has received all but the next `skipped` messages of the newest chain, and one more.
func inJavaScript(t *testing.T, device *store.Device, address *protocol.SignalAddress, skipped int) object {
	t.Helper()
	raw, err := device.Sessions.GetSession(t.Context(), address.String())
	if err != nil {
		t.Fatal(err)
	}
	structure, err := serializer.Session.Deserialize(raw)
	if err != nil {
		t.Fatal(err)
	}
	s := structure.SessionState
	chains := object{text64(s.SenderChain.SenderRatchetKeyPublic): object{
		"chainKey": object{"counter": int(s.SenderChain.ChainKey.Index) - 1, "key": text64(s.SenderChain.ChainKey.Key)}, "chainType": 1, "messageKeys": object{},
	}}
	var last *record.ChainStructure
	for _, chain := range s.ReceiverChains {
		last = chain
		chains[text64(chain.SenderRatchetKeyPublic)] = object{
			"chainKey":  object{"counter": int(chain.ChainKey.Index) - 1, "key": text64(chain.ChainKey.Key)},
			"chainType": 2, "messageKeys": object{},
		}
	}
	if skipped > 0 {
		key, index, seeds := last.ChainKey.Key, int(last.ChainKey.Index), object{}
		for range skipped {
			seeds[fmt.Sprint(index)] = text64(step(key, 1))
			key, index = step(key, 2), index+1
		}
		chains[text64(last.SenderRatchetKeyPublic)] = object{
			"chainKey": object{"counter": index, "key": text64(step(key, 2))}, "chainType": 2, "messageKeys": seeds,
		}
	}
	return object{
		"registrationId": s.RemoteRegistrationID,
		"currentRatchet": object{
			"ephemeralKeyPair":       object{"pubKey": text64(s.SenderChain.SenderRatchetKeyPublic), "privKey": text64(s.SenderChain.SenderRatchetKeyPrivate)},
			"lastRemoteEphemeralKey": text64(last.SenderRatchetKeyPublic), "previousCounter": s.PreviousCounter, "rootKey": text64(s.RootKey),
		},
		"indexInfo": object{
			"baseKey": text64(s.SenderBaseKey), "baseKeyType": 2, "closed": -1, "used": 1, "created": 1, "remoteIdentityKey": text64(s.RemoteIdentityPublic),
		},
		"_chains": chains,
	}
}

// imported is Ana, again, as warren has her.
func imported(t *testing.T, dir string, other *protocol.SignalAddress, want map[string]int) *party {
	t.Helper()
	to := filepath.Join(t.TempDir(), "1")
	report, err := Run(t.Context(), Options{Format: FormatBaileys, From: dir, To: to})
	if err != nil {
		t.Fatal(err)
	}
	for kind, count := range want {
		if report.Carried[kind] != count {
			t.Fatalf("%d %s: %+v", report.Carried[kind], kind, report)
		}
	}
	return &party{t: t, device: openState(t, to).Device, other: other}
}

func TestSessionsOfBaileysAreRead(t *testing.T) {
	own := keys.NewKeyPair()
	anaJID, bobJID := types.NewADJID("15550001", 0, 3), types.NewADJID("15550002", 0, 0)
	ana := newParty(t, own, "15550001", bobJID)
	bob := newParty(t, keys.NewKeyPair(), "15550002", anaJID)
	bob.begin(ana)
	ana.reads(bob.encrypt("hello"), "hello")
	bob.reads(ana.encrypt("hi"), "hi") // the ratchet turns
	ana.reads(bob.encrypt("0"), "0")
	write := func(session object) string {
		dir := t.TempDir()
		put(t, dir, "creds.json", credsOf(own))
		put(t, dir, "session-15550002.0.json", object{"version": "v1", "_sessions": object{"x": session}})
		return dir
	}
	late, next, after := bob.encrypt("1"), bob.encrypt("2"), bob.encrypt("3")
	_ = next // which Baileys has read, without those before it
	warren := imported(t, write(inJavaScript(t, ana.device, ana.other, 1)), ana.other, map[string]int{"sessions": 1})
	warren.reads(after, "3")
	warren.reads(late, "1")
	// Both turn the ratchet while Ana still uses Baileys; what comes then is in a chain that her state does not have yet.
	bob.reads(ana.encrypt("answer"), "answer")
	warren = imported(t, write(inJavaScript(t, ana.device, ana.other, 0)), ana.other, map[string]int{"sessions": 1})
	warren.reads(bob.encrypt("in a new chain"), "in a new chain")
	warren.reads(bob.encrypt("and on"), "and on")
	if has, err := warren.device.Sessions.HasSession(t.Context(), warren.other.String()); has || err != nil {
		t.Errorf("it is used for sending: %v", err)
	}
	warren.begin(bob)
	bob.reads(warren.encrypt("from warren"), "from warren")
	warren.reads(bob.encrypt("to warren"), "to warren")
}

func TestDamagedSessionsStayBehind(t *testing.T) {
	own := keys.NewKeyPair()
	anaJID, bobJID := types.NewADJID("15550001", 0, 3), types.NewADJID("15550002", 0, 0)
	ana := newParty(t, own, "15550001", bobJID)
	bob := newParty(t, keys.NewKeyPair(), "15550002", anaJID)
	bob.begin(ana)
	ana.reads(bob.encrypt("hello"), "hello")
	for name, spoil := range map[string]func(s object){
		"root key": func(s object) { s["currentRatchet"].(object)["rootKey"] = "AAAA" },
		"ratchet key": func(s object) {
			s["currentRatchet"].(object)["ephemeralKeyPair"].(object)["privKey"] = text64(make([]byte, 32))
		},
		"base key":     func(s object) { s["indexInfo"].(object)["baseKey"] = "" },
		"identity":     func(s object) { delete(s["indexInfo"].(object), "remoteIdentityKey") },
		"chain's name": func(s object) { s["_chains"].(object)["!"] = object{"chainType": 2, "chainKey": object{"counter": 0}} },
		"chain's key": func(s object) {
			s["_chains"].(object)[text64(append([]byte{5}, make([]byte, 32)...))] = object{"chainType": 2, "chainKey": object{"counter": 0, "key": "AA=="}}
		},
		"chain's count": func(s object) {
			s["_chains"].(object)[text64(append([]byte{5}, make([]byte, 32)...))] = object{"chainType": 2, "chainKey": object{"counter": -7}}
		},
		"no JSON": nil,
	} {
		dir := t.TempDir()
		put(t, dir, "creds.json", credsOf(own))
		if spoil == nil {
			put(t, dir, "session-15550002.0.json", "x")
		} else {
			js := inJavaScript(t, ana.device, ana.other, 0)
			spoil(js)
			put(t, dir, "session-15550002.0.json", object{"_sessions": object{"x": js}})
		}
		report, err := Run(t.Context(), Options{Format: FormatBaileys, From: dir, To: filepath.Join(t.TempDir(), "1"), DryRun: true})
		if err != nil || report.Carried["sessions"] != 0 || len(report.NotCarried) != 1 || report.NotCarried[0].Kind != "sessions" {
			t.Errorf("%s: %+v %v", name, report, err)
		}
	}
}

func TestSenderKeysOfBaileysAreRead(t *testing.T) {
	ctx := t.Context()
	own := keys.NewKeyPair()
	anaJID, bobJID := types.NewADJID("15550001", 0, 3), types.NewADJID("15550002", 0, 0)
	bob := newParty(t, keys.NewKeyPair(), "15550002", anaJID)
	const group = "120363000000000001@g.us"
	name := protocol.NewSenderKeyName(group, bobJID.SignalAddress())
	builder := groups.NewGroupSessionBuilder(bob.device, serializer)
	key, err := builder.Create(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	var messages []*protocol.SenderKeyMessage
	for n := range 3 {
		message, err := groups.NewGroupCipher(builder, name, bob.device).Encrypt(ctx, fmt.Append(nil, n))
		if err != nil {
			t.Fatal(err)
		}
		messages = append(messages, message.(*protocol.SenderKeyMessage))
	}
	// Baileys has read the second, and not the first.
	first := key.ChainKey()
	signing := key.SignatureKey().Serialize()
	text, err := json.Marshal([]object{{
		"senderKeyId":      key.ID(),
		"senderChainKey":   object{"iteration": 2, "seed": buffer(step(step(first, 2), 2))},
		"senderSigningKey": object{"public": buffer(signing), "private": buffer(nil)},
		"senderMessageKeys": []object{
			{"iteration": 0, "seed": buffer(step(first, 1))},
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	put(t, dir, "creds.json", credsOf(own))
	put(t, dir, "sender-key-"+group+"--15550002--0.json", buffer(text))
	put(t, dir, "sender-key-"+group+"--15550001--3.json", buffer(text))
	warren := imported(t, dir, bobJID.SignalAddress(), map[string]int{"sender_keys": 1})
	for _, n := range []int{2, 0} {
		cipher := groups.NewGroupCipher(groups.NewGroupSessionBuilder(warren.device, serializer), name, warren.device)
		plain, err := cipher.Decrypt(ctx, messages[n])
		if err != nil || string(plain) != fmt.Sprint(n) {
			t.Errorf("%d: %q %v", n, plain, err)
		}
	}
	mine, err := warren.device.SenderKeys.GetSenderKey(ctx, group, anaJID.SignalAddress().String())
	if err != nil || mine != nil {
		t.Errorf("our own sender key is used on: %v", err)
	}
}
