// Package noise is the server's side of WhatsApp's handshake, Noise_XX_25519_AESGCM_SHA256, and the transport ciphers
// that come of it. The client's side is whatsmeow's socket package.
package noise

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"go.mau.fi/whatsmeow/proto/waWa6"
	"google.golang.org/protobuf/proto"
)

// pattern is exactly 32 bytes, so it is used as the first hash unhashed (Noise, section 5.2).
const pattern = "Noise_XX_25519_AESGCM_SHA256\x00\x00\x00\x00"

const keySize = 32

// Frames carries handshake messages, whole.
type Frames interface {
	ReadFrame() ([]byte, error)
	WriteFrame([]byte) error
}

// Result is a completed handshake.
type Result struct {
	// Payload is the encoded ClientPayload.
	Payload []byte
	// ClientStatic is the client's long-lived Noise key: what a linked device is recognised by.
	ClientStatic [32]byte
	Send, Recv   *Cipher
}

// Respond runs the handshake as the server. The prologue is the connection header that the client sent.
func (id *Identity) Respond(frames Frames, prologue []byte) (*Result, error) {
	state, err := newState(prologue)
	if err != nil {
		return nil, err
	}
	clientEphemeral, err := readHello(frames, state)
	if err != nil {
		return nil, fmt.Errorf("client hello: %w", err)
	}
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("ephemeral key: %w", err)
	}
	if err := id.writeHello(frames, state, ephemeral, clientEphemeral); err != nil {
		return nil, fmt.Errorf("server hello: %w", err)
	}
	result, err := readFinish(frames, state, ephemeral)
	if err != nil {
		return nil, fmt.Errorf("client finish: %w", err)
	}
	return result, nil
}

func readHello(frames Frames, state *handshake) (*ecdh.PublicKey, error) {
	message, err := readMessage(frames)
	if err != nil {
		return nil, err
	}
	raw := message.GetClientHello().GetEphemeral()
	public, err := ecdh.X25519().NewPublicKey(raw)
	if err != nil {
		return nil, fmt.Errorf("ephemeral key: %w", err)
	}
	state.authenticate(raw)
	return public, nil
}

func (id *Identity) writeHello(frames Frames, state *handshake, ephemeral *ecdh.PrivateKey, client *ecdh.PublicKey) error {
	public := ephemeral.PublicKey().Bytes()
	state.authenticate(public)
	if err := state.mix(ephemeral, client); err != nil {
		return err
	}
	static := state.encrypt(id.static.PublicKey().Bytes())
	if err := state.mix(id.static, client); err != nil {
		return err
	}
	data, err := proto.Marshal(&waWa6.HandshakeMessage{ServerHello: &waWa6.HandshakeMessage_ServerHello{
		Ephemeral: public,
		Static:    static,
		Payload:   state.encrypt(id.chain),
	}})
	if err != nil {
		return err
	}
	return frames.WriteFrame(data)
}

func readFinish(frames Frames, state *handshake, ephemeral *ecdh.PrivateKey) (*Result, error) {
	message, err := readMessage(frames)
	if err != nil {
		return nil, err
	}
	rawStatic, err := state.decrypt(message.GetClientFinish().GetStatic())
	if err != nil {
		return nil, fmt.Errorf("static key: %w", err)
	}
	static, err := ecdh.X25519().NewPublicKey(rawStatic)
	if err != nil {
		return nil, fmt.Errorf("static key: %w", err)
	}
	if err := state.mix(ephemeral, static); err != nil {
		return nil, err
	}
	payload, err := state.decrypt(message.GetClientFinish().GetPayload())
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	result := &Result{Payload: payload, ClientStatic: [32]byte(rawStatic)}
	result.Recv, result.Send, err = state.split()
	return result, err
}

func readMessage(frames Frames) (*waWa6.HandshakeMessage, error) {
	data, err := frames.ReadFrame()
	if err != nil {
		return nil, err
	}
	var message waWa6.HandshakeMessage
	if err := proto.Unmarshal(data, &message); err != nil {
		return nil, err
	}
	return &message, nil
}

// handshake is Noise's SymmetricState.
type handshake struct {
	hash, salt []byte
	cipher     *Cipher
}

func newState(prologue []byte) (*handshake, error) {
	first, err := newCipher([]byte(pattern))
	if err != nil {
		return nil, err
	}
	state := &handshake{hash: []byte(pattern), salt: []byte(pattern), cipher: first}
	state.authenticate(prologue)
	return state, nil
}

func (h *handshake) authenticate(data []byte) {
	sum := sha256.New()
	sum.Write(h.hash)
	sum.Write(data)
	h.hash = sum.Sum(nil)
}

func (h *handshake) encrypt(plaintext []byte) []byte {
	ciphertext := h.cipher.seal(plaintext, h.hash)
	h.authenticate(ciphertext)
	return ciphertext
}

func (h *handshake) decrypt(ciphertext []byte) ([]byte, error) {
	plaintext, err := h.cipher.open(ciphertext, h.hash)
	if err != nil {
		return nil, err
	}
	h.authenticate(ciphertext)
	return plaintext, nil
}

func (h *handshake) mix(private *ecdh.PrivateKey, public *ecdh.PublicKey) error {
	secret, err := private.ECDH(public)
	if err != nil {
		return fmt.Errorf("key agreement: %w", err)
	}
	salt, key, err := h.derive(secret)
	if err != nil {
		return err
	}
	h.salt = salt
	h.cipher, err = newCipher(key)
	return err
}

// split derives the transport ciphers: the first key is the client's for writing.
func (h *handshake) split() (fromClient, toClient *Cipher, err error) {
	first, second, err := h.derive(nil)
	if err != nil {
		return nil, nil, err
	}
	if fromClient, err = newCipher(first); err != nil {
		return nil, nil, err
	}
	toClient, err = newCipher(second)
	return fromClient, toClient, err
}

func (h *handshake) derive(secret []byte) (first, second []byte, err error) {
	both, err := hkdf.Key(sha256.New, secret, h.salt, "", 2*keySize)
	if err != nil {
		return nil, nil, fmt.Errorf("derive keys: %w", err)
	}
	return both[:keySize], both[keySize:], nil
}

// Cipher is one direction of AES-256-GCM with a counting nonce. It is not safe for concurrent use.
type Cipher struct {
	aead    cipher.AEAD
	counter uint32
}

func newCipher(key []byte) (*Cipher, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &Cipher{aead: aead}, nil
}

var errCounterUsedUp = errors.New("noise: nonce counter used up")

// Seal encrypts one transport frame.
func (c *Cipher) Seal(plaintext []byte) []byte { return c.seal(plaintext, nil) }

// Open decrypts one transport frame, in place.
func (c *Cipher) Open(ciphertext []byte) ([]byte, error) {
	if c.counter == ^uint32(0) {
		return nil, errCounterUsedUp
	}
	nonce := c.nonce()
	return c.aead.Open(ciphertext[:0], nonce[:], ciphertext, nil)
}

func (c *Cipher) seal(plaintext, additional []byte) []byte {
	nonce := c.nonce()
	return c.aead.Seal(nil, nonce[:], plaintext, additional)
}

func (c *Cipher) open(ciphertext, additional []byte) ([]byte, error) {
	nonce := c.nonce()
	return c.aead.Open(nil, nonce[:], ciphertext, additional)
}

// nonce is 8 zero bytes and the big-endian counter, as whatsmeow's generateIV builds it.
func (c *Cipher) nonce() (nonce [12]byte) {
	binary.BigEndian.PutUint32(nonce[8:], c.counter)
	c.counter++
	return nonce
}
