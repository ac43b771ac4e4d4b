package phone

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"go.mau.fi/libsignal/ecc"
	groupRecord "go.mau.fi/libsignal/groups/state/record"
	"go.mau.fi/libsignal/keys/identity"
	"go.mau.fi/libsignal/keys/prekey"
	"go.mau.fi/libsignal/logger"
	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/serialize"
	"go.mau.fi/libsignal/session"
	"go.mau.fi/libsignal/signalerror"
	"go.mau.fi/libsignal/state/record"
	"go.mau.fi/libsignal/util/optional"
	"go.mau.fi/whatsmeow/util/keys"

	"warren/engine/internal/sim/random"
	"warren/engine/internal/sim/server"
)

// Signal message kinds, as the type attribute of `<enc>` names them.
const (
	encPreKey = "pkmsg"
	encNormal = "msg"
)

const signedPreKeyID = 1

var serializer = serialize.NewProtoBufSerializer()

var errUnsupported = errors.New("the phone's key store does not do this")

// libsignal's default logger prints to stdout, which belongs to the simulator's one line of JSON; and it is set up
// lazily by whoever logs first, without a lock.
func init() {
	var quiet logger.Loggable = quietLogger{}
	logger.Setup(&quiet)
}

type quietLogger struct{}

func (quietLogger) Debug(string, string) {}
func (quietLogger) Info(string, string)  {}
func (quietLogger) Warning(caller, message string) {
	slog.Debug(message, "module", "libsignal", "caller", caller)
}
func (quietLogger) Error(caller, message string) {
	slog.Debug(message, "module", "libsignal", "caller", caller)
}
func (quietLogger) Configure(string) {}

// vault is a phone's Signal state, in memory. Its methods take its lock; they never call the server.
type vault struct {
	random *random.Stream
	mu     sync.Mutex
	store  store
}

func newVault(stream *random.Stream) *vault {
	own, signed := stream.KeyPair(), stream.PreKey(signedPreKeyID)
	signed.Signature = own.Sign(&signed.KeyPair)
	return &vault{random: stream, store: store{
		identity:       own,
		registrationID: stream.Uint32(16380) + 1, // Signal's range
		signed:         signed,
		preKeys:        map[uint32]*keys.PreKey{},
		sessions:       map[string]*record.SessionStructure{},
		senderKeys:     map[senderKeyID]*groupRecord.SenderKey{},
	}}
}

// registration is what the phone publishes at the server.
func (v *vault) registration() server.Registration {
	return server.Registration{
		ID: v.store.registrationID, Identity: *v.store.identity.Pub,
		Signed: server.SignedKey{ID: v.store.signed.KeyID, Public: *v.store.signed.Pub, Signature: *v.store.signed.Signature},
	}
}

// sign signs with the identity key (XEdDSA).
func (v *vault) sign(message []byte) [64]byte {
	return ecc.CalculateSignature(ecc.NewDjbECPrivateKey(*v.store.identity.Priv), message)
}

// generate makes n one-time keys and returns their public halves.
func (v *vault) generate(n int) []server.OneTimeKey {
	v.mu.Lock()
	defer v.mu.Unlock()
	public := make([]server.OneTimeKey, n)
	for i := range public {
		v.store.lastPreKey++
		key := v.random.PreKey(v.store.lastPreKey)
		v.store.preKeys[key.KeyID] = key
		public[i] = server.OneTimeKey{ID: key.KeyID, Public: *key.Pub}
	}
	return public
}

func (v *vault) hasSession(address *protocol.SignalAddress) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.store.sessions[address.String()] != nil
}

// begin starts a session from a bundle. With replace, a session that exists is archived: a retry asks for a new one.
func (v *vault) begin(address *protocol.SignalAddress, b server.Bundle, replace bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.store.sessions[address.String()] != nil && !replace {
		return nil
	}
	builder := session.NewBuilderFromSignal(&v.store, address, serializer)
	return builder.ProcessBundle(context.Background(), signalBundle(address.DeviceID(), b))
}

func signalBundle(deviceID uint32, b server.Bundle) *prekey.Bundle {
	id, public := optional.NewEmptyUint32(), ecc.ECPublicKeyable(nil)
	if b.OneTime != nil {
		id, public = optional.NewOptionalUint32(b.OneTime.ID), ecc.NewDjbECPublicKey(b.OneTime.Public)
	}
	return prekey.NewBundle(b.ID, deviceID, id, b.Signed.ID, public,
		ecc.NewDjbECPublicKey(b.Signed.Public), b.Signed.Signature, identity.NewKey(ecc.NewDjbECPublicKey(b.Identity)))
}

// encrypt encrypts in an existing session.
func (v *vault) encrypt(address *protocol.SignalAddress, plaintext []byte) (kind string, ciphertext []byte, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	cipher := session.NewCipher(session.NewBuilderFromSignal(&v.store, address, serializer), address)
	message, err := cipher.Encrypt(context.Background(), plaintext)
	if err != nil {
		return "", nil, err
	}
	kind = encNormal
	if message.Type() == protocol.PREKEY_TYPE {
		kind = encPreKey
	}
	return kind, message.Serialize(), nil
}

// decrypt decrypts a message. errOldCounter means that its key was used before.
func (v *vault) decrypt(address *protocol.SignalAddress, kind string, ciphertext []byte) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if kind == encPreKey {
		return v.decryptPreKey(address, ciphertext)
	}
	message, err := protocol.NewSignalMessageFromBytes(ciphertext, serializer.SignalMessage)
	if err != nil {
		return nil, fmt.Errorf("parse: %w", err)
	}
	structure := v.store.sessions[address.String()]
	if structure == nil {
		return nil, signalerror.ErrNoSessionForUser
	}
	return v.decryptIn(address, structure, message)
}

// decryptPreKey decrypts a message that starts a session, or still announces one.
func (v *vault) decryptPreKey(address *protocol.SignalAddress, ciphertext []byte) ([]byte, error) {
	ctx := context.Background()
	message, err := protocol.NewPreKeySignalMessageFromBytes(ciphertext, serializer.PreKeySignalMessage, serializer.SignalMessage)
	if err != nil {
		return nil, fmt.Errorf("parse: %w", err)
	}
	existing, err := v.store.LoadSession(ctx, address)
	if err != nil {
		return nil, err
	}
	used, err := session.NewBuilderFromSignal(&v.store, address, serializer).Process(ctx, existing, message)
	if err != nil {
		return nil, err
	}
	plaintext, err := v.decryptIn(address, existing.Structure(), message.WhisperMessage())
	if err == nil && !used.IsEmpty {
		delete(v.store.preKeys, used.Value)
	}
	return plaintext, err
}

// decryptIn tries the session's current state, then its archived ones, each in a copy: libsignal's own loop changes the
// states that it tries in vain, and breaks sessions that two sides have started at the same time.
func (v *vault) decryptIn(address *protocol.SignalAddress, structure *record.SessionStructure, message *protocol.SignalMessage) ([]byte, error) {
	cipher := session.NewCipher(session.NewBuilderFromSignal(&v.store, address, serializer), address)
	for i := -1; i < len(structure.PreviousStates); i++ {
		attempt, err := record.NewSessionFromStructure(promote(structure, i), serializer.Session, serializer.State)
		if err != nil {
			return nil, err
		}
		plaintext, _, err := cipher.DecryptWithState(context.Background(), attempt.SessionState(), message)
		if err == nil {
			v.store.sessions[address.String()] = attempt.Structure()
			return plaintext, nil
		}
		if errors.Is(err, errOldCounter) {
			return nil, err
		}
	}
	return nil, signalerror.ErrNoValidSessions
}

// promote makes the archived state i the current one; -1 leaves all as it is.
func promote(s *record.SessionStructure, i int) *record.SessionStructure {
	if i < 0 {
		return s
	}
	previous := []*record.StateStructure{s.SessionState}
	for j, state := range s.PreviousStates {
		if j != i {
			previous = append(previous, state)
		}
	}
	return &record.SessionStructure{SessionState: s.PreviousStates[i], PreviousStates: previous}
}

var errOldCounter = signalerror.ErrOldCounter

// store is libsignal's view of the vault; the vault's lock is held whenever libsignal calls it.
type store struct {
	identity       *keys.KeyPair
	registrationID uint32
	signed         *keys.PreKey
	preKeys        map[uint32]*keys.PreKey
	lastPreKey     uint32
	// sessions are kept as structures, not as records: libsignal changes a record while it decrypts, even when it fails in
	// the end. A structure is built anew at every save and read at every load, without the cost of JSON.
	sessions   map[string]*record.SessionStructure
	senderKeys map[senderKeyID]*groupRecord.SenderKey
}

func (s *store) GetIdentityKeyPair() *identity.KeyPair {
	return identity.NewKeyPair(identity.NewKey(ecc.NewDjbECPublicKey(*s.identity.Pub)), ecc.NewDjbECPrivateKey(*s.identity.Priv))
}

func (s *store) GetLocalRegistrationID() uint32 { return s.registrationID }

// SaveIdentity keeps nothing: a person who never compares security codes trusts every key.
func (s *store) SaveIdentity(context.Context, *protocol.SignalAddress, *identity.Key) error {
	return nil
}

func (s *store) IsTrustedIdentity(context.Context, *protocol.SignalAddress, *identity.Key) (bool, error) {
	return true, nil
}

func (s *store) LoadPreKey(_ context.Context, id uint32) (*record.PreKey, error) {
	key := s.preKeys[id]
	if key == nil {
		return nil, nil // libsignal takes this for "used already"
	}
	return record.NewPreKey(key.KeyID, ecPair(&key.KeyPair), nil), nil
}

func (s *store) RemovePreKey(_ context.Context, id uint32) error {
	delete(s.preKeys, id)
	return nil
}

func (s *store) StorePreKey(context.Context, uint32, *record.PreKey) error { return errUnsupported }

func (s *store) ContainsPreKey(_ context.Context, id uint32) (bool, error) {
	return s.preKeys[id] != nil, nil
}

func (s *store) LoadSession(_ context.Context, address *protocol.SignalAddress) (*record.Session, error) {
	structure := s.sessions[address.String()]
	if structure == nil {
		return record.NewSession(serializer.Session, serializer.State), nil
	}
	return record.NewSessionFromStructure(structure, serializer.Session, serializer.State)
}

func (s *store) StoreSession(_ context.Context, address *protocol.SignalAddress, session *record.Session) error {
	s.sessions[address.String()] = session.Structure()
	return nil
}

func (s *store) ContainsSession(_ context.Context, address *protocol.SignalAddress) (bool, error) {
	return s.sessions[address.String()] != nil, nil
}

func (s *store) DeleteSession(_ context.Context, address *protocol.SignalAddress) error {
	delete(s.sessions, address.String())
	return nil
}

func (s *store) DeleteAllSessions(context.Context) error {
	clear(s.sessions)
	return nil
}

func (s *store) GetSubDeviceSessions(context.Context, string) ([]uint32, error) {
	return nil, errUnsupported
}

func (s *store) LoadSignedPreKey(_ context.Context, id uint32) (*record.SignedPreKey, error) {
	if id != s.signed.KeyID {
		return nil, nil // libsignal takes this for "unknown"
	}
	return record.NewSignedPreKey(id, 0, ecPair(&s.signed.KeyPair), *s.signed.Signature, nil), nil
}

func (s *store) LoadSignedPreKeys(context.Context) ([]*record.SignedPreKey, error) {
	return nil, errUnsupported
}

func (s *store) StoreSignedPreKey(context.Context, uint32, *record.SignedPreKey) error {
	return errUnsupported
}

func (s *store) ContainsSignedPreKey(_ context.Context, id uint32) (bool, error) {
	return id == s.signed.KeyID, nil
}

func (s *store) RemoveSignedPreKey(context.Context, uint32) error { return errUnsupported }

func ecPair(key *keys.KeyPair) *ecc.ECKeyPair {
	return ecc.NewECKeyPair(ecc.NewDjbECPublicKey(*key.Pub), ecc.NewDjbECPrivateKey(*key.Priv))
}
