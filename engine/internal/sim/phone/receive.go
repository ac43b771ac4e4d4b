package phone

import (
	"errors"
	"strconv"
	"time"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/sim/server"
)

const (
	kindText  = "text"
	kindOther = "other"

	// maxRetries is how often a phone asks for a message that it cannot decrypt.
	maxRetries = 5
	// keysFrom is the request that carries new keys: the first may fail for a reason that passes.
	keysFrom = 2

	// nackOldCounter is official clients' word for a message whose key was used before (whatsmeow receipt.go,
	// NackSignalErrorOldCounter). They do not ask for it again.
	nackOldCounter = 496
)

// sender is the device that a message came from.
type sender struct {
	account *server.Account
	device  uint16
}

// receiveMessage decrypts a message, shows it and sends the delivery receipt.
func (p *Phone) receiveMessage(stanza *server.Node) {
	wire := originOf(stanza).sender()
	account := p.srv.Account(wire)
	if account == nil {
		return
	}
	// The device may have been unlinked since it sent this; its last messages count all the same.
	from := sender{account, wire.Device}
	peer := server.AttrString(stanza, "category") == "peer"
	if !peer {
		p.countStanza(account)
	}
	encs := stanza.GetChildrenByTag("enc")
	for i := range encs {
		message, err := p.open(stanza, from, &encs[i])
		if err == nil {
			err = p.learn(from, message.GetSenderKeyDistributionMessage())
		}
		if err != nil && i < len(encs)-1 {
			// What comes before the last part of a group message only carries a key, which may be known already.
			p.log.Info("sender key not decrypted", "action", "sender_key_lost", "error", err)
			continue
		}
		if err != nil {
			p.undecryptable(stanza, &encs[i], from, err)
			return
		}
		if !peer {
			p.record(stanza, from, message)
		}
	}
	p.acknowledge(stanza, account, peer)
}

func (p *Phone) countStanza(account *server.Account) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.view.count(account.Number).stanzas++
}

// open decrypts one ciphertext.
func (p *Phone) open(stanza *server.Node, from sender, enc *server.Node) (*waE2E.Message, error) {
	ciphertext, _ := enc.Content.([]byte)
	kind, address := server.AttrString(enc, "type"), signalAddress(from.account, from.device)
	var padded []byte
	var err error
	if kind == encSenderKey {
		padded, err = p.vault.decryptGroup(originOf(stanza).chat.String(), address, ciphertext)
	} else {
		padded, err = p.vault.decrypt(address, kind, ciphertext)
	}
	if err != nil {
		return nil, err
	}
	plaintext, err := unpad(padded)
	if err != nil {
		return nil, err
	}
	var message waE2E.Message
	if err := proto.Unmarshal(plaintext, &message); err != nil {
		return nil, err
	}
	return &message, nil
}

// record shows the message if a person would see anything of it.
func (p *Phone) record(stanza *server.Node, from sender, message *waE2E.Message) {
	to, group := p.account.Number, ""
	if g := p.srv.Group(originOf(stanza).chat); g != nil {
		group = g.JID().String()
		to = group
	}
	if copied := message.GetDeviceSentMessage(); copied != nil {
		message = copied.GetMessage()
		destination, err := types.ParseJID(copied.GetDestinationJID())
		account := p.srv.Account(destination)
		if err != nil || (account == nil && group == "") {
			return
		}
		if group == "" {
			to = account.Number
		}
	}
	text, kind := classify(message)
	if kind == "" {
		return
	}
	seconds, _ := strconv.ParseInt(server.AttrString(stanza, "t"), 10, 64) // the server's own stamp
	p.mu.Lock()
	defer p.mu.Unlock()
	p.view.show(Shown{
		From: from.account.Number, FromDevice: int(from.device), To: to, Group: group, MessageID: server.AttrString(stanza, "id"),
		Text: text, Kind: kind, Timestamp: time.Unix(seconds, 0).UTC(),
	}, originOf(stanza))
}

// classify returns the text of a text message, and no kind for what shows nothing.
func classify(m *waE2E.Message) (text, kind string) {
	switch {
	case m.GetConversation() != "":
		return m.GetConversation(), kindText
	case m.GetExtendedTextMessage() != nil:
		return m.GetExtendedTextMessage().GetText(), kindText
	case m == nil, m.GetProtocolMessage() != nil, m.GetSenderKeyDistributionMessage() != nil:
		return "", ""
	default:
		return "", kindOther
	}
}

// acknowledge sends the delivery receipt; for what an own device sent it is of another type.
func (p *Phone) acknowledge(stanza *server.Node, account *server.Account, peer bool) {
	attrs := server.Attrs{"id": server.AttrString(stanza, "id")}
	originOf(stanza).address(attrs)
	switch {
	case peer:
		attrs["type"] = string(types.ReceiptTypePeerMsg)
	case account == p.account:
		attrs["type"] = string(types.ReceiptTypeSender)
		if recipient := server.AttrJID(stanza, "recipient"); !recipient.IsEmpty() {
			attrs["recipient"] = recipient
		}
	}
	p.srv.Submit(p.self, &server.Node{Tag: "receipt", Attrs: attrs})
}

// undecryptable deals with a message that does not decrypt: a retry receipt asks its sender for it again.
func (p *Phone) undecryptable(stanza, enc *server.Node, from sender, cause error) {
	id := server.AttrString(stanza, "id")
	key := messageKey{from.account.Number, id}
	p.mu.Lock()
	_, seen := p.view.origin[key]
	p.view.count(from.account.Number).undecryptable++
	p.view.failures[key]++
	count := p.view.failures[key]
	p.mu.Unlock()
	p.log.Info("message not decrypted", "action", "undecryptable", "message_id", id, "count", count, "error", cause)
	switch {
	case errors.Is(cause, errOldCounter) && seen:
		// A message that is on the screen came once more, in the same ciphertext.
		p.acknowledge(stanza, from.account, false)
	case errors.Is(cause, errOldCounter):
		p.log.Info("ratchet step used twice, message lost", "action", "old_counter", "message_id", id, "nack", nackOldCounter)
	case count <= maxRetries:
		p.requestRetry(stanza, enc, count)
	}
}

func (p *Phone) requestRetry(stanza, enc *server.Node, count int) {
	if asked, err := strconv.Atoi(server.AttrString(enc, "count")); err == nil {
		count = max(count, asked+1)
	}
	bundle := server.Bundle{Registration: p.vault.registration()}
	content := []server.Node{
		{Tag: "retry", Attrs: server.Attrs{
			"count": count, "id": server.AttrString(stanza, "id"), "t": server.AttrString(stanza, "t"), "v": 1,
		}},
		bundle.RegistrationNode(),
	}
	if count >= keysFrom {
		one := p.vault.generate(1)[0]
		bundle.OneTime = &one
		content = append(content, server.Node{Tag: "keys", Content: bundle.Nodes()})
	}
	attrs := server.Attrs{"id": server.AttrString(stanza, "id"), "type": "retry"}
	originOf(stanza).address(attrs)
	if recipient := server.AttrJID(stanza, "recipient"); !recipient.IsEmpty() {
		attrs["recipient"] = recipient
	}
	p.srv.Submit(p.self, &server.Node{Tag: "receipt", Attrs: attrs, Content: content})
}

// receiveReceipt notes who has got or read what the phone sent.
func (p *Phone) receiveReceipt(stanza *server.Node) {
	kind := server.AttrString(stanza, "type")
	if kind == "retry" {
		p.resend(stanza)
		return
	}
	from := originOf(stanza)
	account := p.srv.Account(from.sender())
	if account == nil {
		return
	}
	device := account.JID()
	device.Device = from.sender().Device
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range server.ReceiptIDs(stanza) {
		message := p.view.byID[id]
		if message == nil || !message.concerns(from.chat, account) {
			continue
		}
		// An inactive client's receipt (type inactive) is a delivery too, though phones do not show it as one.
		switch types.ReceiptType(kind) {
		case types.ReceiptTypeDelivered, types.ReceiptTypeInactive, types.ReceiptTypeSender:
			message.DeliveredTo = addOnce(message.DeliveredTo, device.String())
		case types.ReceiptTypeRead, types.ReceiptTypePlayed:
			message.ReadBy = addOnce(message.ReadBy, device.String())
		}
	}
}

// concerns tells whether a receipt from an account in a chat can be about the message.
func (m *sentMessage) concerns(chat types.JID, account *server.Account) bool {
	if m.group != nil {
		return chat == m.group.JID() && m.group.Has(account)
	}
	return m.recipient == account
}

// Read sends read receipts for messages from an account: one receipt per chat and address they came from.
func (p *Phone) Read(from *server.Account, messageIDs []string) {
	p.mu.Lock()
	var order []origin
	byOrigin := map[origin][]string{}
	for _, id := range messageIDs {
		o, ok := p.view.origin[messageKey{from.Number, id}]
		if !ok {
			o = origin{chat: from.JID()}
		}
		o = origin{o.chat.ToNonAD(), o.participant.ToNonAD()}
		if byOrigin[o] == nil {
			order = append(order, o)
		}
		byOrigin[o] = append(byOrigin[o], id)
	}
	p.mu.Unlock()
	for _, o := range order {
		p.srv.Submit(p.self, readReceipt(o, byOrigin[o]))
	}
}

func readReceipt(to origin, ids []string) *server.Node {
	receipt := &server.Node{Tag: "receipt", Attrs: server.Attrs{"id": ids[0], "type": string(types.ReceiptTypeRead)}}
	to.address(receipt.Attrs)
	if len(ids) > 1 {
		items := make([]server.Node, len(ids)-1)
		for i, id := range ids[1:] {
			items[i] = server.Node{Tag: "item", Attrs: server.Attrs{"id": id}}
		}
		receipt.Content = []server.Node{{Tag: "list", Content: items}}
	}
	return receipt
}
