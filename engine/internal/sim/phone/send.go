package phone

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/sim/server"
)

// maxResends bounds how often a message is encrypted again for one device (whatsmeow stops asking after 5).
const maxResends = 5

// ErrRefused is returned when the server's ack carries an error.
var ErrRefused = errors.New("the server refused the message")

// Send sends a text to every device of an account and, as a copy, to every other device of the own one. It returns when
// the server has the message.
func (p *Phone) Send(to *server.Account, text string) (messageID string, err error) {
	lidMode := p.lidMode.Load()
	message := &sentMessage{
		Sent: Sent{MessageID: p.newMessageID(), To: to.Number}, recipient: to, lidMode: lidMode, text: text,
	}
	plain, copied, err := message.encode()
	if err != nil {
		return "", err
	}
	var participants []server.Node
	for _, target := range p.targets(to) {
		plaintext := plain
		if target.Account == p.account {
			plaintext = copied
		}
		enc, err := p.encryptFor(target, plaintext)
		if err != nil {
			return "", fmt.Errorf("encrypt for %s: %w", target.JID(), err)
		}
		participants = append(participants, server.Node{Tag: "to", Attrs: server.Attrs{"jid": target.Address(lidMode)}, Content: []server.Node{enc}})
	}
	return p.submit(message, server.Node{
		Tag:     "message",
		Attrs:   server.Attrs{"id": message.MessageID, "to": to.Address(lidMode), "type": "text"},
		Content: []server.Node{{Tag: "participants", Content: participants}},
	})
}

func (p *Phone) submit(message *sentMessage, stanza server.Node) (messageID string, err error) {
	p.remember(message)
	code, _ := p.srv.Submit(p.self, &stanza)
	if code != 0 {
		return "", fmt.Errorf("%w: %d", ErrRefused, code)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	message.ServerAck = true
	return message.MessageID, nil
}

// remember makes the message known before the server has it: receipts come before Submit returns.
func (p *Phone) remember(m *sentMessage) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.view.sent = append(p.view.sent, m)
	p.view.byID[m.MessageID] = m
}

// targets are all devices that get a message to an account; this phone is none of them.
func (p *Phone) targets(to *server.Account) []*server.Device {
	list := to.Devices()
	if to != p.account {
		list = append(list, p.account.Devices()...)
	}
	others := list[:0]
	for _, d := range list {
		if d != p.self {
			others = append(others, d)
		}
	}
	return others
}

// encode makes the plaintext for the recipient, and the one for the own devices, which says whom it was sent to.
func (m *sentMessage) encode() (plain, copied []byte, err error) {
	message := &waE2E.Message{Conversation: proto.String(m.text)}
	if plain, err = proto.Marshal(message); err != nil {
		return nil, nil, err
	}
	copied, err = proto.Marshal(&waE2E.Message{DeviceSentMessage: &waE2E.DeviceSentMessage{
		DestinationJID: proto.String(m.recipient.Address(m.lidMode).String()), Message: message,
	}})
	return plain, copied, err
}

// encryptFor encrypts for one device, in a new session if there is none.
func (p *Phone) encryptFor(target *server.Device, plaintext []byte) (server.Node, error) {
	address := signalAddress(target.Account, target.ID)
	if !p.vault.hasSession(address) {
		// The bundle is fetched without the vault's lock: it may make another phone upload keys.
		if err := p.vault.begin(address, p.srv.TakeBundle(target), false); err != nil {
			return server.Node{}, err
		}
	}
	kind, ciphertext, err := p.vault.encrypt(address, p.pad(plaintext))
	if err != nil {
		return server.Node{}, err
	}
	return server.Node{Tag: "enc", Attrs: server.Attrs{"v": "2", "type": kind}, Content: ciphertext}, nil
}

// pad appends 1 to 15 bytes that say how many they are (whatsmeow message.go, padMessage).
func (p *Phone) pad(plaintext []byte) []byte {
	n := 1 + int(p.random.Uint32(15))
	return append(bytes.Clone(plaintext), bytes.Repeat([]byte{byte(n)}, n)...)
}

func unpad(padded []byte) ([]byte, error) {
	if len(padded) == 0 {
		return nil, errors.New("empty plaintext")
	}
	n := int(padded[len(padded)-1])
	if n == 0 || n > len(padded) {
		return nil, errors.New("bad padding")
	}
	return padded[:len(padded)-n], nil
}

// resend answers a retry receipt: the same message id, in a new session, for the one device that asked.
func (p *Phone) resend(receipt *server.Node) {
	from := originOf(receipt)
	account := p.srv.Account(from.sender())
	if account == nil {
		return
	}
	target := account.Device(from.sender().Device)
	message := p.allowResend(receipt)
	if target == nil || message == nil {
		return
	}
	enc, err := p.reencrypt(receipt, target, message)
	if err != nil {
		p.log.Warn("resend failed", "action", "resend_failed", "error", err)
		return
	}
	attrs := server.Attrs{"id": server.AttrString(receipt, "id"), "type": "text"}
	from.address(attrs)
	if message.group == nil {
		attrs["device_fanout"] = false
		if account == p.account {
			attrs["recipient"] = message.recipient.Address(message.lidMode)
		}
	}
	p.srv.Submit(p.self, &server.Node{Tag: "message", Attrs: attrs, Content: []server.Node{enc}})
}

// allowResend finds the message, unless it was asked for too often, and counts the request.
func (p *Phone) allowResend(receipt *server.Node) *sentMessage {
	origin := originOf(receipt).sender()
	p.mu.Lock()
	defer p.mu.Unlock()
	message := p.view.byID[server.AttrString(receipt, "id")]
	if message == nil || message.resends[origin] >= maxResends {
		return nil
	}
	if message.resends == nil {
		message.resends = map[types.JID]int{}
	}
	message.resends[origin]++
	return message
}

func (p *Phone) reencrypt(receipt *server.Node, target *server.Device, message *sentMessage) (server.Node, error) {
	plain, err := p.plaintextFor(target, message)
	if err != nil {
		return server.Node{}, err
	}
	bundle, given := server.ParseRetryBundle(receipt)
	if !given {
		bundle = p.srv.TakeBundle(target)
	}
	if err := p.vault.begin(signalAddress(target.Account, target.ID), bundle, true); err != nil {
		return server.Node{}, err
	}
	enc, err := p.encryptFor(target, plain)
	if err != nil {
		return server.Node{}, err
	}
	retry := receipt.GetChildByTag("retry")
	count, _ := strconv.Atoi(server.AttrString(&retry, "count")) // 0 if it is missing: then the resend is unnumbered
	enc.Attrs["count"] = count
	return enc, nil
}

// plaintextFor is what one device gets when it asks for a message again: of a group message the text itself, with the
// sender key that the device may lack.
func (p *Phone) plaintextFor(target *server.Device, message *sentMessage) ([]byte, error) {
	if message.group != nil {
		key, err := p.senderKey(message.group)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(&waE2E.Message{Conversation: proto.String(message.text), SenderKeyDistributionMessage: key})
	}
	plain, copied, err := message.encode()
	if target.Account == p.account {
		plain = copied
	}
	return plain, err
}
