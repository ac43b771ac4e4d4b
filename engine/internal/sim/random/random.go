// Package random is where the simulator's keys and ids come from: the operating system, or, with a seed, a generator
// that gives the same at every run. Each thing draws from a stream of its own, named after it, so that what one phone
// does changes nothing for another.
package random

import (
	crypto "crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"sync"

	"go.mau.fi/whatsmeow/util/keys"
)

// Source makes streams. The zero value is the operating system's randomness.
type Source struct{ seed *uint64 }

// Seeded is a source that repeats itself.
func Seeded(seed uint64) Source { return Source{&seed} }

// Stream returns the stream of a name. With a seed, two streams of one name give the same.
func (s Source) Stream(name string) *Stream {
	if s.seed == nil {
		return &Stream{from: crypto.Reader}
	}
	input := append(binary.BigEndian.AppendUint64(nil, *s.seed), name...)
	return &Stream{from: rand.NewChaCha8(sha256.Sum256(input))}
}

// Stream is a source of bytes, safe for concurrent use.
type Stream struct {
	mu   sync.Mutex
	from io.Reader
}

// Bytes returns n bytes.
func (s *Stream) Bytes(n int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]byte, n)
	_, _ = io.ReadFull(s.from, out) // neither source ever fails
	return out
}

// Uint32 returns a number below n.
func (s *Stream) Uint32(n uint32) uint32 { return binary.BigEndian.Uint32(s.Bytes(4)) % n }

// KeyPair returns a Curve25519 key pair.
func (s *Stream) KeyPair() *keys.KeyPair {
	private := [32]byte(s.Bytes(32))
	private[0] &= 248
	private[31] = private[31]&127 | 64
	return keys.NewKeyPairFromPrivateKey(private)
}

// PreKey returns a one-time key.
func (s *Stream) PreKey(id uint32) *keys.PreKey {
	return &keys.PreKey{KeyPair: *s.KeyPair(), KeyID: id}
}
