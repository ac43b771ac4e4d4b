// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"fmt"
	"testing"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/libsignal/keys/identity"
	"go.mau.fi/libsignal/keys/prekey"
	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/session"
	"go.mau.fi/libsignal/util/optional"
	"go.mau.fi/whatsmeow/store"
)

// peer is one side of a conversation, on a real store.
type peer struct {
	t      *testing.T
	device *store.Device
	store  *Store
	other  *protocol.SignalAddress
}

func newPeer(t *testing.T, other string) *peer {
	s, _ := paired(t)
	t.Cleanup(func() { mustClose(t, s) })
	return &peer{t: t, device: s.Device, store: s, other: protocol.NewSignalAddress(other, 0)}
}

func (p *peer) builder() *session.Builder {
	return session.NewBuilderFromSignal(p.device, p.other, store.SignalProtobufSerializer)
}

// begin starts a session with the other's keys.
func (p *peer) begin(with *peer) {
	p.t.Helper()
	one, err := with.device.PreKeys.GenOnePreKey(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	signed := with.device.SignedPreKey
	bundle := prekey.NewBundle(with.device.RegistrationID, 0, optional.NewOptionalUint32(one.KeyID), signed.KeyID,
		ecc.NewDjbECPublicKey(*one.Pub), ecc.NewDjbECPublicKey(*signed.Pub), *signed.Signature,
		identity.NewKey(ecc.NewDjbECPublicKey(*with.device.IdentityKey.Pub)))
	if err := p.builder().ProcessBundle(context.Background(), bundle); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) encrypt(text string) protocol.CiphertextMessage {
	p.t.Helper()
	message, err := session.NewCipher(p.builder(), p.other).Encrypt(context.Background(), []byte(text))
	if err != nil {
		p.t.Fatal(err)
	}
	return message
}

func (p *peer) decrypt(message protocol.CiphertextMessage) (text string, err error) {
	cipher := session.NewCipher(p.builder(), p.other)
	err = p.device.EventBuffer.DoDecryptionTxn(context.Background(), func(ctx context.Context) error {
		var plain []byte
		var err error
		if pre, ok := message.(*protocol.PreKeySignalMessage); ok {
			plain, err = cipher.DecryptMessage(ctx, pre)
		} else {
			plain, err = cipher.Decrypt(ctx, message.(*protocol.SignalMessage))
		}
		text = string(plain)
		return err
	})
	return text, err
}

// TestBothSidesBeginAtOnce has two people write to each other for the first time, with every message crossing one of the other's, for a while.
func TestBothSidesBeginAtOnce(t *testing.T) {
	a, b := newPeer(t, "b"), newPeer(t, "a")
	a.begin(b)
	b.begin(a)
	const lag = 3 // messages under way in each direction
	var toA, toB []protocol.CiphertextMessage
	for n := range 40 {
		toB = append(toB, a.encrypt(fmt.Sprint("a", n)))
		toA = append(toA, b.encrypt(fmt.Sprint("b", n)))
		if n < lag {
			continue
		}
		if text, err := b.decrypt(toB[n-lag]); err != nil || text != fmt.Sprint("a", n-lag) {
			t.Fatalf("a%d: %q %v", n-lag, text, err)
		}
		if text, err := a.decrypt(toA[n-lag]); err != nil || text != fmt.Sprint("b", n-lag) {
			t.Fatalf("b%d: %q %v", n-lag, text, err)
		}
	}
}
