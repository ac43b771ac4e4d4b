// Package phone is the simulator's virtual phones: the primary device of an account, with a person's view of it. A
// phone encrypts and decrypts for real; it hands the server ciphertext only.
//
// A phone has no goroutine of its own: it acts in the goroutine that brings it a stanza or a request. So a sender is
// never faster than its recipients, and nothing piles up between them. Its two locks (Signal state, person's view) are
// never held while it calls the server.
package phone

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/sim/random"
	"warren/engine/internal/sim/server"
)

// keyBatch is how many one-time keys a phone uploads at a time.
const keyBatch = 20

// ErrBadQR is returned for a text that is no WhatsApp QR code.
var ErrBadQR = errors.New("not a WhatsApp QR code")

// Phone is a virtual phone.
type Phone struct {
	srv     *server.Server
	log     *slog.Logger
	account *server.Account
	self    *server.Device
	vault   *vault
	// random makes message ids and the like; the vault's keys come from a stream of their own.
	random *random.Stream
	// rawID is the same in all device identities that this phone signs.
	rawID uint32

	// lidMode makes it send to LIDs.
	lidMode atomic.Bool
	// groupSend keeps group messages in order.
	groupSend sync.Mutex

	mu   sync.Mutex
	view view
}

// New creates an account with a phone at the server.
func New(srv *server.Server, number, name string, source random.Source, log *slog.Logger) (*Phone, error) {
	p := &Phone{
		srv: srv, log: log.With("phone", number), view: newView(),
		vault: newVault(source.Stream("keys of " + number)), random: source.Stream("phone " + number),
	}
	p.rawID = p.vault.store.registrationID
	account, err := srv.AddAccount(number, name, p.vault.registration(), func(self *server.Device) server.Sink {
		p.self, p.account = self, self.Account
		return p
	})
	if err != nil {
		return nil, err
	}
	srv.UploadKeys(account.Device(0), p.vault.generate(keyBatch))
	return p, nil
}

// Account is the phone's account.
func (p *Phone) Account() *server.Account { return p.account }

// SendToLIDs says whether the phone addresses accounts by LID or by phone number.
func (p *Phone) SendToLIDs(on bool) { p.lidMode.Store(on) }

// Scan links the client that shows a QR code.
func (p *Phone) Scan(ctx context.Context, text string) (*server.Device, error) {
	qr, err := ParseQR(text)
	if err != nil {
		return nil, err
	}
	return p.srv.Link(ctx, p.account, qr, func(companion [32]byte, keyIndex uint32) ([]byte, error) {
		return p.signIdentity(companion, keyIndex, qr.AdvSecret)
	})
}

// ParseQR reads the text of a QR code: `ref,noise key,identity key,adv secret[,client type]`, the keys in base64, which
// newer clients put behind `https://wa.me/settings/linked_devices#` (whatsmeow pair.go, makeQRData).
func ParseQR(text string) (server.QR, error) {
	if i := strings.LastIndexByte(text, '#'); i >= 0 {
		text = text[i+1:]
	}
	parts := strings.Split(text, ",")
	if len(parts) < 4 {
		return server.QR{}, ErrBadQR
	}
	var decoded [3][]byte
	for i, part := range parts[1:4] {
		raw, err := base64.StdEncoding.DecodeString(part)
		if err != nil || len(raw) != 32 {
			return server.QR{}, ErrBadQR
		}
		decoded[i] = raw
	}
	return server.QR{Ref: parts[0], NoiseKey: [32]byte(decoded[0]), Identity: [32]byte(decoded[1]), AdvSecret: decoded[2]}, nil
}

// signIdentity is what makes a companion one of the account's devices: the phone's signature over its identity key. The
// HMAC under the secret of the QR code proves to the companion that the answer comes from who scanned it.
func (p *Phone) signIdentity(companion [32]byte, keyIndex uint32, advSecret []byte) ([]byte, error) {
	details, err := proto.Marshal(&waAdv.ADVDeviceIdentity{
		RawID:       proto.Uint32(p.rawID),
		Timestamp:   proto.Uint64(uint64(time.Now().Unix())),
		KeyIndex:    proto.Uint32(keyIndex),
		AccountType: waAdv.ADVEncryptionType_E2EE.Enum(),
		DeviceType:  waAdv.ADVEncryptionType_E2EE.Enum(),
	})
	if err != nil {
		return nil, fmt.Errorf("device identity: %w", err)
	}
	signature := p.vault.sign(server.AccountMessage(details, companion))
	signed, err := proto.Marshal(&waAdv.ADVSignedDeviceIdentity{
		Details: details, AccountSignatureKey: p.vault.store.identity.Pub[:], AccountSignature: signature[:],
	})
	if err != nil {
		return nil, fmt.Errorf("device identity: %w", err)
	}
	mac := hmac.New(sha256.New, advSecret)
	mac.Write(signed)
	return proto.Marshal(&waAdv.ADVSignedDeviceIdentityHMAC{Details: signed, HMAC: mac.Sum(nil)})
}

// Receive takes a stanza from the server.
func (p *Phone) Receive(stanza server.Node) {
	switch stanza.Tag {
	case "message":
		p.receiveMessage(&stanza)
	case "receipt":
		p.receiveReceipt(&stanza)
	case "notification":
		if server.AttrString(&stanza, "type") == "encrypt" {
			p.srv.UploadKeys(p.self, p.vault.generate(keyBatch))
		}
	}
}

// signalAddress is the address that a device's session is kept under, whichever JID it is called by.
func signalAddress(account *server.Account, device uint16) *protocol.SignalAddress {
	jid := account.LIDJID()
	jid.Device = device
	return jid.SignalAddress()
}

// newMessageID looks like an Android phone's: 32 hex digits.
func (p *Phone) newMessageID() string { return fmt.Sprintf("%X", p.random.Bytes(16)) }
