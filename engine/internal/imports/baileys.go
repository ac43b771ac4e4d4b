// SPDX-License-Identifier: GPL-3.0-or-later

package imports

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/util/keys"
	waLog "go.mau.fi/whatsmeow/util/log"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/state"
)

// What Baileys' useMultiFileAuthState writes (lib/Utils/use-multi-file-auth-state.js of 7.0.0-rc14): creds.json, and a file `<kind>-<id>.json` for everything
// else, with `/` in the id as `__` and `:` as `-`. Bytes are {"type": "Buffer", "data": base64}, those of protobufs plain base64.

const (
	maxFile        = 16 << 20
	maxPreKeyID    = 1<<24 - 1
	primaryDevice  = 0
	curveKeyPrefix = 5
)

// Reasons why something stays behind.
const (
	whyAppState   = "whatsmeow fetches it again, with the contacts and chat settings in it, which Baileys does not keep here"
	whyIdentities = "learned again with each new session"
	whyDevices    = "asked for again when a message is sent"
	whyHistory    = "not needed"
)

// kinds of files, longest first where one begins like another.
var leftBehind = []struct{ prefix, kind, why string }{
	{"sender-key-memory-", "sender_key_memories", whyDevices},
	{"app-state-sync-version-", "app_state_versions", whyAppState},
	{"identity-key-", "identity_keys", whyIdentities},
	{"device-list-", "device_lists", whyDevices},
}

// blob is bytes in one of the ways in which they are written.
type blob []byte

func (b *blob) UnmarshalJSON(text []byte) error {
	var plain string
	if json.Unmarshal(text, &plain) == nil {
		return b.decode(plain)
	}
	var buffer struct {
		Type string
		Data json.RawMessage
	}
	if err := json.Unmarshal(text, &buffer); err != nil || buffer.Type != "Buffer" {
		return errors.New("bytes are written neither as a Buffer nor in base64")
	}
	if json.Unmarshal(buffer.Data, &plain) == nil {
		return b.decode(plain)
	}
	var numbers []uint8
	var wide []uint16
	if err := json.Unmarshal(buffer.Data, &wide); err != nil {
		return errors.New("a Buffer holds neither base64 nor a list of bytes")
	}
	for _, n := range wide {
		if n > 255 {
			return errors.New("a Buffer holds a number that is no byte")
		}
		numbers = append(numbers, uint8(n))
	}
	*b = numbers
	return nil
}

func (b *blob) decode(text string) (err error) {
	if *b, err = base64.StdEncoding.DecodeString(text); err != nil {
		return errors.New("bytes are not in base64")
	}
	return nil
}

// number is an integer, written as one or as text.
type number int64

func (n *number) UnmarshalJSON(text []byte) error {
	value, err := strconv.ParseInt(strings.Trim(string(text), `"`), 10, 64)
	if err != nil {
		return errors.New("a number is not written as one")
	}
	*n = number(value)
	return nil
}

type pair struct{ Private, Public blob }

type credentials struct {
	NoiseKey          *pair
	SignedIdentityKey *pair
	SignedPreKey      *struct {
		KeyPair   *pair
		Signature blob
		KeyID     *uint32 `json:"keyId"`
	}
	RegistrationID *uint32 `json:"registrationId"`
	AdvSecretKey   blob
	Account        *struct{ Details, AccountSignatureKey, AccountSignature, DeviceSignature blob }
	Me             *struct{ ID, LID, Name string }
	Platform       string

	NextPreKeyID            uint32 `json:"nextPreKeyId"`
	FirstUnuploadedPreKeyID uint32 `json:"firstUnuploadedPreKeyId"`

	ClientID, EncKey json.RawMessage // of the time before linked devices
}

// baileys is a directory that is being read.
type baileys struct {
	root   *os.Root
	report *Report
	store  *state.Store
	lids   map[string]string // number to LID
}

func readBaileys(ctx context.Context, options Options, work string, report *Report) (err error) {
	root, err := os.OpenRoot(options.From)
	if err != nil {
		return sourceError("%w", err)
	}
	defer root.Close()
	b := &baileys{root: root, report: report, lids: map[string]string{}}
	names, err := fs.Glob(root.FS(), "*")
	if err != nil {
		return sourceError("%w", err)
	}
	creds, err := b.credentials(options.JID)
	if err != nil {
		return sourceError("creds.json: %w", err)
	}
	b.store, err = state.Open(ctx, work, state.Options{Create: true, Log: waLog.Noop})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.store.Close()) }()
	if err := b.device(ctx, creds); err != nil {
		return err
	}
	for _, step := range []func(context.Context, []string, *credentials) error{b.preKeys, b.appStateKeys, b.lidMappings, b.tokens, b.sessions, b.senderKeys} {
		if err := step(ctx, names, creds); err != nil {
			return err
		}
	}
	b.rest(names)
	return b.store.MarkCopy(ctx)
}

// read decodes one file; missing reports whether it holds null or is not there.
func (b *baileys) read(name string, into any) (missing bool, err error) {
	file, err := b.root.Open(name)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist), err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	switch {
	case err != nil:
		return false, err
	case len(content) > maxFile:
		return false, errors.New("it is too large")
	case bytes.Equal(bytes.TrimSpace(content), []byte("null")):
		return true, nil
	}
	if err := json.Unmarshal(content, into); err != nil {
		var syntax *json.SyntaxError
		if len(bytes.TrimSpace(content)) == 0 || errors.As(err, &syntax) {
			return false, fmt.Errorf("it is not whole JSON (%w): perhaps it was being written when the program ended", err)
		}
		return false, err
	}
	return false, nil
}

func (b *baileys) credentials(wanted string) (*credentials, error) {
	var c credentials
	missing, err := b.read("creds.json", &c)
	switch {
	case missing:
		return nil, errors.New("it is not there, so this is no multi-file auth directory of Baileys")
	case err != nil:
		return nil, err
	case c.ClientID != nil && c.NoiseKey == nil:
		return nil, errors.New("it is of the time before linked devices (Baileys 3 or older), which WhatsApp no longer accepts")
	case c.Account == nil || c.Me == nil || c.Me.ID == "":
		return nil, errors.New("this session was never paired: it holds no account")
	case c.NoiseKey == nil || c.SignedIdentityKey == nil || c.SignedPreKey == nil || c.SignedPreKey.KeyPair == nil || c.SignedPreKey.KeyID == nil ||
		c.RegistrationID == nil:
		return nil, errors.New("keys are missing: noiseKey, signedIdentityKey, signedPreKey and registrationId are needed")
	}
	if !isOf(c.Me.ID, wanted) {
		return nil, fmt.Errorf("it is of %s, not of %s", c.Me.ID, wanted)
	}
	return &c, nil
}

// isOf reports whether a device's JID is the wanted one, or has the wanted number. Nothing wanted is always right.
func isOf(jid, wanted string) bool {
	user, _, _ := strings.Cut(jid, "@")
	user, _, _ = strings.Cut(user, ":")
	return wanted == "" || wanted == jid || wanted == user
}

// keyPair checks that both halves belong together.
func (p *pair) keyPair(what string) (*keys.KeyPair, error) {
	if len(p.Private) != 32 {
		return nil, fmt.Errorf("%s: the private key has %d bytes instead of 32", what, len(p.Private))
	}
	public, err := curveKey(p.Public)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	key := keys.NewKeyPairFromPrivateKey([32]byte(p.Private))
	if *key.Pub != public {
		return nil, fmt.Errorf("%s: the public key does not belong to the private key", what)
	}
	return key, nil
}

// curveKey is a public key, with or without the byte that says which curve.
func curveKey(b blob) (key [32]byte, err error) {
	if len(b) == 33 && b[0] == curveKeyPrefix {
		b = b[1:]
	}
	if len(b) != 32 {
		return key, fmt.Errorf("the public key has %d bytes instead of 32", len(b))
	}
	return [32]byte(b), nil
}

// device stores the device row, once all of it is found right.
func (b *baileys) device(ctx context.Context, c *credentials) error {
	d := b.store.Device
	if err := fillDevice(d, c); err != nil {
		return sourceError("creds.json: %w", err)
	}
	if d.LID.IsEmpty() {
		b.report.warn("creds.json has no LID: WhatsApp tells it at the first login")
	}
	if err := d.Save(ctx); err != nil {
		return err
	}
	b.report.identify(*d.ID, d.LID)
	b.report.Name, b.report.Platform = d.PushName, d.Platform
	b.report.carry("device", 1)
	return nil
}

func fillDevice(d *store.Device, c *credentials) (err error) {
	if d.NoiseKey, err = c.NoiseKey.keyPair("noiseKey"); err != nil {
		return err
	}
	if d.IdentityKey, err = c.SignedIdentityKey.keyPair("signedIdentityKey"); err != nil {
		return err
	}
	signed, err := c.SignedPreKey.KeyPair.keyPair("signedPreKey")
	if err != nil {
		return err
	}
	if d.SignedPreKey, err = signedPreKey(d.IdentityKey, signed, *c.SignedPreKey.KeyID, c.SignedPreKey.Signature); err != nil {
		return err
	}
	if len(c.AdvSecretKey) != 32 {
		return fmt.Errorf("advSecretKey has %d bytes instead of 32", len(c.AdvSecretKey))
	}
	d.RegistrationID, d.AdvSecretKey = *c.RegistrationID, c.AdvSecretKey
	d.Account = &waAdv.ADVSignedDeviceIdentity{
		Details: c.Account.Details, AccountSignatureKey: c.Account.AccountSignatureKey,
		AccountSignature: c.Account.AccountSignature, DeviceSignature: c.Account.DeviceSignature,
	}
	if err := checkAccount(d.Account, d.IdentityKey); err != nil {
		return err
	}
	jid, err := deviceJID(c.Me.ID, types.DefaultUserServer)
	if err != nil {
		return fmt.Errorf("me.id: %w", err)
	}
	d.ID = &jid
	if c.Me.LID != "" {
		if d.LID, err = deviceJID(c.Me.LID, types.HiddenUserServer); err != nil {
			return fmt.Errorf("me.lid: %w", err)
		}
		if d.LID.Device != jid.Device {
			return fmt.Errorf("me.lid: device %d, while me.id is device %d", d.LID.Device, jid.Device)
		}
	}
	if c.Me.Name != "~" { // which is what Baileys puts there before it knows
		d.PushName = c.Me.Name
	}
	d.Platform = c.Platform
	return nil
}

func signedPreKey(identity, key *keys.KeyPair, id uint32, signature blob) (*keys.PreKey, error) {
	if id > maxPreKeyID || len(signature) != 64 {
		return nil, errors.New("signedPreKey: its number or its signature is malformed")
	}
	public := ecc.NewDjbECPublicKey(*key.Pub)
	if !ecc.VerifySignature(ecc.NewDjbECPublicKey(*identity.Pub), public.Serialize(), [64]byte(signature)) {
		return nil, errors.New("signedPreKey: its signature is not by the identity key")
	}
	return &keys.PreKey{KeyPair: *key, KeyID: id, Signature: (*[64]byte)(signature)}, nil
}

// checkAccount verifies that the account's phone has signed for this device's identity, and the device for itself.
func checkAccount(account *waAdv.ADVSignedDeviceIdentity, identity *keys.KeyPair) error {
	if len(account.AccountSignatureKey) != 32 || len(account.AccountSignature) != 64 || len(account.DeviceSignature) != 64 {
		return errors.New("account: a key or signature has the wrong length")
	}
	var details waAdv.ADVDeviceIdentity
	if err := proto.Unmarshal(account.Details, &details); err != nil || len(account.Details) == 0 {
		return errors.New("account: its details are damaged")
	}
	verify := func(key [32]byte, signature []byte, prefixes [][]byte, parts ...[]byte) bool {
		return slices.ContainsFunc(prefixes, func(prefix []byte) bool {
			message := bytes.Join(append([][]byte{prefix}, parts...), nil)
			return ecc.VerifySignature(ecc.NewDjbECPublicKey(key), message, [64]byte(signature))
		})
	}
	byAccount := [][]byte{whatsmeow.AdvAccountSignaturePrefix, whatsmeow.AdvHostedAccountSignaturePrefix}
	if !verify([32]byte(account.AccountSignatureKey), account.AccountSignature, byAccount, account.Details, identity.Pub[:]) {
		return errors.New("account: the account's signature is not for this identity key")
	}
	byDevice := [][]byte{whatsmeow.AdvDeviceSignaturePrefix, whatsmeow.AdvHostedDeviceSignaturePrefix}
	if !verify(*identity.Pub, account.DeviceSignature, byDevice, account.Details, identity.Pub[:], account.AccountSignatureKey) {
		return errors.New("account: the device's signature is not by this identity key")
	}
	return nil
}

var digits = regexp.MustCompile(`^[0-9]{1,32}$`)

func deviceJID(text, server string) (types.JID, error) {
	jid, err := types.ParseJID(text)
	switch {
	case err != nil || jid.Server != server || !digits.MatchString(jid.User):
		return jid, fmt.Errorf("%q is not of the form <digits>:<device>@%s", text, server)
	case jid.Device == primaryDevice:
		return jid, fmt.Errorf("%q is a phone, not a linked device", text)
	}
	return jid, nil
}

var preKeyName = regexp.MustCompile(`^pre-key-([0-9]{1,8})\.json$`)

func (b *baileys) preKeys(ctx context.Context, names []string, c *credentials) error {
	var list []*keys.PreKey
	last := uint32(0)
	for _, name := range names {
		match := preKeyName.FindStringSubmatch(name)
		if match == nil {
			continue
		}
		id, err := strconv.ParseUint(match[1], 10, 32)
		if err != nil || id == 0 || id > maxPreKeyID {
			return sourceError("%s: no such pre-key can be", name)
		}
		var p pair
		if missing, err := b.read(name, &p); err != nil {
			return sourceError("%s: %w", name, err)
		} else if missing {
			continue // used
		}
		key, err := p.keyPair("the pre-key")
		if err != nil {
			return sourceError("%s: %w", name, err)
		}
		list = append(list, &keys.PreKey{KeyPair: *key, KeyID: uint32(id)})
		last = max(last, uint32(id))
	}
	b.report.carry("pre_keys", len(list))
	if next := c.NextPreKeyID; next > last+1 && next <= maxPreKeyID {
		// whatsmeow numbers on from the last one it has. The number of one that was used must not be given to another.
		list = append(list, keys.NewPreKey(next-1))
	}
	return b.store.PutPreKeys(ctx, list, c.FirstUnuploadedPreKeyID)
}

// named lists the files of a kind with their ids, as they were before they became names.
func named(names []string, prefix string) (list [][2]string) {
	for _, name := range names {
		if id, ok := strings.CutPrefix(name, prefix); ok && strings.HasSuffix(id, ".json") {
			list = append(list, [2]string{name, strings.ReplaceAll(strings.TrimSuffix(id, ".json"), "__", "/")})
		}
	}
	return list
}

func (b *baileys) appStateKeys(ctx context.Context, names []string, _ *credentials) error {
	for _, file := range named(names, "app-state-sync-key-") {
		var key struct {
			KeyData     blob
			Timestamp   number
			Fingerprint *struct {
				RawID         uint32 `json:"rawId"`
				CurrentIndex  uint32
				DeviceIndexes []uint32
			}
		}
		missing, err := b.read(file[0], &key)
		if missing {
			continue
		}
		id, badID := base64.StdEncoding.DecodeString(file[1])
		if err = errors.Join(err, badID); err != nil {
			return sourceError("%s: %w", file[0], err)
		}
		if len(key.KeyData) == 0 || len(id) == 0 {
			return sourceError("%s: it holds no key", file[0])
		}
		print := &waE2E.AppStateSyncKeyFingerprint{}
		if f := key.Fingerprint; f != nil {
			print.RawID, print.CurrentIndex, print.DeviceIndexes = &f.RawID, &f.CurrentIndex, f.DeviceIndexes
		}
		encoded, err := proto.Marshal(print)
		if err != nil {
			return err
		}
		err = b.store.Device.AppStateKeys.PutAppStateSyncKey(ctx, id, store.AppStateSyncKey{Data: key.KeyData, Fingerprint: encoded, Timestamp: int64(key.Timestamp)})
		if err != nil {
			return err
		}
		b.report.carry("app_state_keys", 1)
	}
	return nil
}

func (b *baileys) lidMappings(ctx context.Context, names []string, c *credentials) error {
	var list []store.LIDMapping
	owner := map[string]string{}
	add := func(pn, lid string) bool {
		if other, taken := owner[lid]; taken && other != pn {
			b.report.warn("LID %s belongs to two numbers in lid-mapping-*.json: the second is left out", lid)
			return false
		}
		owner[lid], b.lids[pn] = pn, lid
		list = append(list, store.LIDMapping{LID: types.NewJID(lid, types.HiddenUserServer), PN: types.NewJID(pn, types.DefaultUserServer)})
		return true
	}
	for _, file := range named(names, "lid-mapping-") {
		pn := file[1]
		if strings.HasSuffix(pn, "_reverse") {
			continue // the same, the other way round
		}
		var lid string
		missing, err := b.read(file[0], &lid)
		switch {
		case missing:
			continue
		case err != nil:
			return sourceError("%s: %w", file[0], err)
		case !digits.MatchString(pn) || !digits.MatchString(lid):
			b.report.warn("%s does not map a number to a LID: left out", file[0])
			continue
		}
		if add(pn, lid) {
			b.report.carry("lid_mappings", 1)
		}
	}
	if d := b.store.Device; !d.LID.IsEmpty() && b.lids[d.ID.User] == "" {
		add(d.ID.User, d.LID.User)
	}
	if len(list) == 0 {
		return nil
	}
	return b.store.Device.LIDs.PutManyLIDMappings(ctx, list)
}

func (b *baileys) tokens(ctx context.Context, names []string, _ *credentials) error {
	for _, file := range named(names, "tctoken-") {
		if !strings.Contains(file[1], "@") {
			continue // an index of the others
		}
		var token struct {
			Token           blob
			Timestamp       number
			SenderTimestamp number
		}
		missing, err := b.read(file[0], &token)
		if missing || err == nil && len(token.Token) == 0 {
			continue
		}
		jid, badJID := types.ParseJID(file[1])
		if err = errors.Join(err, badJID); err != nil {
			return sourceError("%s: %w", file[0], err)
		}
		if lid := b.lids[jid.User]; lid != "" && jid.Server == types.DefaultUserServer {
			jid = types.NewJID(lid, types.HiddenUserServer)
		}
		entry := store.PrivacyToken{User: jid, Token: token.Token, Timestamp: time.Unix(int64(token.Timestamp), 0)}
		if token.SenderTimestamp != 0 {
			entry.SenderTimestamp = time.Unix(int64(token.SenderTimestamp), 0)
		}
		if err := b.store.Device.PrivacyTokens.PutPrivacyTokens(ctx, entry); err != nil {
			return err
		}
		b.report.carry("privacy_tokens", 1)
	}
	return nil
}

// rest counts what stays behind.
func (b *baileys) rest(names []string) {
	counts := make([]int, len(leftBehind))
	var strange []string
	for _, name := range names {
		i := slices.IndexFunc(leftBehind, func(l struct{ prefix, kind, why string }) bool { return strings.HasPrefix(name, l.prefix) })
		switch {
		case i >= 0:
			counts[i]++
		case name == "creds.json", preKeyName.MatchString(name), strings.HasPrefix(name, "app-state-sync-key-"), strings.HasPrefix(name, "lid-mapping-"),
			strings.HasPrefix(name, "tctoken-"), strings.HasPrefix(name, "session-"), strings.HasPrefix(name, "sender-key-"):
		default:
			strange = append(strange, filepath.Base(name))
		}
	}
	for i, left := range leftBehind {
		b.report.leave(left.kind, counts[i], left.why)
	}
	if len(strange) > 0 {
		b.report.warn("%d files are not Baileys' and are left out, such as %q", len(strange), strange[0])
	}
}
