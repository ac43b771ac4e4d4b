package server

import (
	"cmp"
	"errors"
	"slices"
	"strconv"
	"time"

	"go.mau.fi/whatsmeow/types"
)

const (
	// groupBase makes group ids as long as real ones.
	groupBase = 120_363_000_000_000_000
	// ackNotMember is the error of an ack for a message to a group that the sender is not in. What a real server answers
	// here is not known.
	ackNotMember = 403
	// maxSubject is how long a group's name may be (whatsmeow group.go, ReqCreateGroup says 25; WhatsApp has raised it).
	maxSubject = 100
)

// Errors of CreateGroup.
var (
	ErrBadSubject = errors.New("a group needs a subject of up to 100 characters")
	ErrNoMembers  = errors.New("a group needs somebody besides its creator")
)

var errForbidden = &iqError{403, "forbidden"}

// Group is a group; who is in it never changes.
type Group struct {
	ID, Subject string
	Creator     *Account
	Created     time.Time
	members     []*Account
}

// JID is the group's address.
func (g *Group) JID() types.JID { return types.NewJID(g.ID, types.GroupServer) }

// Members are all accounts in the group, the creator first.
func (g *Group) Members() []*Account { return g.members }

// Has tells whether an account is in the group.
func (g *Group) Has(a *Account) bool { return slices.Contains(g.members, a) }

// CreateGroup makes a group and tells every linked device of its members.
func (s *Server) CreateGroup(creator *Account, others []*Account, subject string) (*Group, error) {
	if subject == "" || len([]rune(subject)) > maxSubject {
		return nil, ErrBadSubject
	}
	members := []*Account{creator}
	for _, a := range others {
		if !slices.Contains(members, a) {
			members = append(members, a)
		}
	}
	if len(members) < 2 {
		return nil, ErrNoMembers
	}
	s.mu.Lock()
	g := &Group{
		ID: strconv.Itoa(groupBase + len(s.groups) + 1), Subject: subject, Creator: creator, Created: time.Now(), members: members,
	}
	s.groups[g.ID] = g
	s.mu.Unlock()
	s.announceGroup(g)
	return g, nil
}

// Group finds a group by its address; nil if there is none.
func (s *Server) Group(jid types.JID) *Group {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if jid.Server != types.GroupServer {
		return nil
	}
	return s.groups[jid.User]
}

// Groups are those that an account is in, oldest first; nil means all.
func (s *Server) Groups(of *Account) []*Group {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := []*Group{}
	for _, g := range s.groups {
		if of == nil || g.Has(of) {
			list = append(list, g)
		}
	}
	slices.SortFunc(list, func(x, y *Group) int { return cmp.Compare(x.ID, y.ID) })
	return list
}

// announceGroup is the `w:gp2` notification by which clients learn of a group.
func (s *Server) announceGroup(g *Group) {
	for _, member := range g.members {
		for _, d := range member.Devices() {
			id := s.nextID()
			d.deliver(Node{Tag: "notification", Attrs: Attrs{
				"from": g.JID(), "participant": g.Creator.LIDJID(), "participant_pn": g.Creator.JID(),
				"type": "w:gp2", "id": id, "t": g.Created.Unix(), "notify": g.Creator.Name, "addressing_mode": "lid",
			}, Content: []Node{{Tag: "create", Attrs: Attrs{"type": "new"}, Content: []Node{g.node()}}}},
				settleKey{class: "notification", id: id, peer: s.peerOf(g.JID(), g.Creator.LIDJID())})
		}
	}
}

// node describes the group as clients read it (whatsmeow group.go, parseGroupNode): members by LID, with their numbers.
func (g *Group) node() Node {
	content := make([]Node, len(g.members))
	for i, member := range g.members {
		attrs := Attrs{"jid": member.LIDJID(), "phone_number": member.JID()}
		if member == g.Creator {
			attrs["type"] = "superadmin"
		}
		content[i] = Node{Tag: "participant", Attrs: attrs}
	}
	return Node{Tag: "group", Attrs: Attrs{
		"id": g.ID, "subject": g.Subject, "creator": g.Creator.LIDJID(), "creator_pn": g.Creator.JID(),
		"creation": g.Created.Unix(), "s_t": g.Created.Unix(), "s_o": g.Creator.LIDJID(), "s_o_pn": g.Creator.JID(),
		"addressing_mode": "lid", "size": len(g.members),
	}, Content: content}
}

func ownGroups(c *client, device *Device, _, _ *Node) ([]Node, *iqError) {
	nodes := []Node{}
	for _, g := range c.srv.Groups(device.Account) {
		nodes = append(nodes, g.node())
	}
	return []Node{{Tag: "groups", Content: nodes}}, nil
}

func describeGroup(c *client, device *Device, iq, _ *Node) ([]Node, *iqError) {
	g := c.srv.Group(AttrJID(iq, "to"))
	switch {
	case g == nil:
		return nil, errItemNotFound
	case !g.Has(device.Account):
		return nil, errForbidden
	default:
		return []Node{g.node()}, nil
	}
}

// createGroup is a client's own wish for a group; settings in the request are not kept.
func createGroup(c *client, device *Device, _, request *Node) ([]Node, *iqError) {
	var others []*Account
	for _, participant := range request.GetChildrenByTag("participant") {
		account := c.srv.Account(AttrJID(&participant, "jid"))
		if account == nil {
			return nil, errItemNotFound
		}
		others = append(others, account)
	}
	g, err := c.srv.CreateGroup(device.Account, others, AttrString(request, "subject"))
	if err != nil {
		return nil, errBadRequest
	}
	return []Node{g.node()}, nil
}

// planGroup works out which device gets what of a group message: the part encrypted for it alone, if there is one (the
// sender key), and the part for all. With a participant it is the answer to that device's retry receipt.
func (s *Server) planGroup(from *Device, node *Node, at time.Time) ([]delivery, int) {
	g := s.Group(AttrJID(node, "to"))
	if g == nil {
		return nil, ackNoRecipient
	}
	if !g.Has(from.Account) {
		return nil, ackNotMember
	}
	common := node.GetChildrenByTag("enc")
	if asked := AttrJID(node, "participant"); !asked.IsEmpty() {
		target := s.device(asked)
		if target == nil || target == from || !g.Has(target.Account) {
			return nil, 0
		}
		return []delivery{s.groupEnvelope(from, target, g, node, common, at)}, 0
	}
	own := map[*Device][]Node{}
	participants := node.GetChildByTag("participants")
	for _, child := range participants.GetChildrenByTag("to") {
		if target := s.device(AttrJID(&child, "jid")); target != nil {
			own[target] = child.GetChildrenByTag("enc")
		}
	}
	var deliveries []delivery
	for _, member := range g.members {
		for _, target := range member.Devices() {
			if target != from {
				content := append(slices.Clone(own[target]), common...)
				deliveries = append(deliveries, s.groupEnvelope(from, target, g, node, content, at))
			}
		}
	}
	return deliveries, 0
}

// groupEnvelope names the sender's device by LID: receivers keep its sender key under that address.
func (s *Server) groupEnvelope(from, target *Device, g *Group, node *Node, content []Node, at time.Time) delivery {
	participant, id := from.Address(true), AttrString(node, "id")
	attrs := Attrs{
		"from": g.JID(), "participant": participant, "participant_pn": from.Account.JID(),
		"addressing_mode": string(types.AddressingModeLID), "id": id, "type": AttrString(node, "type"),
		"t": at.Unix(), "notify": from.Account.Name,
	}
	if edit := AttrString(node, "edit"); edit != "" {
		attrs["edit"] = edit
	}
	return delivery{
		target: target,
		node:   Node{Tag: "message", Attrs: attrs, Content: payload(node, content)},
		key:    settleKey{class: "message", id: id, peer: s.peerOf(g.JID(), participant)},
	}
}
