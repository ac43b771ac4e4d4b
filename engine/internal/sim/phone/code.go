package phone

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/pbkdf2"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"go.mau.fi/whatsmeow/util/keys"

	"warren/engine/internal/sim/server"
)

// Sizes and counts of whatsmeow pair-code.go.
const (
	codeSaltSize   = 32
	codeIVSize     = aes.BlockSize
	codeIterations = 2 << 16
	bundleSaltSize = 32
	bundleIVSize   = 12
	keySize        = 32
)

var (
	// ErrBadCode is returned for a text that is no pairing code.
	ErrBadCode = errors.New("not a pairing code: eight digits and letters, without 0, I, O and U")
	// ErrWrongCode is returned when the client shows another code. The client has to ask for a new one.
	ErrWrongCode = errors.New("the client that asks for this number shows another code")
)

// codePattern is the alphabet of pairing codes (whatsmeow pair-code.go, linkingBase32).
var codePattern = regexp.MustCompile(`^[1-9A-HJ-NP-TV-Z]{8}$`)

// EnterCode links the client that has asked for the phone's number and shows the code.
func (p *Phone) EnterCode(ctx context.Context, code string) (*server.Device, error) {
	code = strings.ToUpper(strings.NewReplacer("-", "", " ", "").Replace(code))
	if !codePattern.MatchString(code) {
		return nil, ErrBadCode
	}
	offer, err := p.srv.TakeCode(p.account)
	if err != nil {
		return nil, err
	}
	advSecret, err := p.agree(ctx, offer, code)
	if err != nil {
		return nil, err
	}
	return offer.Link(ctx, p.account, func(companion [32]byte, keyIndex uint32) ([]byte, error) {
		return p.signIdentity(companion, keyIndex, advSecret)
	})
}

// agree runs the key agreement with the client and returns the secret that a QR code would have carried.
func (p *Phone) agree(ctx context.Context, offer *server.CodeOffer, code string) ([]byte, error) {
	theirs, err := unwrapKey(offer.WrappedEphemeral, code)
	if err != nil {
		return nil, err
	}
	ephemeral := p.random.KeyPair()
	wrapped, err := wrapKey(*ephemeral.Pub, code, p.random.Bytes(codeSaltSize+codeIVSize))
	if err != nil {
		return nil, err
	}
	bundle, companion, err := offer.Answer(ctx, wrapped, *p.vault.store.identity.Pub)
	if err != nil {
		return nil, err
	}
	shared, err := exchange(ephemeral, theirs)
	if err != nil {
		return nil, ErrWrongCode // what the wrong code decrypts to need not be a key
	}
	random, err := p.openBundle(bundle, shared, companion)
	if err != nil {
		return nil, err
	}
	if companion != offer.Companion() {
		return nil, fmt.Errorf("%w: two identities", server.ErrPairingFailed)
	}
	identity, err := exchange(p.vault.store.identity, companion)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", server.ErrPairingFailed, err)
	}
	return hkdf.Key(sha256.New, bytes.Join([][]byte{shared, identity, random}, nil), nil, "adv_secret", keySize)
}

// openBundle checks that the client used the same keys and returns its random part of the secret. Only here a wrong code
// shows: a key under the code decrypts to something in any case.
func (p *Phone) openBundle(bundle, shared []byte, companion [32]byte) ([]byte, error) {
	if len(bundle) < bundleSaltSize+bundleIVSize {
		return nil, fmt.Errorf("%w: short bundle", server.ErrPairingFailed)
	}
	salt, iv := bundle[:bundleSaltSize], bundle[bundleSaltSize:bundleSaltSize+bundleIVSize]
	key, err := hkdf.Key(sha256.New, shared, salt, "link_code_pairing_key_bundle_encryption_key", keySize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	plain, err := gcm.Open(nil, iv, bundle[bundleSaltSize+bundleIVSize:], nil)
	if err != nil {
		return nil, ErrWrongCode
	}
	if len(plain) != 3*keySize || !bytes.Equal(plain[:keySize], companion[:]) || !bytes.Equal(plain[keySize:2*keySize], p.vault.store.identity.Pub[:]) {
		return nil, fmt.Errorf("%w: other keys in the bundle", server.ErrPairingFailed)
	}
	return plain[2*keySize:], nil
}

// wrapKey encrypts a public key under a code, behind the salt and IV.
func wrapKey(public [32]byte, code string, saltAndIV []byte) ([]byte, error) {
	masked, err := maskKey(public[:], code, saltAndIV)
	return append(bytes.Clone(saltAndIV), masked...), err
}

func unwrapKey(wrapped []byte, code string) (public [32]byte, err error) {
	plain, err := maskKey(wrapped[codeSaltSize+codeIVSize:], code, wrapped[:codeSaltSize+codeIVSize])
	if err != nil {
		return public, err
	}
	return [32]byte(plain), nil
}

func maskKey(data []byte, code string, saltAndIV []byte) ([]byte, error) {
	key, err := pbkdf2.Key(sha256.New, code, saltAndIV[:codeSaltSize], codeIterations, keySize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	out := make([]byte, len(data))
	cipher.NewCTR(block, saltAndIV[codeSaltSize:]).XORKeyStream(out, data)
	return out, nil
}

// exchange is X25519.
func exchange(own *keys.KeyPair, public [32]byte) ([]byte, error) {
	private, err := ecdh.X25519().NewPrivateKey(own.Priv[:])
	if err != nil {
		return nil, err
	}
	theirs, err := ecdh.X25519().NewPublicKey(public[:])
	if err != nil {
		return nil, err
	}
	return private.ECDH(theirs)
}
