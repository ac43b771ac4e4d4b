package server

import (
	"bytes"
	"context"
	"errors"
	"regexp"
	"time"

	"go.mau.fi/whatsmeow/types"
)

const (
	// wrappedKeySize is salt (32), IV (16) and a public key encrypted under the code (32) (whatsmeow pair-code.go,
	// generateCompanionEphemeralKey).
	wrappedKeySize = 80
	// codeFinishTimeout is how long a client may take to answer the phone; it is milliseconds of work.
	codeFinishTimeout = 20 * time.Second
)

// ErrUnknownCode is returned when no connected client asks to be linked to the number by a code.
var ErrUnknownCode = errors.New("no connected client asks for this number")

// displayPattern is what the server accepts as a client's name: `Browser (OS)` (whatsmeow pair-code.go, PairPhone).
var displayPattern = regexp.MustCompile(`^[^()]+ \([^()]+\)$`)

// CodeOffer is a client's wish to be linked to a number by a code. The code itself never reaches the server.
type CodeOffer struct {
	// WrappedEphemeral is the client's ephemeral key, encrypted under the code.
	WrappedEphemeral []byte

	client   *client
	ref      []byte
	finished chan codeFinish
}

// codeFinish is the client's last word.
type codeFinish struct {
	bundle   []byte
	identity [32]byte
}

// linkCode handles both stages that a client goes through, before it is a device.
func (c *client) linkCode(request *Node) ([]Node, *iqError) {
	if c.pairing == nil {
		return nil, errNotAuthorized
	}
	switch AttrString(request, "stage") {
	case "companion_hello":
		return c.offerCode(request)
	case "companion_finish":
		return nil, c.finishCode(request)
	default:
		return nil, errBadRequest
	}
}

// offerCode keeps the client's ephemeral key for the phone. A client that asks again, or for another number, replaces
// what it asked before; the last client to ask for a number gets it.
func (c *client) offerCode(hello *Node) ([]Node, *iqError) {
	wrapped := childBytes(hello, "link_code_pairing_wrapped_companion_ephemeral_pub")
	noiseKey := c.link.ClientStatic()
	if len(wrapped) != wrappedKeySize || !bytes.Equal(childBytes(hello, "companion_server_auth_key_pub"), noiseKey[:]) ||
		!displayPattern.MatchString(childText(hello, "companion_platform_display")) {
		return nil, errBadRequest
	}
	offer := &CodeOffer{
		WrappedEphemeral: wrapped, client: c, ref: []byte(c.srv.newRef("3@")), finished: make(chan codeFinish, 1),
	}
	c.withdrawCode()
	c.srv.mu.Lock()
	c.srv.codes[AttrJID(hello, "jid").User] = offer
	c.srv.mu.Unlock()
	return []Node{{Tag: "link_code_companion_reg", Attrs: Attrs{"stage": "companion_hello"}, Content: []Node{
		{Tag: "link_code_pairing_ref", Content: offer.ref},
	}}}, nil
}

// withdrawCode makes the client's wish unknown.
func (c *client) withdrawCode() {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	for number, offer := range c.srv.codes {
		if offer.client == c {
			delete(c.srv.codes, number)
		}
	}
}

// TakeCode finds who wants to be linked to an account by a code; one entry of a code uses the wish up.
func (s *Server) TakeCode(account *Account) (*CodeOffer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	offer := s.codes[account.Number]
	if offer == nil {
		return nil, ErrUnknownCode
	}
	delete(s.codes, account.Number)
	offer.client.entered.Store(offer)
	return offer, nil
}

// Answer gives the client the phone's keys and waits for the bundle that proves both have used the same code.
func (o *CodeOffer) Answer(ctx context.Context, wrappedEphemeral []byte, identity [32]byte) (bundle []byte, companion [32]byte, err error) {
	o.client.answer(Node{Tag: "notification", Attrs: Attrs{
		"from": types.ServerJID, "type": "link_code_companion_reg", "id": o.client.srv.nextID(), "t": time.Now().Unix(),
	}, Content: []Node{{Tag: "link_code_companion_reg", Attrs: Attrs{"stage": "primary_hello"}, Content: []Node{
		{Tag: "link_code_pairing_wrapped_primary_ephemeral_pub", Content: wrappedEphemeral},
		{Tag: "primary_identity_pub", Content: identity[:]},
		{Tag: "link_code_pairing_ref", Content: o.ref},
	}}}})
	ctx, cancel := context.WithTimeout(ctx, codeFinishTimeout)
	defer cancel()
	select {
	case finish := <-o.finished:
		return finish.bundle, finish.identity, nil
	case <-o.client.gone:
	case <-ctx.Done():
	}
	return nil, companion, ErrPairingFailed
}

// finishCode hands the client's bundle to the phone that waits for it.
func (c *client) finishCode(finish *Node) *iqError {
	offer := c.entered.Swap(nil)
	bundle, identity := childBytes(finish, "link_code_pairing_wrapped_key_bundle"), childBytes(finish, "companion_identity_public")
	if offer == nil || !bytes.Equal(childBytes(finish, "link_code_pairing_ref"), offer.ref) {
		return errItemNotFound
	}
	if len(identity) != 32 {
		return errBadRequest
	}
	offer.finished <- codeFinish{bundle, [32]byte(identity)}
	return nil
}

// Link completes the pairing, as a scanned QR code does.
func (o *CodeOffer) Link(ctx context.Context, account *Account, sign SignIdentity) (*Device, error) {
	o.client.withdrawRefs()
	return o.client.srv.pair(ctx, o.client, account, sign)
}

// Companion is the identity key that the client registered with: the bundle must name the same.
func (o *CodeOffer) Companion() [32]byte { return o.client.pairing.registration.Identity }
