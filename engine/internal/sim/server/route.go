package server

import (
	"time"

	"go.mau.fi/whatsmeow/types"
)

// ackNoRecipient is the error of an ack for a message to nobody. What a real server answers here is not known; clients
// do not get this far, because they find no device to encrypt for.
const ackNoRecipient = 404

// delivery is one stanza for one device.
type delivery struct {
	target *Device
	node   Node
	key    settleKey
}

func (c *client) handleMessage(from *Device, node *Node) {
	now := time.Now()
	deliveries, failure := c.srv.plan(from, node, now)
	if f, _, refused := c.srv.faults.strike(FaultSend, from, nil); refused {
		deliveries, failure = nil, f.Code
	}
	ack := Node{Tag: "ack", Attrs: Attrs{
		"class": "message", "id": AttrString(node, "id"), "from": AttrJID(node, "to"), "t": now.Unix(),
	}}
	if failure != 0 {
		ack.Attrs["error"] = failure
	}
	// The ack is queued first, so that no receipt overtakes it. What is acked is delivered: nothing can fail from here.
	c.answer(ack)
	deliverAll(deliveries)
}

// Submit takes a stanza from a primary device. It returns the error code of the server's ack (0: accepted) and the
// server's time.
func (s *Server) Submit(from *Device, node *Node) (code int, at time.Time) {
	at = time.Now()
	if node.Tag == "receipt" {
		s.submitReceipt(from, node)
		return 0, at
	}
	deliveries, failure := s.plan(from, node, at)
	deliverAll(deliveries)
	return failure, at
}

func deliverAll(deliveries []delivery) {
	for _, d := range deliveries {
		d.target.deliver(d.node, d.key)
	}
}

// plan works out which device gets what of a message: a ciphertext per device in `<participants>`, or a bare `<enc>` for
// the one device that the message is addressed to (peer messages, answers to retry receipts).
func (s *Server) plan(from *Device, node *Node, at time.Time) ([]delivery, int) {
	to := AttrJID(node, "to")
	if to.Server == types.GroupServer {
		return s.planGroup(from, node, at)
	}
	if s.Account(to) == nil {
		return nil, ackNoRecipient
	}
	var deliveries []delivery
	if participants, ok := node.GetOptionalChildByTag("participants"); ok {
		for _, child := range participants.GetChildrenByTag("to") {
			if target := s.device(AttrJID(&child, "jid")); target != nil && target != from {
				deliveries = append(deliveries, s.envelope(from, target, node, &child, at))
			}
		}
	} else if target := s.device(to); target != nil && target != from {
		deliveries = append(deliveries, s.envelope(from, target, node, node, at))
	}
	return deliveries, 0
}

// envelope is a message as one device gets it. Its addresses are of the kind (phone number or LID) that the sender
// addressed it with, and the other kind is told beside: whatsmeow learns the mapping from sender_lid and sender_pn.
func (s *Server) envelope(from, target *Device, node, holder *Node, at time.Time) delivery {
	to := AttrJID(node, "to")
	lidMode := to.Server == types.HiddenUserServer
	attrs := Attrs{
		"from": from.Address(lidMode), "id": AttrString(node, "id"), "type": AttrString(node, "type"),
		"t": at.Unix(), "notify": from.Account.Name,
	}
	for _, key := range []string{"edit", "category"} {
		if value := AttrString(node, key); value != "" {
			attrs[key] = value
		}
	}
	if lidMode {
		attrs["addressing_mode"] = string(types.AddressingModeLID)
	}
	if target.Account == from.Account {
		s.addressOwn(attrs, node, to)
	} else if lidMode {
		attrs["sender_pn"] = from.Account.JID()
	} else {
		attrs["sender_lid"] = from.Account.LIDJID()
	}
	id := AttrString(node, "id")
	return delivery{
		target: target,
		node:   Node{Tag: "message", Attrs: attrs, Content: payload(node, holder.GetChildrenByTag("enc"))},
		key:    settleKey{class: "message", id: id, peer: from.Account.Number},
	}
}

// addressOwn says to another device of the sender's account which chat the message belongs to.
func (s *Server) addressOwn(attrs Attrs, node *Node, to types.JID) {
	if AttrString(node, "category") == "peer" {
		return
	}
	recipient := to.ToNonAD()
	if asked := AttrJID(node, "recipient"); !asked.IsEmpty() {
		recipient = asked.ToNonAD()
	}
	attrs["recipient"] = recipient
	account := s.Account(recipient)
	if account == nil {
		return
	}
	if recipient.Server == types.HiddenUserServer {
		attrs["peer_recipient_pn"] = account.JID()
	} else {
		attrs["peer_recipient_lid"] = account.LIDJID()
	}
}

// payload is a device's ciphertexts, and what the sender proves its device with if one of them starts a session.
func payload(node *Node, content []Node) []Node {
	preKey := false
	for i := range content {
		preKey = preKey || AttrString(&content[i], "type") == "pkmsg"
	}
	if identity, ok := node.GetOptionalChildByTag("device-identity"); ok && preKey {
		content = append(content, identity)
	}
	if meta, ok := node.GetOptionalChildByTag("meta"); ok {
		content = append(content, meta)
	}
	return content
}

// submitReceipt settles what the receipt is about and passes it on: a retry request, or a receipt for a copy, to the
// device that sent the message; any other to all devices of the sender's account, because all of them show the ticks.
func (s *Server) submitReceipt(from *Device, node *Node) {
	to, participant := AttrJID(node, "to"), AttrJID(node, "participant")
	kind := AttrString(node, "type")
	if kind != "retry" {
		for _, id := range ReceiptIDs(node) {
			from.settle(settleKey{class: "message", id: id, peer: s.peerOf(to, participant)})
		}
	}
	sender := to
	if to.Server == types.GroupServer {
		sender = participant
	}
	account := s.Account(sender)
	if account == nil {
		return
	}
	targets := account.Devices()
	if kind == "retry" || account == from.Account {
		targets = []*Device{account.Device(sender.Device)}
	}
	stanza, peer := s.stampReceipt(from, node, to)
	key := settleKey{class: "receipt", id: AttrString(node, "id"), peer: peer, kind: kind}
	for _, target := range targets {
		if target != nil && target != from {
			target.deliver(stanza, key)
		}
	}
}

// stampReceipt is a receipt as it is passed on, and who it comes from: in a group, the participant there.
func (s *Server) stampReceipt(from *Device, node *Node, to types.JID) (stanza Node, peer string) {
	attrs := Attrs{"id": AttrString(node, "id"), "t": time.Now().Unix()}
	if to.Server == types.GroupServer {
		attrs["from"], attrs["participant"] = to, from.Address(true)
		peer = s.peerOf(to, from.Address(true))
	} else {
		attrs["from"] = from.Address(to.Server == types.HiddenUserServer)
		peer = from.Account.Number
	}
	for _, key := range []string{"type", "category"} {
		if value := AttrString(node, key); value != "" {
			attrs[key] = value
		}
	}
	if recipient := AttrJID(node, "recipient"); !recipient.IsEmpty() {
		attrs["recipient"] = recipient
	}
	return Node{Tag: "receipt", Attrs: attrs, Content: node.Content}, peer
}

// ReceiptIDs are the messages a receipt is about: its id and those of its `<list>`.
func ReceiptIDs(node *Node) []string {
	ids := []string{AttrString(node, "id")}
	list := node.GetChildByTag("list")
	if list.Tag != "list" {
		return ids
	}
	for _, item := range list.GetChildrenByTag("item") {
		ids = append(ids, AttrString(&item, "id"))
	}
	return ids
}

// settleAck settles what an ack is about. A nack (with an error) settles too: the client has taken note.
func (s *Server) settleAck(from *Device, node *Node) {
	key := settleKey{
		class: AttrString(node, "class"), id: AttrString(node, "id"),
		peer: s.peerOf(AttrJID(node, "to"), AttrJID(node, "participant")),
	}
	if key.class == "receipt" {
		key.kind = AttrString(node, "type")
	}
	from.settle(key)
}
