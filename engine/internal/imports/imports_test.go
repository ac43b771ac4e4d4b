// SPDX-License-Identifier: GPL-3.0-or-later

package imports

import (
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	_ "github.com/mattn/go-sqlite3"
	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/util/keys"
	waLog "go.mau.fi/whatsmeow/util/log"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/state"
)

type object = map[string]any

func buffer(b []byte) object {
	return object{"type": "Buffer", "data": base64.StdEncoding.EncodeToString(b)}
}

func jsonPair(k *keys.KeyPair) object {
	return object{"private": buffer(k.Priv[:]), "public": buffer(k.Pub[:])}
}

func sign(by *keys.KeyPair, parts ...[]byte) []byte {
	signature := ecc.CalculateSignature(ecc.NewDjbECPrivateKey(*by.Priv), slices.Concat(parts...))
	return signature[:]
}

// identityOf is the account part of a linked device.
func identityOf(own *keys.KeyPair) *waAdv.ADVSignedDeviceIdentity {
	phone := keys.NewKeyPair()
	details, _ := proto.Marshal(&waAdv.ADVDeviceIdentity{KeyIndex: proto.Uint32(1), Timestamp: proto.Uint64(1700000000)})
	account := &waAdv.ADVSignedDeviceIdentity{Details: details, AccountSignatureKey: phone.Pub[:]}
	account.AccountSignature = sign(phone, whatsmeow.AdvAccountSignaturePrefix, details, own.Pub[:])
	account.DeviceSignature = sign(own, whatsmeow.AdvDeviceSignaturePrefix, details, own.Pub[:], phone.Pub[:])
	return account
}

// credsOf is a creds.json as Baileys 7 writes it.
func credsOf(own *keys.KeyPair) object {
	signed, account := own.CreateSignedPreKey(1), identityOf(own)
	text := base64.StdEncoding.EncodeToString
	return object{
		"noiseKey": jsonPair(keys.NewKeyPair()), "signedIdentityKey": jsonPair(own),
		"signedPreKey":   object{"keyPair": jsonPair(&signed.KeyPair), "signature": buffer(signed.Signature[:]), "keyId": 1},
		"registrationId": 98, "advSecretKey": text(make([]byte, 32)), "nextPreKeyId": 31, "firstUnuploadedPreKeyId": 21, "registered": false,
		"account": object{
			"details": text(account.Details), "accountSignatureKey": text(account.AccountSignatureKey),
			"accountSignature": text(account.AccountSignature), "deviceSignature": text(account.DeviceSignature),
		},
		"me": object{"id": "15550001:3@s.whatsapp.net", "lid": "900001:3@lid", "name": "Ana"}, "platform": "android",
	}
}

// baileysDirectory writes a directory and returns it with its credentials, to be spoilt.
func baileysDirectory(t *testing.T) (dir string, creds object) {
	t.Helper()
	dir = t.TempDir()
	creds = credsOf(keys.NewKeyPair())
	put(t, dir, "creds.json", creds)
	for id := range 30 {
		if id != 29 { // the last one has been used
			put(t, dir, fmt.Sprintf("pre-key-%d.json", id+1), jsonPair(keys.NewKeyPair()))
		}
	}
	put(t, dir, "app-state-sync-key-AAAAAA__+.json", object{
		"keyData": base64.StdEncoding.EncodeToString([]byte("key data")), "timestamp": "1700000000000",
		"fingerprint": object{"rawId": 7, "currentIndex": 1, "deviceIndexes": []int{0, 1}},
	})
	put(t, dir, "lid-mapping-15550002.json", "900002")
	put(t, dir, "lid-mapping-900002_reverse.json", "15550002")
	put(t, dir, "tctoken-900002@lid.json", object{"token": buffer([]byte("token")), "timestamp": "1700000000", "senderTimestamp": 1700000001})
	put(t, dir, "tctoken-15550003@s.whatsapp.net.json", object{"token": object{"type": "Buffer", "data": []int{1, 2, 255}}, "timestamp": "1700000000"})
	put(t, dir, "tctoken-____index.json", object{"token": buffer([]byte("[]"))})
	put(t, dir, "session-900002_1.0.json", object{"_sessions": object{}})
	put(t, dir, "sender-key-120363@g.us--900002_1--0.json", buffer([]byte("[]")))
	put(t, dir, "sender-key-memory-120363@g.us.json", object{})
	put(t, dir, "app-state-sync-version-regular.json", object{"version": 1})
	put(t, dir, "notes.txt", "mine")
	return dir, creds
}

func put(t *testing.T, dir, name string, value any) {
	t.Helper()
	content, err := json.Marshal(value)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name), content, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fingerprint is everything about a directory that an import must leave alone.
func fingerprint(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		info, err := entry.Info()
		content, err2 := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprint(entry.Name(), info.ModTime(), info.Mode(), content))
	}
	return list
}

func openState(t *testing.T, dir string) *state.Store {
	t.Helper()
	s, err := state.Open(t.Context(), dir, state.Options{Log: waLog.Noop})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestBaileys(t *testing.T) {
	ctx := t.Context()
	from, creds := baileysDirectory(t)
	to := filepath.Join(t.TempDir(), "new", "1")
	before := fingerprint(t, from)
	dry, err := Run(ctx, Options{Format: FormatBaileys, From: from, To: to, DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(to); err == nil {
		t.Error("a dry run makes the directory")
	}
	report, err := Run(ctx, Options{Format: FormatBaileys, From: from, To: to, JID: "15550001"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(before, fingerprint(t, from)) {
		t.Error("the source was changed")
	}
	want := map[string]int{"device": 1, "pre_keys": 29, "app_state_keys": 1, "lid_mappings": 1, "privacy_tokens": 2}
	if !maps.Equal(report.Carried, want) || !maps.Equal(dry.Carried, want) || !dry.DryRun || report.Bytes == 0 {
		t.Errorf("%+v", report)
	}
	left := map[string]int{}
	for _, l := range report.NotCarried {
		left[l.Kind] = l.Count
	}
	if !maps.Equal(left, map[string]int{"sender_keys": 1, "sender_key_memories": 1, "app_state_versions": 1}) || len(report.Warnings) != 1 {
		t.Errorf("%v %v", left, report.Warnings)
	}
	d := openState(t, to).Device
	if d.ID.String() != "15550001:3@s.whatsapp.net" || d.LID.String() != "900001:3@lid" || d.PushName != "Ana" || d.RegistrationID != 98 || d.Platform != "android" ||
		report.JID != d.ID.String() || report.LID != d.LID.String() {
		t.Errorf("%+v", d)
	}
	if got := buffer(d.IdentityKey.Pub[:]); got["data"] != creds["signedIdentityKey"].(object)["public"].(object)["data"] {
		t.Error("another identity")
	}
	if uploaded, err := d.PreKeys.UploadedPreKeyCount(ctx); err != nil || uploaded != 21 { // 20, and the one that a copy numbers on from
		t.Errorf("%d uploaded pre-keys, %v", uploaded, err)
	}
	if key, err := d.PreKeys.GenOnePreKey(ctx); err != nil || key.KeyID <= 30 {
		t.Errorf("the next pre-key is %+v, %v", key, err)
	}
	id, _ := base64.StdEncoding.DecodeString("AAAAAA/+")
	if key, err := d.AppStateKeys.GetAppStateSyncKey(ctx, id); err != nil || key == nil || string(key.Data) != "key data" || key.Timestamp != 1700000000000 || len(key.Fingerprint) == 0 {
		t.Errorf("%v %v", key, err)
	}
	pn, lid := types.NewJID("15550002", types.DefaultUserServer), types.NewJID("900002", types.HiddenUserServer)
	if got, err := d.LIDs.GetLIDForPN(ctx, pn); err != nil || got != lid {
		t.Errorf("%v %v", got, err)
	}
	if got, err := d.LIDs.GetLIDForPN(ctx, d.ID.ToNonAD()); err != nil || got != d.LID.ToNonAD() {
		t.Errorf("our own LID: %v %v", got, err)
	}
	if token, err := d.PrivacyTokens.GetPrivacyToken(ctx, lid); err != nil || token == nil || string(token.Token) != "token" || token.SenderTimestamp.Unix() != 1700000001 {
		t.Errorf("%v %v", token, err)
	}
}

// TestBaileysIsRefused spoils one thing at a time. The error names it, and nothing is left at the target.
func TestBaileysIsRefused(t *testing.T) {
	other := keys.NewKeyPair()
	at := func(c object, path ...string) object {
		for _, key := range path {
			c = c[key].(object)
		}
		return c
	}
	for want, spoil := range map[string]func(c object){
		"never paired":                       func(c object) { delete(c, "account") },
		"holds no account":                   func(c object) { delete(c, "me") },
		"keys are missing":                   func(c object) { delete(c, "noiseKey") },
		"before linked devices":              func(c object) { delete(c, "noiseKey"); c["clientID"] = "x" },
		"noiseKey: the private key has 3":    func(c object) { at(c, "noiseKey")["private"] = buffer([]byte{1, 2, 3}) },
		"noiseKey: the public key does not":  func(c object) { at(c, "noiseKey")["public"] = buffer(other.Pub[:]) },
		"signedIdentityKey: the public key":  func(c object) { at(c, "signedIdentityKey")["public"] = buffer(other.Pub[:]) },
		"signedPreKey: its signature is not": func(c object) { at(c, "signedPreKey")["keyPair"] = jsonPair(other) },
		"signedPreKey: its number":           func(c object) { at(c, "signedPreKey")["signature"] = buffer([]byte{1}) },
		"account's signature is not":         func(c object) { c["signedIdentityKey"] = jsonPair(other); resign(c, other) },
		"the device's signature is not": func(c object) {
			at(c, "account")["deviceSignature"] = base64.StdEncoding.EncodeToString(make([]byte, 64))
		},
		"wrong length":                         func(c object) { at(c, "account")["accountSignature"] = "AAAA" },
		"details are damaged":                  func(c object) { at(c, "account")["details"] = "/////w==" },
		"advSecretKey has 3 bytes":             func(c object) { c["advSecretKey"] = "AAAA" },
		"is a phone, not a linked device":      func(c object) { at(c, "me")["id"] = "15550001@s.whatsapp.net" },
		"is not of the form":                   func(c object) { at(c, "me")["id"] = "15550001:3@g.us" },
		"device 4, while me.id is device 3":    func(c object) { at(c, "me")["lid"] = "900001:4@lid" },
		"not of 15550009":                      func(c object) { at(c, "me")["id"] = "15550007:3@s.whatsapp.net" },
		"neither as a Buffer nor in base64":    func(c object) { at(c, "noiseKey")["private"] = 5 },
		"neither base64 nor a list":            func(c object) { at(c, "noiseKey")["private"] = object{"type": "Buffer", "data": true} },
		"a Buffer holds a number that is no b": func(c object) { at(c, "noiseKey")["private"] = object{"type": "Buffer", "data": []int{256}} },
	} {
		t.Run(want, func(t *testing.T) {
			from, creds := baileysDirectory(t)
			spoil(creds)
			put(t, from, "creds.json", creds)
			jid := ""
			if strings.Contains(want, "15550009") {
				jid = "15550009"
			}
			refused(t, Options{Format: FormatBaileys, From: from, JID: jid}, want)
		})
	}
	for want, spoil := range map[string]func(t *testing.T, dir string){
		"no multi-file auth directory":         func(t *testing.T, dir string) { _ = os.Remove(filepath.Join(dir, "creds.json")) },
		"creds.json: it is not whole JSON":     func(t *testing.T, dir string) { cut(t, filepath.Join(dir, "creds.json")) },
		"pre-key-7.json: it is not whole JSON": func(t *testing.T, dir string) { cut(t, filepath.Join(dir, "pre-key-7.json")) },
		"pre-key-8.json: the pre-key: the public": func(t *testing.T, dir string) {
			put(t, dir, "pre-key-8.json", object{"private": buffer(other.Priv[:]), "public": buffer(make([]byte, 32))})
		},
		"pre-key-0.json: no such pre-key":               func(t *testing.T, dir string) { put(t, dir, "pre-key-0.json", jsonPair(other)) },
		"app-state-sync-key-!.json: illegal base64":     func(t *testing.T, dir string) { put(t, dir, "app-state-sync-key-!.json", object{"keyData": "AAAA"}) },
		"app-state-sync-key-AAAA.json: it holds no key": func(t *testing.T, dir string) { put(t, dir, "app-state-sync-key-AAAA.json", object{}) },
		"lid-mapping-15550005.json":                     func(t *testing.T, dir string) { put(t, dir, "lid-mapping-15550005.json", 5) },
		"tctoken-900002@lid.json: a number is not written a": func(t *testing.T, dir string) {
			put(t, dir, "tctoken-900002@lid.json", object{"token": "AAAA", "timestamp": true})
		},
	} {
		t.Run(want, func(t *testing.T) {
			from, _ := baileysDirectory(t)
			spoil(t, from)
			refused(t, Options{Format: FormatBaileys, From: from}, want)
		})
	}
	refused(t, Options{Format: FormatBaileys, From: filepath.Join(t.TempDir(), "nowhere")}, "no such file")
}

// resign keeps the signed pre-key right for another identity, so that only the account is wrong.
func resign(c object, own *keys.KeyPair) {
	signed := own.CreateSignedPreKey(1)
	c["signedPreKey"] = object{"keyPair": jsonPair(&signed.KeyPair), "signature": buffer(signed.Signature[:]), "keyId": 1}
}

func cut(t *testing.T, path string) {
	t.Helper()
	if err := os.Truncate(path, 50); err != nil {
		t.Fatal(err)
	}
}

func refused(t *testing.T, options Options, want string) {
	t.Helper()
	for _, dry := range []bool{true, false} {
		parent := t.TempDir()
		options.To, options.DryRun = filepath.Join(parent, "target"), dry
		_, err := Run(context.Background(), options)
		if !errors.Is(err, ErrSource) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v", err)
		}
		if entries, err := os.ReadDir(parent); err != nil || len(entries) > 0 {
			t.Errorf("left: %v %v", entries, err)
		}
	}
}

func TestTakenTargets(t *testing.T) {
	from, _ := baileysDirectory(t)
	for _, name := range []string{"state.db", "state.db-wal"} {
		to := t.TempDir()
		put(t, to, name, "mine")
		before := fingerprint(t, to)
		for _, dry := range []bool{true, false} {
			if _, err := Run(t.Context(), Options{Format: FormatBaileys, From: from, To: to, DryRun: dry}); !errors.Is(err, ErrTarget) {
				t.Errorf("%s: %v", name, err)
			}
		}
		_ = os.Remove(filepath.Join(to, "lock"))
		if !slices.Equal(before, fingerprint(t, to)) {
			t.Errorf("%s: the target was changed", name)
		}
	}
	to := t.TempDir()
	s, err := state.Open(t.Context(), to, state.Options{Create: true, Log: waLog.Noop})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := Run(t.Context(), Options{Format: FormatBaileys, From: from, To: to}); !errors.Is(err, state.ErrLocked) || !errors.Is(err, ErrTarget) {
		t.Errorf("an open session: %v", err)
	}
}

// whatsmeowDatabase is another program's store, still open, with what it wrote last in its journal.
func whatsmeowDatabase(t *testing.T, numbers ...string) (path string, raw *sql.DB) {
	t.Helper()
	ctx := t.Context()
	path = filepath.Join(t.TempDir(), "theirs.db")
	raw, err := sql.Open("sqlite3", "file:"+path+"?_foreign_keys=on&_journal_mode=WAL")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	container := sqlstore.NewWithDB(raw, "sqlite3", waLog.Noop)
	if err := container.Upgrade(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Exec("CREATE TABLE contacts_of_the_program (name TEXT)"); err != nil {
		t.Fatal(err)
	}
	for i, number := range numbers {
		d := container.NewDevice()
		jid := types.NewADJID(number, 0, uint8(i+1))
		d.ID, d.LID = &jid, types.JID{User: "9" + number, Device: uint16(i + 1), Server: types.HiddenUserServer}
		d.Account, d.PushName = identityOf(d.IdentityKey), "Ana"
		err := d.Save(ctx)
		if err == nil {
			_, err = d.PreKeys.GetOrGenPreKeys(ctx, 10)
		}
		err = errors.Join(err, d.Sessions.PutSession(ctx, "900002_1:0", []byte("session of "+number)),
			d.SenderKeys.PutSenderKey(ctx, "120363@g.us", "900002_1:0", []byte("key")),
			d.Contacts.PutContactName(ctx, types.NewJID("900002", types.HiddenUserServer), "Bob", "Bob"))
		if err != nil {
			t.Fatal(err)
		}
	}
	return path, raw
}

func TestWhatsmeow(t *testing.T) {
	from, raw := whatsmeowDatabase(t, "15550001", "15550002")
	if wal, err := os.Stat(from + "-wal"); err != nil || wal.Size() == 0 {
		t.Fatal("nothing is in the journal: it is not tested")
	}
	before := fingerprint(t, filepath.Dir(from))
	to := filepath.Join(t.TempDir(), "1")
	report, err := Run(t.Context(), Options{Format: FormatWhatsmeow, From: from, To: to, JID: "15550002"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(before, fingerprint(t, filepath.Dir(from))) {
		t.Error("the source was changed")
	}
	want := map[string]int{"device": 1, "pre_keys": 10, "sessions": 1, "sender_keys": 1, "contacts": 1}
	if !maps.Equal(report.Carried, want) || report.JID != "15550002:2@s.whatsapp.net" || report.LID != "915550002:2@lid" || report.Name != "Ana" {
		t.Errorf("%+v", report)
	}
	if len(report.NotCarried) != 2 || len(report.Warnings) != 1 {
		t.Errorf("%v %v", report.NotCarried, report.Warnings)
	}
	s := openState(t, to)
	if err := s.Device.EventBuffer.DoDecryptionTxn(t.Context(), func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
	if s.Device.ID.User != "15550002" {
		t.Error(s.Device.ID)
	}
	if has, err := s.Device.Sessions.HasSession(t.Context(), "900002_1:0"); has || err != nil {
		t.Errorf("nothing says how old the source is, and its sessions are used for sending: %v", err)
	}
	// Without its journal, and alone, it needs no warning and no choice.
	if _, err := raw.Exec("DELETE FROM whatsmeow_device WHERE jid LIKE '15550001%'"); err != nil {
		t.Fatal(err)
	}
	_ = raw.Close()
	report, err = Run(t.Context(), Options{Format: FormatWhatsmeow, From: from, To: to + "b", DryRun: true})
	if err != nil || len(report.Warnings) > 0 || report.JID != "15550002:2@s.whatsapp.net" {
		t.Errorf("%+v %v", report, err)
	}
}

func TestWhatsmeowIsRefused(t *testing.T) {
	from, raw := whatsmeowDatabase(t, "15550001", "15550002")
	refused(t, Options{Format: FormatWhatsmeow, From: from}, "choose one with --jid: 15550001:1@s.whatsapp.net, 15550002:2@s.whatsapp.net")
	refused(t, Options{Format: FormatWhatsmeow, From: from, JID: "15550003"}, "no device of 15550003")
	if _, err := raw.Exec("UPDATE whatsmeow_device SET identity_key=randomblob(32)"); err != nil {
		t.Fatal(err)
	}
	refused(t, Options{Format: FormatWhatsmeow, From: from, JID: "15550001"}, "account's signature is not")
	if _, err := raw.Exec("DELETE FROM whatsmeow_device"); err != nil {
		t.Fatal(err)
	}
	refused(t, Options{Format: FormatWhatsmeow, From: from}, "no paired device")
	if _, err := raw.Exec("UPDATE whatsmeow_version SET version=9999, compat=9999"); err != nil {
		t.Fatal(err)
	}
	refused(t, Options{Format: FormatWhatsmeow, From: from}, "schema")
	empty := filepath.Join(t.TempDir(), "x.db")
	put(t, filepath.Dir(empty), "x.db", "not a database, but long enough for a header and more than that, by far, by very far indeed: a hundred bytes")
	refused(t, Options{Format: FormatWhatsmeow, From: empty}, "not a database")
	refused(t, Options{Format: FormatWhatsmeow, From: filepath.Dir(empty)}, "not a regular file")
	refused(t, Options{Format: FormatWhatsmeow, From: empty + "x"}, "no such file")
}
