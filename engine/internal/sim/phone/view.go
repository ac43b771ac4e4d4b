package phone

import (
	"cmp"
	"slices"
	"time"

	"go.mau.fi/whatsmeow/types"

	"warren/engine/internal/sim/server"
)

// Shown is a message as the person sees it: one per sender's account and message id, however many stanzas brought it.
type Shown struct {
	// Index rises from 1 in the order in which messages were first seen.
	Index int `json:"index"`
	// From is the sender's number; the phone's own number for what a linked device of its own account sent.
	From       string `json:"from"`
	FromDevice int    `json:"from_device"`
	// To is the number of the account that the message is for, or the address of the group.
	To string `json:"to"`
	// Group is the address of the group, "" for a message to one account.
	Group     string    `json:"group"`
	MessageID string    `json:"message_id"`
	Text      string    `json:"text"`
	Kind      string    `json:"kind"`
	Timestamp time.Time `json:"timestamp"`
}

// Received is what reached a phone.
type Received struct {
	Stanzas       int     `json:"stanzas"`
	Shown         []Shown `json:"shown"`
	Undecryptable int     `json:"undecryptable"`
}

// Sent is a message that the phone sent, and what it heard of it.
type Sent struct {
	MessageID string `json:"message_id"`
	To        string `json:"to"`
	ServerAck bool   `json:"server_ack"`
	// DeliveredTo and ReadBy are devices of the recipient's account, or of the group's other members, by phone number.
	DeliveredTo []string `json:"delivered_to"`
	ReadBy      []string `json:"read_by"`
}

// view is what the person sees, and what the phone keeps for it.
type view struct {
	shown []Shown
	// origin is where each shown message came from: receipts go there.
	origin map[messageKey]origin
	counts map[string]*counts
	sent   []*sentMessage
	byID   map[string]*sentMessage
	// failures counts the retry receipts sent per message.
	failures map[messageKey]int
	// senderKeyAt are the devices that have got the phone's sender key.
	senderKeyAt map[*server.Group]map[*server.Device]bool
}

// origin is the addresses on the wire: the chat, and in a group the sender in it.
type origin struct{ chat, participant types.JID }

func originOf(stanza *server.Node) origin {
	return origin{server.AttrJID(stanza, "from"), server.AttrJID(stanza, "participant")}
}

// sender is who sent it.
func (o origin) sender() types.JID {
	if o.chat.Server == types.GroupServer {
		return o.participant
	}
	return o.chat
}

// address puts the addresses into what goes back there.
func (o origin) address(attrs server.Attrs) {
	attrs["to"] = o.chat
	if !o.participant.IsEmpty() {
		attrs["participant"] = o.participant
	}
}

type messageKey struct{ account, id string }

type counts struct{ stanzas, undecryptable int }

// sentMessage keeps the plaintext: a device that could not decrypt asks for the message again.
type sentMessage struct {
	Sent
	// recipient or group is set.
	recipient *server.Account
	group     *server.Group
	lidMode   bool
	text      string
	resends   map[types.JID]int
}

func newView() view {
	return view{
		origin: map[messageKey]origin{}, senderKeyAt: map[*server.Group]map[*server.Device]bool{}, counts: map[string]*counts{},
		byID: map[string]*sentMessage{}, failures: map[messageKey]int{},
	}
}

func (v *view) count(account string) *counts {
	c := v.counts[account]
	if c == nil {
		c = &counts{}
		v.counts[account] = c
	}
	return c
}

// show adds a message, unless the person has seen it.
func (v *view) show(m Shown, from origin) {
	key := messageKey{m.From, m.MessageID}
	if _, seen := v.origin[key]; seen {
		return
	}
	m.Index = len(v.shown) + 1
	v.shown = append(v.shown, m)
	v.origin[key] = from
}

// Received returns what arrived, from one account ("" is all), shown after an index.
func (p *Phone) Received(from string, after int) Received {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := Received{Shown: []Shown{}}
	for account, c := range p.view.counts {
		if from == "" || account == from {
			r.Stanzas += c.stanzas
			r.Undecryptable += c.undecryptable
		}
	}
	for _, m := range p.view.shown[min(max(after, 0), len(p.view.shown)):] {
		if from == "" || m.From == from {
			r.Shown = append(r.Shown, m)
		}
	}
	return r
}

// Sent returns what the phone sent, to one account ("" is all), oldest first.
func (p *Phone) Sent(to string) []Sent {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := []Sent{}
	for _, m := range p.view.sent {
		if to == "" || m.To == to {
			c := m.Sent
			c.DeliveredTo, c.ReadBy = sorted(m.DeliveredTo), sorted(m.ReadBy)
			list = append(list, c)
		}
	}
	return list
}

func sorted(list []string) []string {
	c := append([]string{}, list...)
	slices.SortFunc(c, cmp.Compare)
	return c
}

// addOnce appends to a set that stays small.
func addOnce(list []string, value string) []string {
	if slices.Contains(list, value) {
		return list
	}
	return append(list, value)
}
