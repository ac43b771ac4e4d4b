package noise

import (
	"crypto/ecdh"
	"fmt"
	"time"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/whatsmeow/proto/waCert"
	"go.mau.fi/whatsmeow/util/keys"
	"google.golang.org/protobuf/proto"
)

const (
	// The client compares the intermediate's issuer serial with a constant 0 (whatsmeow handshake.go, WACertIssuerSerial).
	rootSerial         = 0
	intermediateSerial = 1
	leafSerial         = 2

	certLifetime = 10 * 365 * 24 * time.Hour
	// Clocks of the two processes are the same machine's; an hour covers a clock that is set back while a test runs.
	certBackdate = time.Hour
)

// Identity is what a WhatsApp server proves itself with: a static Noise key and a chain root → intermediate → leaf over
// it. Clients pin the root's public key.
type Identity struct {
	// Root is the public key a client must pin.
	Root [32]byte

	static *ecdh.PrivateKey
	chain  []byte
}

// NewIdentity certifies a static key, the leaf, under root.
func NewIdentity(root, intermediate, leaf *keys.KeyPair, now time.Time) (*Identity, error) {
	intermediateCert, err := certify(root, intermediate, intermediateSerial, rootSerial, now)
	if err != nil {
		return nil, err
	}
	leafCert, err := certify(intermediate, leaf, leafSerial, intermediateSerial, now)
	if err != nil {
		return nil, err
	}
	chain, err := proto.Marshal(&waCert.CertChain{Leaf: leafCert, Intermediate: intermediateCert})
	if err != nil {
		return nil, fmt.Errorf("encode certificate chain: %w", err)
	}
	static, err := ecdh.X25519().NewPrivateKey(leaf.Priv[:])
	if err != nil {
		return nil, fmt.Errorf("static key: %w", err)
	}
	return &Identity{Root: *root.Pub, static: static, chain: chain}, nil
}

// certify signs the subject's key with the issuer's (XEdDSA over the encoded details).
func certify(issuer, subject *keys.KeyPair, serial, issuerSerial uint32, now time.Time) (*waCert.CertChain_NoiseCertificate, error) {
	details, err := proto.Marshal(&waCert.CertChain_NoiseCertificate_Details{
		Serial:       proto.Uint32(serial),
		IssuerSerial: proto.Uint32(issuerSerial),
		Key:          subject.Pub[:],
		NotBefore:    proto.Uint64(uint64(now.Add(-certBackdate).Unix())),
		NotAfter:     proto.Uint64(uint64(now.Add(certLifetime).Unix())),
	})
	if err != nil {
		return nil, fmt.Errorf("encode certificate %d: %w", serial, err)
	}
	signature := ecc.CalculateSignature(ecc.NewDjbECPrivateKey(*issuer.Priv), details)
	return &waCert.CertChain_NoiseCertificate{Details: details, Signature: signature[:]}, nil
}
