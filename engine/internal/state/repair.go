// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"bytes"

	"go.mau.fi/libsignal/state/record"
	"go.mau.fi/whatsmeow/store"
)

// maxArchived is how many older states libsignal keeps of a session.
const maxArchived = 40

// repair undoes what libsignal v0.2.2 does to the states that did not decrypt a message. It turns the ratchet of each one it tries before it checks the
// message, and when a later one fits it stores them all; it also forgets one state and keeps another twice. That happens when both sides have begun a
// session at the same moment. Without this, what is then sent in the spoilt one cannot be read.
//
// The state that decrypted is the current one of after. All others are as they were before; current states become archived ones.
func repair(before, after []byte) []byte {
	serializer := store.SignalProtobufSerializer.Session
	if len(before) == 0 {
		return after
	}
	was, err := serializer.Deserialize(before)
	if err != nil {
		return after // nothing was decrypted with what cannot be read
	}
	is, err := serializer.Deserialize(after)
	if err != nil {
		return after
	}
	if sameSession(was.SessionState, is.SessionState) {
		return after // the current state decrypted: no other was tried
	}
	is.PreviousStates = is.PreviousStates[:0]
	for _, state := range append([]*record.StateStructure{was.SessionState}, was.PreviousStates...) {
		if !sameSession(state, is.SessionState) && len(is.PreviousStates) < maxArchived {
			is.PreviousStates = append(is.PreviousStates, state)
		}
	}
	return serializer.Serialize(is)
}

// sameSession compares the key that a session began with.
func sameSession(a, b *record.StateStructure) bool {
	return bytes.Equal(a.SenderBaseKey, b.SenderBaseKey)
}
