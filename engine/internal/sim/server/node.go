package server

import (
	"fmt"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// Node is a stanza or a part of one.
type Node = waBinary.Node

// Attrs are a node's attributes.
type Attrs = waBinary.Attrs

// AttrString is an attribute as text, "" if it is not there. JIDs are written out.
func AttrString(n *Node, key string) string {
	switch v := n.Attrs[key].(type) {
	case nil:
		return ""
	case string:
		return v
	default:
		return fmt.Sprint(v)
	}
}

// AttrJID is an attribute as an address, empty if it is none. Clients may write an address as plain text.
func AttrJID(n *Node, key string) types.JID {
	switch v := n.Attrs[key].(type) {
	case types.JID:
		return v
	case string:
		if jid, err := types.ParseJID(v); err == nil {
			return jid
		}
	}
	return types.EmptyJID
}

func childBytes(n *Node, tag string) []byte {
	child := n.GetChildByTag(tag)
	if child.Tag != tag {
		return nil
	}
	data, _ := child.Content.([]byte)
	return data
}

// childText is a child's content as text: the decoder returns dictionary words as strings.
func childText(n *Node, tag string) string {
	child := n.GetChildByTag(tag)
	if text, ok := child.Content.(string); ok {
		return text
	}
	return string(childBytes(n, tag))
}

// withAttr is a copy of a node with one more attribute; stanzas in mailboxes are shared and never changed.
func withAttr(n Node, key string, value any) Node {
	attrs := make(Attrs, len(n.Attrs)+1)
	for k, v := range n.Attrs {
		attrs[k] = v
	}
	attrs[key] = value
	n.Attrs = attrs
	return n
}
