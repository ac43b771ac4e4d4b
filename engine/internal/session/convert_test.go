// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"testing"
	"time"

	"go.mau.fi/whatsmeow/proto/waCommon"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
)

func text_(text string) *waE2E.Message { return &waE2E.Message{Conversation: proto.String(text)} }

func noAlt(types.JID) types.JID { return types.EmptyJID }

func TestWhatShowsNothingIsNoEvent(t *testing.T) {
	protocol := func(kind waE2E.ProtocolMessage_Type) *waE2E.Message {
		return &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: kind.Enum()}}
	}
	for name, msg := range map[string]*waE2E.Message{
		"nothing":          nil,
		"empty":            {},
		"key distribution": {SenderKeyDistributionMessage: &waE2E.SenderKeyDistributionMessage{}, MessageContextInfo: &waE2E.MessageContextInfo{}},
		"history":          {ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_HISTORY_SYNC_NOTIFICATION.Enum(), HistorySyncNotification: &waE2E.HistorySyncNotification{}}},
		"key share":        protocol(waE2E.ProtocolMessage_APP_STATE_SYNC_KEY_SHARE),
		"timer":            protocol(waE2E.ProtocolMessage_EPHEMERAL_SETTING),
		"no type":          {ProtocolMessage: &waE2E.ProtocolMessage{}},
		"own copy of it":   {DeviceSentMessage: &waE2E.DeviceSentMessage{Message: protocol(waE2E.ProtocolMessage_PEER_DATA_OPERATION_REQUEST_MESSAGE)}},
	} {
		evt := (&events.Message{RawMessage: msg}).UnwrapRaw()
		if data := convertMessage(evt, noAlt, false); data != nil {
			t.Errorf("%s: %+v", name, data)
		}
	}
}

func TestKinds(t *testing.T) {
	quoting := &waE2E.ContextInfo{StanzaID: proto.String("Q"), Participant: proto.String("1@s.whatsapp.net"), QuotedMessage: text_("q")}
	for _, c := range []struct {
		name             string
		msg              *waE2E.Message
		media            string
		kind, text, word string
		quoted           bool
	}{
		{"text", text_("hi"), "", "text", "hi", "", false},
		{"text with a key", &waE2E.Message{Conversation: proto.String("hi"), SenderKeyDistributionMessage: &waE2E.SenderKeyDistributionMessage{}}, "", "text", "hi", "", false},
		{"reply", &waE2E.Message{ExtendedTextMessage: &waE2E.ExtendedTextMessage{Text: proto.String("re"), ContextInfo: quoting}}, "", "text", "re", "", true},
		{"own copy", &waE2E.Message{DeviceSentMessage: &waE2E.DeviceSentMessage{Message: text_("hi")}}, "", "text", "hi", "", false},
		{"disappearing", &waE2E.Message{EphemeralMessage: &waE2E.FutureProofMessage{Message: text_("hi")}}, "", "text", "hi", "", false},
		{"image", &waE2E.Message{ImageMessage: &waE2E.ImageMessage{ContextInfo: quoting}}, "", "other", "", "image", true},
		{"voice", &waE2E.Message{AudioMessage: &waE2E.AudioMessage{}}, "ptt", "other", "", "ptt", false},
		{"reaction", &waE2E.Message{ReactionMessage: &waE2E.ReactionMessage{}}, "", "other", "", "reaction", false},
		{"revoke", &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_REVOKE.Enum(), Key: &waCommon.MessageKey{}}}, "", "other", "", "revoke", false},
		{"edit", &waE2E.Message{EditedMessage: &waE2E.FutureProofMessage{Message: &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum()}}}}, "", "other", "", "edit", false},
	} {
		evt := (&events.Message{RawMessage: c.msg, Info: types.MessageInfo{MediaType: c.media}}).UnwrapRaw()
		data := convertMessage(evt, noAlt, false)
		if data == nil {
			t.Errorf("%s: nothing", c.name)
			continue
		}
		if data.Kind != c.kind || data.Text != c.text || data.Type != c.word || (data.Quoted != nil) != c.quoted {
			t.Errorf("%s: %+v", c.name, data)
		}
		if c.quoted && *data.Quoted != (quotedData{"Q", "1@s.whatsapp.net"}) {
			t.Errorf("%s: %+v", c.name, data.Quoted)
		}
	}
}

func TestAddresses(t *testing.T) {
	pn := types.NewADJID("15550002", 0, 3)
	lid := types.JID{User: "900002", Device: 3, Server: types.HiddenUserServer}
	group := types.NewJID("120363001", types.GroupServer)
	known := func(jid types.JID) types.JID {
		switch {
		case jid.User == pn.User:
			return types.JID{User: lid.User, Device: jid.Device, Server: types.HiddenUserServer}
		case jid.User == lid.User:
			return types.JID{User: pn.User, Device: jid.Device, Server: types.DefaultUserServer}
		}
		return types.EmptyJID
	}
	own := types.NewADJID("15550001", 0, 0)
	for _, c := range []struct {
		name                             string
		source                           types.MessageSource
		alt                              altFunc
		chat, chatAlt, sender, senderAlt string
	}{
		{"from a number", types.MessageSource{Chat: pn.ToNonAD(), Sender: pn, SenderAlt: lid}, noAlt, "15550002@s.whatsapp.net", "900002@lid", "15550002:3@s.whatsapp.net", "900002:3@lid"},
		{"looked up", types.MessageSource{Chat: lid.ToNonAD(), Sender: lid}, known, "900002@lid", "15550002@s.whatsapp.net", "900002:3@lid", "15550002:3@s.whatsapp.net"},
		{"unknown", types.MessageSource{Chat: lid.ToNonAD(), Sender: lid}, noAlt, "900002@lid", "", "900002:3@lid", ""},
		{"own, elsewhere", types.MessageSource{Chat: lid.ToNonAD(), Sender: own, IsFromMe: true, RecipientAlt: pn.ToNonAD()}, noAlt, "900002@lid", "15550002@s.whatsapp.net", "15550001@s.whatsapp.net", ""},
		{"group", types.MessageSource{Chat: group, Sender: lid, SenderAlt: pn, IsGroup: true}, known, "120363001@g.us", "", "900002:3@lid", "15550002:3@s.whatsapp.net"},
	} {
		data := convertMessage((&events.Message{RawMessage: text_("x"), Info: types.MessageInfo{MessageSource: c.source}}).UnwrapRaw(), c.alt, false)
		if data.Chat != c.chat || data.ChatAlt != c.chatAlt || data.Sender != c.sender || data.SenderAlt != c.senderAlt || data.Group != c.source.IsGroup {
			t.Errorf("%s: %+v", c.name, data)
		}
	}
	undecryptable := convertUndecryptable(&events.UndecryptableMessage{
		Info: types.MessageInfo{ID: "U", MessageSource: types.MessageSource{Chat: pn.ToNonAD(), Sender: pn}}, IsUnavailable: true,
	}, known)
	if undecryptable.SenderDevice != 3 || undecryptable.SenderAlt != "900002:3@lid" || !undecryptable.Unavailable {
		t.Errorf("%+v", undecryptable)
	}
}

func TestReceipts(t *testing.T) {
	for kind, want := range map[types.ReceiptType]string{
		"": "delivered", "inactive": "delivered", "read": "read", "read-self": "read", "played": "played", "sender": "sent_elsewhere", "new-kind": "other",
		"retry": "", "server-error": "", "hist_sync": "", "peer_msg": "",
	} {
		list := convertReceipt(&events.Receipt{MessageIDs: []string{"A", "B"}, Type: kind, Timestamp: time.Now()}, noAlt)
		if want == "" {
			if len(list) != 0 {
				t.Errorf("%q: %+v", kind, list[0])
			}
			continue
		}
		if len(list) != 1 || list[0].Type != want || len(list[0].MessageIDs) != 2 {
			t.Errorf("%q: %+v", kind, list)
		}
	}
}

func TestRecipients(t *testing.T) {
	for text, ok := range map[string]bool{
		"15550002@s.whatsapp.net": true, "900@lid": true, "120363-1@g.us": true, "1:2@lid": false, "1.2@s.whatsapp.net": false, "1@x@lid": false,
		"": false, "@lid": false, "1": false, "1@c.us": false, "status@broadcast": false, "1-2@lid": false, "१@lid": false,
	} {
		if _, err := parseRecipient(text); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
}
