// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"strings"
	"time"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// messageData is the data of a "message" event.
type messageData struct {
	Chat      string      `json:"chat"`
	ChatAlt   string      `json:"chat_alt,omitempty"`
	Sender    string      `json:"sender"`
	SenderAlt string      `json:"sender_alt,omitempty"`
	FromMe    bool        `json:"from_me"`
	Group     bool        `json:"group"`
	MessageID string      `json:"message_id"`
	Timestamp string      `json:"timestamp"`
	PushName  string      `json:"push_name"`
	Kind      string      `json:"kind"`
	Text      string      `json:"text,omitempty"`
	Type      string      `json:"type,omitempty"`
	Quoted    *quotedData `json:"quoted,omitempty"`
	Offline   bool        `json:"offline"`
	Truncated bool        `json:"truncated,omitempty"`
}

type quotedData struct {
	MessageID string `json:"message_id"`
	Sender    string `json:"sender"`
}

// receiptData is the data of a "receipt" event.
type receiptData struct {
	Chat       string   `json:"chat"`
	ChatAlt    string   `json:"chat_alt,omitempty"`
	Sender     string   `json:"sender"`
	SenderAlt  string   `json:"sender_alt,omitempty"`
	FromMe     bool     `json:"from_me"`
	MessageIDs []string `json:"message_ids"`
	Type       string   `json:"type"`
	Timestamp  string   `json:"timestamp"`
}

// undecryptableData is the data of an "undecryptable" event.
type undecryptableData struct {
	Chat         string `json:"chat"`
	Sender       string `json:"sender"`
	SenderAlt    string `json:"sender_alt,omitempty"`
	FromMe       bool   `json:"from_me"`
	MessageID    string `json:"message_id"`
	Timestamp    string `json:"timestamp"`
	Unavailable  bool   `json:"unavailable"`
	SenderDevice int    `json:"sender_device"`
}

// altFunc finds the other address of a user; empty when it is not known.
type altFunc func(types.JID) types.JID

func rfc3339(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// alternatives returns the other addresses of chat and sender: those the stanza carried, else those the store knows.
func alternatives(source *types.MessageSource, alt altFunc) (chat, sender types.JID) {
	sender = source.SenderAlt
	if sender.IsEmpty() {
		sender = alt(source.Sender)
	}
	switch {
	case source.IsGroup || source.Chat.Server == types.NewsletterServer:
	case !source.RecipientAlt.IsEmpty():
		chat = source.RecipientAlt
	case !sender.IsEmpty() && source.Chat == source.Sender.ToNonAD():
		chat = sender
	default:
		chat = alt(source.Chat)
	}
	return chat.ToNonAD(), sender
}

// convertMessage builds the event for a message; nil when it shows nothing to a person.
func convertMessage(evt *events.Message, alt altFunc, offline bool) *messageData {
	content := visibleContent(evt.Message)
	if content == nil {
		return nil
	}
	chatAlt, senderAlt := alternatives(&evt.Info.MessageSource, alt)
	data := &messageData{
		Chat: evt.Info.Chat.ToNonAD().String(), ChatAlt: chatAlt.String(), Sender: evt.Info.Sender.String(), SenderAlt: senderAlt.String(),
		FromMe: evt.Info.IsFromMe, Group: evt.Info.IsGroup, MessageID: evt.Info.ID, Timestamp: rfc3339(evt.Info.Timestamp),
		PushName: evt.Info.PushName, Offline: offline, Quoted: quotedBy(evt.Message, content),
	}
	data.Kind, data.Text, data.Type = classify(evt, content)
	return data
}

// classify returns the kind with its text or type.
func classify(evt *events.Message, content protoreflect.FieldDescriptor) (kind, text, word string) {
	switch content.Name() {
	case "conversation":
		return "text", evt.Message.GetConversation(), ""
	case "extendedTextMessage":
		return "text", evt.Message.GetExtendedTextMessage().GetText(), ""
	case "protocolMessage":
		if evt.Message.GetProtocolMessage().GetType() == waE2E.ProtocolMessage_REVOKE {
			return "other", "", "revoke"
		}
		return "other", "", "edit"
	}
	if evt.Info.MediaType != "" {
		return "other", "", evt.Info.MediaType
	}
	return "other", "", strings.TrimSuffix(string(content.Name()), "Message")
}

// visibleContent returns the field of msg that a person would see, or nil for key distribution, history notifications and other messages between devices.
func visibleContent(msg *waE2E.Message) (content protoreflect.FieldDescriptor) {
	if msg == nil {
		return nil
	}
	msg.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		switch field.Name() {
		case "senderKeyDistributionMessage", "fastRatchetKeySenderKeyDistributionMessage", "messageContextInfo":
			return true
		case "protocolMessage":
			if !visibleProtocol(msg.GetProtocolMessage()) {
				return true
			}
		}
		content = field
		return false
	})
	return content
}

// visibleProtocol tells the protocol messages that change what a person sees from those between devices.
func visibleProtocol(msg *waE2E.ProtocolMessage) bool {
	return msg.GetType() == waE2E.ProtocolMessage_REVOKE && msg.GetKey() != nil || msg.GetType() == waE2E.ProtocolMessage_MESSAGE_EDIT
}

// quotedBy finds the message that this one replies to, whatever its kind: they all carry it in a field of the same name.
func quotedBy(msg *waE2E.Message, content protoreflect.FieldDescriptor) *quotedData {
	if content.Kind() != protoreflect.MessageKind || content.IsList() || content.IsMap() {
		return nil
	}
	inner := msg.ProtoReflect().Get(content).Message()
	field := inner.Descriptor().Fields().ByName("contextInfo")
	if field == nil || !inner.Has(field) {
		return nil
	}
	info, ok := inner.Get(field).Message().Interface().(*waE2E.ContextInfo)
	if !ok || info.GetStanzaID() == "" {
		return nil
	}
	return &quotedData{MessageID: info.GetStanzaID(), Sender: info.GetParticipant()}
}

// receiptTypes are WhatsApp's receipt types as the daemon knows them.
var receiptTypes = map[types.ReceiptType]string{
	types.ReceiptTypeDelivered:  "delivered",
	types.ReceiptTypeInactive:   "delivered",
	types.ReceiptTypeRead:       "read",
	types.ReceiptTypeReadSelf:   "read",
	types.ReceiptTypePlayed:     "played",
	types.ReceiptTypePlayedSelf: "played",
	types.ReceiptTypeSender:     "sent_elsewhere",
}

// technicalReceipts are between devices: whatsmeow deals with them.
var technicalReceipts = map[types.ReceiptType]bool{
	types.ReceiptTypeRetry: true, types.ReceiptTypeServerError: true, types.ReceiptTypePeerMsg: true, types.ReceiptTypeHistorySync: true,
	"enc_rekey_retry": true,
}

// receiptChunk bounds the message ids in one event, so that any receipt fits in a frame.
const receiptChunk = 2000

// convertReceipt builds the events for a receipt; none when it is between devices.
func convertReceipt(evt *events.Receipt, alt altFunc) []*receiptData {
	if technicalReceipts[evt.Type] {
		return nil
	}
	kind, known := receiptTypes[evt.Type]
	if !known {
		kind = "other"
	}
	chatAlt, senderAlt := alternatives(&evt.MessageSource, alt)
	var list []*receiptData
	for ids := evt.MessageIDs; len(ids) > 0; {
		chunk := ids[:min(len(ids), receiptChunk)]
		ids = ids[len(chunk):]
		list = append(list, &receiptData{
			Chat: evt.Chat.ToNonAD().String(), ChatAlt: chatAlt.String(), Sender: evt.Sender.String(), SenderAlt: senderAlt.String(),
			FromMe: evt.IsFromMe, MessageIDs: chunk, Type: kind, Timestamp: rfc3339(evt.Timestamp),
		})
	}
	return list
}

func convertUndecryptable(evt *events.UndecryptableMessage, alt altFunc) *undecryptableData {
	_, senderAlt := alternatives(&evt.Info.MessageSource, alt)
	return &undecryptableData{
		Chat: evt.Info.Chat.ToNonAD().String(), Sender: evt.Info.Sender.String(), SenderAlt: senderAlt.String(), FromMe: evt.Info.IsFromMe,
		MessageID: evt.Info.ID, Timestamp: rfc3339(evt.Info.Timestamp), Unavailable: evt.IsUnavailable, SenderDevice: int(evt.Info.Sender.Device),
	}
}

// shorten makes a message fit in a frame: what a sender writes has no bound of its own. Called only when it did not fit.
func (m *messageData) shorten() {
	const textBytes, otherBytes = 128 << 10, 1 << 10 // JSON may need six bytes for one
	m.Text, m.PushName = cut(m.Text, textBytes), cut(m.PushName, otherBytes)
	m.Type = cut(m.Type, otherBytes)
	if m.Quoted != nil {
		m.Quoted = &quotedData{MessageID: cut(m.Quoted.MessageID, otherBytes), Sender: cut(m.Quoted.Sender, otherBytes)}
	}
	m.Truncated = true
}

func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "")
}
