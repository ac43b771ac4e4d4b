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
	origin := server.AttrJID(stanza, "from")
	account := p.srv.Account(origin)
	if account == nil {
		return
	}
	// The device may have been unlinked since it sent this; its last messages count all the same.
	from := sender{account, origin.Device}
	peer := server.AttrString(stanza, "category") == "peer"
	if !peer {
		p.countStanza(account)
	}
	for _, enc := range stanza.GetChildrenByTag("enc") {
		message, err := p.open(from, &enc)
		if err != nil {
			p.undecryptable(stanza, &enc, from, err)
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
func (p *Phone) open(from sender, enc *server.Node) (*waE2E.Message, error) {
	ciphertext, _ := enc.Content.([]byte)
	padded, err := p.vault.decrypt(signalAddress(from.account, from.device), server.AttrString(enc, "type"), ciphertext)
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
	to := p.account
	if copied := message.GetDeviceSentMessage(); copied != nil {
		message = copied.GetMessage()
		destination, err := types.ParseJID(copied.GetDestinationJID())
		if to = p.srv.Account(destination); err != nil || to == nil {
			return
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
		From: from.account.Number, FromDevice: int(from.device), To: to.Number, MessageID: server.AttrString(stanza, "id"),
		Text: text, Kind: kind, Timestamp: time.Unix(seconds, 0).UTC(),
	}, server.AttrJID(stanza, "from"))
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
	attrs := server.Attrs{"id": server.AttrString(stanza, "id"), "to": server.AttrJID(stanza, "from")}
	switch {
	case peer:
		attrs["type"] = string(types.ReceiptTypePeerMsg)
	case account == p.account:
		attrs["type"] = string(types.ReceiptTypeSender)
		attrs["recipient"] = server.AttrJID(stanza, "recipient")
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
	attrs := server.Attrs{"id": server.AttrString(stanza, "id"), "to": server.AttrJID(stanza, "from"), "type": "retry"}
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
	origin := server.AttrJID(stanza, "from")
	account := p.srv.Account(origin)
	if account == nil {
		return
	}
	device := account.JID()
	device.Device = origin.Device
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range server.ReceiptIDs(stanza) {
		message := p.view.byID[id]
		if message == nil || message.To != account.Number {
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

// Read sends read receipts for messages from an account: one receipt per address they came from.
func (p *Phone) Read(from *server.Account, messageIDs []string) {
	p.mu.Lock()
	var order []types.JID
	byOrigin := map[types.JID][]string{}
	for _, id := range messageIDs {
		origin, ok := p.view.origin[messageKey{from.Number, id}]
		if !ok {
			origin = from.JID()
		}
		origin = origin.ToNonAD()
		if byOrigin[origin] == nil {
			order = append(order, origin)
		}
		byOrigin[origin] = append(byOrigin[origin], id)
	}
	p.mu.Unlock()
	for _, origin := range order {
		p.srv.Submit(p.self, readReceipt(origin, byOrigin[origin]))
	}
}

func readReceipt(to types.JID, ids []string) *server.Node {
	receipt := &server.Node{Tag: "receipt", Attrs: server.Attrs{
		"id": ids[0], "to": to, "type": string(types.ReceiptTypeRead),
	}}
	if len(ids) > 1 {
		items := make([]server.Node, len(ids)-1)
		for i, id := range ids[1:] {
			items[i] = server.Node{Tag: "item", Attrs: server.Attrs{"id": id}}
		}
		receipt.Content = []server.Node{{Tag: "list", Content: items}}
	}
	return receipt
}
