package server

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"go.mau.fi/whatsmeow/types"
)

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

// Timelock tells an account's linked devices that the account must not write to people it has no chat with, or that it may again. It stays pending
// until a device acks it. until is zero when no end is known; kind is WhatsApp's word for the restriction (whatsmeow notification.go, handleMexNotification).
func (s *Server) Timelock(a *Account, active bool, until time.Time, kind string) error {
	type timelock struct {
		Kind   string `json:"enforcement_type,omitempty"`
		Active bool   `json:"is_active"`
		Ends   string `json:"time_enforcement_ends,omitempty"`
	}
	lock := timelock{Kind: kind, Active: active}
	if !until.IsZero() {
		lock.Ends = strconv.FormatInt(until.Unix(), 10)
	}
	content, err := json.Marshal(map[string]any{"data": map[string]any{"xwa2_notify_account_reachout_timelock": lock}})
	if err != nil {
		return fmt.Errorf("encode the notification: %w", err)
	}
	for _, d := range a.Devices() {
		if d.ID != 0 {
			s.notify(d, types.ServerJID, "mex", Node{
				Tag: "update", Attrs: Attrs{"op_name": "NotificationUserReachoutTimelockUpdate"}, Content: content,
			})
		}
	}
	return nil
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
