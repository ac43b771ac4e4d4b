package phone

import (
	"context"
	"errors"
	"fmt"

	"go.mau.fi/libsignal/groups"
	groupRecord "go.mau.fi/libsignal/groups/state/record"
	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/sim/server"
)

// encSenderKey is the part of a group message that is the same for all.
const encSenderKey = "skmsg"

// ErrNotMember is returned for a message to a group that the phone's account is not in.
var ErrNotMember = errors.New("the account is not in the group")

// SendGroup sends a text to a group. Devices that have not got the phone's sender key get it along with the message.
func (p *Phone) SendGroup(g *server.Group, text string) (messageID string, err error) {
	if !g.Has(p.account) {
		return "", ErrNotMember
	}
	// One after the other: a second message must not overtake the first, which carries the sender key. Nothing that the
	// server calls back takes this lock.
	p.groupSend.Lock()
	defer p.groupSend.Unlock()
	message := &sentMessage{Sent: Sent{MessageID: p.newMessageID(), To: g.JID().String()}, group: g, text: text}
	content, err := p.encryptForGroup(g, text)
	if err != nil {
		return "", err
	}
	return p.submit(message, server.Node{
		Tag: "message",
		Attrs: server.Attrs{
			"id": message.MessageID, "to": g.JID(), "type": "text", "addressing_mode": string(types.AddressingModeLID),
		},
		Content: content,
	})
}

// encryptForGroup makes the sender key for who lacks it, and the message for all. The key is taken before the message
// is encrypted: it begins with this message.
func (p *Phone) encryptForGroup(g *server.Group, text string) ([]server.Node, error) {
	distribution, err := p.distribution(g)
	if err != nil {
		return nil, err
	}
	var participants []server.Node
	for _, target := range p.lacking(g) {
		enc, err := p.encryptFor(target, distribution)
		if err != nil {
			return nil, fmt.Errorf("encrypt for %s: %w", target.JID(), err)
		}
		participants = append(participants, server.Node{Tag: "to", Attrs: server.Attrs{"jid": target.Address(true)}, Content: []server.Node{enc}})
	}
	plaintext, err := proto.Marshal(&waE2E.Message{Conversation: proto.String(text)})
	if err != nil {
		return nil, err
	}
	ciphertext, err := p.vault.encryptGroup(g.JID().String(), signalAddress(p.account, 0), p.pad(plaintext))
	if err != nil {
		return nil, fmt.Errorf("encrypt for %s: %w", g.JID(), err)
	}
	return []server.Node{
		{Tag: "participants", Content: participants},
		{Tag: "enc", Attrs: server.Attrs{"v": "2", "type": encSenderKey}, Content: ciphertext},
	}, nil
}

// distribution is the message that hands over the phone's sender key.
func (p *Phone) distribution(g *server.Group) ([]byte, error) {
	key, err := p.senderKey(g)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(&waE2E.Message{SenderKeyDistributionMessage: key})
}

func (p *Phone) senderKey(g *server.Group) (*waE2E.SenderKeyDistributionMessage, error) {
	id := g.JID().String()
	key, err := p.vault.ownSenderKey(id, signalAddress(p.account, 0))
	if err != nil {
		return nil, fmt.Errorf("sender key: %w", err)
	}
	return &waE2E.SenderKeyDistributionMessage{GroupID: proto.String(id), AxolotlSenderKeyDistributionMessage: key}, nil
}

// lacking are the members' devices that have not got the sender key, which they get now.
func (p *Phone) lacking(g *server.Group) []*server.Device {
	var list []*server.Device
	for _, member := range g.Members() {
		list = append(list, member.Devices()...)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	has := p.view.senderKeyAt[g]
	if has == nil {
		has = map[*server.Device]bool{}
		p.view.senderKeyAt[g] = has
	}
	lacking := list[:0]
	for _, d := range list {
		if d != p.self && !has[d] {
			has[d] = true
			lacking = append(lacking, d)
		}
	}
	return lacking
}

// learn keeps a sender key that came with a message.
func (p *Phone) learn(from sender, key *waE2E.SenderKeyDistributionMessage) error {
	if key == nil {
		return nil
	}
	return p.vault.learnSenderKey(key.GetGroupID(), signalAddress(from.account, from.device), key.GetAxolotlSenderKeyDistributionMessage())
}

// ownSenderKey returns the sender key as it stands, and makes it at the first call.
func (v *vault) ownSenderKey(group string, self *protocol.SignalAddress) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	message, err := groups.NewGroupSessionBuilder(&v.store, serializer).Create(context.Background(), protocol.NewSenderKeyName(group, self))
	if err != nil {
		return nil, err
	}
	return message.Serialize(), nil
}

func (v *vault) learnSenderKey(group string, from *protocol.SignalAddress, key []byte) error {
	message, err := protocol.NewSenderKeyDistributionMessageFromBytes(key, serializer.SenderKeyDistributionMessage)
	if err != nil {
		return fmt.Errorf("parse: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return groups.NewGroupSessionBuilder(&v.store, serializer).Process(context.Background(), protocol.NewSenderKeyName(group, from), message)
}

func (v *vault) encryptGroup(group string, self *protocol.SignalAddress, plaintext []byte) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	message, err := v.groupCipher(group, self).Encrypt(context.Background(), plaintext)
	if err != nil {
		return nil, err
	}
	return message.SignedSerialize(), nil
}

func (v *vault) decryptGroup(group string, from *protocol.SignalAddress, ciphertext []byte) ([]byte, error) {
	message, err := protocol.NewSenderKeyMessageFromBytes(ciphertext, serializer.SenderKeyMessage)
	if err != nil {
		return nil, fmt.Errorf("parse: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.groupCipher(group, from).Decrypt(context.Background(), message)
}

func (v *vault) groupCipher(group string, sender *protocol.SignalAddress) *groups.GroupCipher {
	return groups.NewGroupCipher(groups.NewGroupSessionBuilder(&v.store, serializer), protocol.NewSenderKeyName(group, sender), &v.store)
}

// senderKeyID names a sender key in the store.
type senderKeyID struct{ group, sender string }

func nameOf(name *protocol.SenderKeyName) senderKeyID {
	return senderKeyID{name.GroupID(), name.Sender().String()}
}

func (s *store) StoreSenderKey(_ context.Context, name *protocol.SenderKeyName, key *groupRecord.SenderKey) error {
	s.senderKeys[nameOf(name)] = key
	return nil
}

func (s *store) LoadSenderKey(_ context.Context, name *protocol.SenderKeyName) (*groupRecord.SenderKey, error) {
	if key := s.senderKeys[nameOf(name)]; key != nil {
		return key, nil
	}
	return groupRecord.NewSenderKey(serializer.SenderKeyRecord, serializer.SenderKeyState), nil
}
