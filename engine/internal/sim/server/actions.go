package server

import "time"

// malformedFrame is a stanza with an attribute that is a JID (token 250) whose user part is itself a JID. whatsmeow's
// decoder takes the user for a string and panics in the socket's goroutine, which ends the client's whole process
// (binary/decoder.go, readJIDPair).
var malformedFrame = []byte{
	0,      // not compressed
	248, 3, // a list of three: the tag, one attribute's name and its value
	3, 4, // the tag and the name, from the dictionary
	250, 250, 3, 3, 3, // JID(JID(user, server), server)
}

// StreamError ends a device's connection with `<stream:error>`; a conflict has a type (replaced, device_removed) and
// perhaps no code. False if the device is not connected.
func (s *Server) StreamError(d *Device, code, conflict string) bool {
	var content []Node
	if conflict != "" {
		content = []Node{{Tag: "conflict", Attrs: Attrs{"type": conflict}}}
	}
	return d.dismiss(streamError(code, content...))
}

// Fail ends a device's connection with `<failure>`, as a login is refused. False if the device is not connected.
func (s *Server) Fail(d *Device, reason int, expire time.Duration) bool {
	return d.dismiss(failure(reason, expire))
}

// SendMalformed sends a frame that no client can decode. False if the device is not connected.
func (s *Server) SendMalformed(d *Device) bool {
	client := d.connection()
	if client == nil {
		return false
	}
	client.enqueue(reply{raw: malformedFrame})
	return true
}

// dismiss says goodbye to the device's connection, if it has one.
func (d *Device) dismiss(last Node) bool {
	client := d.connection()
	if client == nil {
		return false
	}
	client.goodbye(last)
	return true
}

// failure is why a login is refused. A temporary ban (402) says why, in a code of its own, and for how many seconds
// (whatsmeow connectionevents.go, handleConnectFailure).
func failure(reason int, expire time.Duration) Node {
	attrs := Attrs{"reason": reason, "location": "sim"}
	if reason == failureTempBanned {
		attrs["code"], attrs["expire"] = tempBanTooManyMessages, int(expire/time.Second)
	}
	return Node{Tag: "failure", Attrs: attrs}
}
