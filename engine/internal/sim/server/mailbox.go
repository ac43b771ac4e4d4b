package server

// settleKey says what a client's receipt or ack refers to. WhatsApp keeps a message until its receipt (or ack), and a
// receipt or notification until its ack; all are delivered again at every login before that.
type settleKey struct {
	// class is the stanza's tag.
	class string
	id    string
	// peer is the account or server the stanza came from.
	peer string
	// kind is the type of a receipt: the same message is delivered and read under one id.
	kind string
}

// entry is a pending stanza and its position in the mailbox.
type entry struct {
	node     Node
	key      settleKey
	position uint64
}

// backlog says what a mailbox held at a moment.
type backlog struct {
	last                              uint64
	total                             int
	messages, receipts, notifications int
}

// mailbox is the pending stanzas of a linked device in order. Positions rise from 1 and are never reused, so a
// connection's progress is one number. It has no lock of its own.
type mailbox struct {
	// entries[i] is at position first+i; a settled one is nil.
	entries []*entry
	first   uint64
	live    int
	index   map[settleKey][]uint64
}

func (m *mailbox) put(node Node, key settleKey) {
	if m.index == nil {
		m.index, m.first = map[settleKey][]uint64{}, 1
	}
	position := m.first + uint64(len(m.entries))
	m.entries = append(m.entries, &entry{node: node, key: key, position: position})
	m.index[key] = append(m.index[key], position)
	m.live++
}

func (m *mailbox) next(position uint64) (entry, bool) {
	i := uint64(0)
	if position > m.first {
		i = position - m.first
	}
	for ; i < uint64(len(m.entries)); i++ {
		if e := m.entries[i]; e != nil {
			return *e, true
		}
	}
	return entry{}, false
}

// settle removes the oldest entry with this key.
func (m *mailbox) settle(key settleKey) {
	positions := m.index[key]
	if len(positions) == 0 {
		return
	}
	m.entries[positions[0]-m.first] = nil
	m.live--
	if len(positions) == 1 {
		delete(m.index, key)
	} else {
		m.index[key] = positions[1:]
	}
	for len(m.entries) > 0 && m.entries[0] == nil {
		m.entries = m.entries[1:]
		m.first++
	}
}

func (m *mailbox) backlog() backlog {
	b := backlog{total: m.live}
	for _, e := range m.entries {
		if e == nil {
			continue
		}
		b.last = e.position
		switch e.key.class {
		case "message":
			b.messages++
		case "receipt":
			b.receipts++
		case "notification":
			b.notifications++
		}
	}
	return b
}
