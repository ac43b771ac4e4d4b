package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/proto/waWa6"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

const (
	// refCount is how many QR references the server offers: clients show one after the other.
	refCount = 6
	refBytes = 32
)

var (
	// ErrUnknownQR is returned when no connected client shows the code.
	ErrUnknownQR = errors.New("no connected client shows this code")
	// ErrPairingFailed is returned when the client refused, or went away before it had confirmed.
	ErrPairingFailed = errors.New("the client did not confirm the pairing")
)

// Prefixes of what is signed in a device identity (whatsmeow pair.go).
var (
	advAccountPrefix = []byte{6, 0}
	advDevicePrefix  = []byte{6, 1}
)

// pairing is what a client that wants to be paired has told about itself.
type pairing struct {
	registration Registration
	refs         []string
}

// claim is a pairing that a phone has begun: the device exists once the client has signed for it.
type claim struct {
	device   *Device
	iqID     string
	identity *waAdv.ADVSignedDeviceIdentity
	done     chan error
}

// QR is the content of a QR code.
type QR struct {
	Ref                string
	NoiseKey, Identity [32]byte
	AdvSecret          []byte
}

// SignIdentity makes the phone's ADVSignedDeviceIdentityHMAC for a companion, encoded.
type SignIdentity func(companion [32]byte, keyIndex uint32) ([]byte, error)

// AccountMessage is what the primary device signs for a companion.
func AccountMessage(details []byte, companion [32]byte) []byte {
	return bytes.Join([][]byte{advAccountPrefix, details, companion[:]}, nil)
}

// offerPairing sends the references for QR codes.
func (c *client) offerPairing(data *waWa6.ClientPayload_DevicePairingRegistrationData) {
	registration, err := parsePairingData(data)
	if err != nil {
		c.fail(failureBadRequest)
		return
	}
	c.pairing = &pairing{registration: registration}
	nodes := make([]Node, refCount)
	for i := range nodes {
		ref := c.srv.newRef("2@")
		c.pairing.refs = append(c.pairing.refs, ref)
		nodes[i] = Node{Tag: "ref", Content: []byte(ref)}
	}
	c.showRefs()
	c.answer(Node{Tag: "iq", Attrs: Attrs{
		"from": types.ServerJID, "type": "set", "id": c.srv.nextID(), "xmlns": "md", "t": time.Now().Unix(),
	}, Content: []Node{{Tag: "pair-device", Content: nodes}}})
}

func (s *Server) newRef(prefix string) string {
	return prefix + base64.RawURLEncoding.EncodeToString(s.random.Bytes(refBytes))
}

func parsePairingData(data *waWa6.ClientPayload_DevicePairingRegistrationData) (Registration, error) {
	if len(data.GetERegid()) != 4 || len(data.GetEIdent()) != 32 || len(data.GetESkeyID()) != 3 ||
		len(data.GetESkeyVal()) != 32 || len(data.GetESkeySig()) != 64 {
		return Registration{}, errBadKeys
	}
	return Registration{
		ID:       binary.BigEndian.Uint32(data.GetERegid()),
		Identity: [32]byte(data.GetEIdent()),
		Signed: SignedKey{
			ID:        uint24(data.GetESkeyID()),
			Public:    [32]byte(data.GetESkeyVal()),
			Signature: [64]byte(data.GetESkeySig()),
		},
	}, nil
}

func (c *client) showRefs() {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	for _, ref := range c.pairing.refs {
		c.srv.refs[ref] = c
	}
}

// withdrawRefs makes the client's codes unknown; it is called again when the connection ends.
func (c *client) withdrawRefs() {
	if c.pairing == nil {
		return
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	for _, ref := range c.pairing.refs {
		delete(c.srv.refs, ref)
	}
}

// takeRef finds the client that shows a code; only one scan gets it.
func (s *Server) takeRef(qr QR) *client {
	s.mu.Lock()
	c := s.refs[qr.Ref]
	delete(s.refs, qr.Ref)
	s.mu.Unlock()
	if c == nil || c.pairing.registration.Identity != qr.Identity || c.link.ClientStatic() != qr.NoiseKey {
		return nil
	}
	c.withdrawRefs()
	return c
}

// Link pairs the client that shows a code with an account and returns once the client has signed for it and the server
// has verified that.
func (s *Server) Link(ctx context.Context, account *Account, qr QR, sign SignIdentity) (*Device, error) {
	c := s.takeRef(qr)
	if c == nil {
		return nil, ErrUnknownQR
	}
	return s.pair(ctx, c, account, sign)
}

func (s *Server) pair(ctx context.Context, c *client, account *Account, sign SignIdentity) (*Device, error) {
	claim, err := s.prepare(c, account, sign)
	if err != nil {
		return nil, err
	}
	return claim.device, c.await515(ctx, claim)
}

// prepare reserves a device and sends the client its identity.
func (s *Server) prepare(c *client, account *Account, sign SignIdentity) (*claim, error) {
	device, err := account.reserve()
	if err != nil {
		return nil, err
	}
	device.noiseKey = c.link.ClientStatic()
	device.keys.register(c.pairing.registration)
	container, err := sign(c.pairing.registration.Identity, device.KeyIndex)
	if err != nil {
		return nil, err
	}
	identity, err := unwrapIdentity(container)
	if err != nil {
		return nil, err
	}
	claim := &claim{device: device, iqID: s.nextID(), identity: identity, done: make(chan error, 1)}
	if !c.claim.CompareAndSwap(nil, claim) {
		return nil, ErrUnknownQR
	}
	c.answer(pairSuccess(claim, container))
	return claim, nil
}

func unwrapIdentity(container []byte) (*waAdv.ADVSignedDeviceIdentity, error) {
	var outer waAdv.ADVSignedDeviceIdentityHMAC
	if err := proto.Unmarshal(container, &outer); err != nil {
		return nil, fmt.Errorf("device identity: %w", err)
	}
	var identity waAdv.ADVSignedDeviceIdentity
	if err := proto.Unmarshal(outer.GetDetails(), &identity); err != nil {
		return nil, fmt.Errorf("device identity: %w", err)
	}
	return &identity, nil
}

// pairSuccess carries t: without it whatsmeow's clock offset is garbage.
func pairSuccess(claim *claim, container []byte) Node {
	return Node{Tag: "iq", Attrs: Attrs{
		"from": types.ServerJID, "type": "set", "id": claim.iqID, "xmlns": "md", "t": time.Now().Unix(),
	}, Content: []Node{{Tag: "pair-success", Content: []Node{
		{Tag: "device-identity", Content: container},
		{Tag: "device", Attrs: Attrs{"jid": claim.device.JID(), "lid": claim.device.Address(true)}},
		{Tag: "platform", Attrs: Attrs{"name": "android"}},
	}}}}
}

// await515 waits for the client's signature; the reader completes the claim.
func (c *client) await515(ctx context.Context, claim *claim) error {
	select {
	case err := <-claim.done:
		return err
	case <-c.gone:
	case <-ctx.Done():
		c.link.Abort()
		<-c.gone
	}
	// The client may have signed in the last moment: then the device exists.
	select {
	case err := <-claim.done:
		return err
	default:
		return ErrPairingFailed
	}
}

// completePairing handles the client's answer to pair-success.
func (c *client) completePairing(claim *claim, iq *Node) {
	if AttrString(iq, "type") != "result" {
		claim.done <- ErrPairingFailed
		c.goodbye(streamError("500"))
		return
	}
	if err := c.verifyDevice(claim, iq); err != nil {
		c.log.Warn("device signature refused", "action", "pairing_refused", "error", err)
		claim.done <- fmt.Errorf("%w: %w", ErrPairingFailed, err)
		c.goodbye(streamError("401"))
		return
	}
	change := claim.device.Account.add(claim.device)
	// 515 asks the client to connect again, now as the device that it has become.
	c.goodbye(streamError("515"))
	claim.done <- nil
	c.srv.announce(change)
	c.log.Info("paired", "action", "paired", "account", claim.device.Account.Number, "device", claim.device.ID)
}

// verifyDevice checks that the client has signed the identity it was given with the key of its QR code.
func (c *client) verifyDevice(claim *claim, iq *Node) error {
	sign := iq.GetChildByTag("pair-device-sign")
	var signed waAdv.ADVSignedDeviceIdentity
	if err := proto.Unmarshal(childBytes(&sign, "device-identity"), &signed); err != nil {
		return err
	}
	if !bytes.Equal(signed.GetDetails(), claim.identity.GetDetails()) || len(signed.GetDeviceSignature()) != 64 {
		return errors.New("another identity than the one given")
	}
	companion := c.pairing.registration.Identity
	message := bytes.Join([][]byte{advDevicePrefix, signed.GetDetails(), companion[:], claim.identity.GetAccountSignatureKey()}, nil)
	if !ecc.VerifySignature(ecc.NewDjbECPublicKey(companion), message, [64]byte(signed.GetDeviceSignature())) {
		return errors.New("bad device signature")
	}
	return nil
}
