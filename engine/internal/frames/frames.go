// SPDX-License-Identifier: GPL-3.0-or-later

// Package frames is the engine's side of docs/engine-protocol.md: one JSON object per line, both ways, at most MaxFrame bytes.
package frames

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

// MaxFrame is the size of the longest frame, its newline included.
const MaxFrame = 1 << 20

// Version of the protocol, announced in the hello frame.
const Version = 1

var (
	// ErrTooLong and ErrMalformed mean that the two sides no longer agree: there is no way to go on.
	ErrTooLong   = errors.New("frame longer than 1 MiB")
	ErrMalformed = errors.New("malformed frame")
)

// Error codes of responses.
const (
	CodeAlreadyOpen          = "already_open"
	CodeBadRequest           = "bad_request"
	CodeBusy                 = "busy"
	CodeDisconnected         = "disconnected"
	CodeDiskTrouble          = "disk_trouble"
	CodeInternal             = "internal"
	CodeInvalidRecipient     = "invalid_recipient"
	CodeNotConnected         = "not_connected"
	CodeNotOpen              = "not_open"
	CodePathExists           = "path_exists"
	CodeRateLimited          = "rate_limited"
	CodeRecipientNotFound    = "recipient_not_found"
	CodeRecipientUnreachable = "recipient_unreachable"
	CodeRejected             = "rejected"
	CodeRestricted           = "restricted"
	CodeStateLocked          = "state_locked"
	CodeStateMissing         = "state_missing"
	CodeStateUnreadable      = "state_unreadable"
	CodeTimeout              = "timeout"
	CodeTooManySessions      = "too_many_sessions"
)

// Request asks the engine for something; it is answered by exactly one Response.
type Request struct {
	Op         string `json:"op"`
	ID         int64  `json:"id"`
	Session    string `json:"session"`
	Generation int64  `json:"generation"`

	Dir         string `json:"dir"`
	Create      bool   `json:"create"`
	DeviceName  string `json:"device_name"`
	PhoneNumber string `json:"phone_number"`
	MarkOnline  bool   `json:"mark_online"`
	Proxy       string `json:"proxy"` // may hold a password: never logged

	MessageID string `json:"message_id"`
	To        string `json:"to"` // of a message; of a snapshot the path
	Text      string `json:"text"`
	TimeoutMS int64  `json:"timeout_ms"`
}

// Answer settles one event that waits for it.
type Answer struct {
	ID         int64
	Session    string
	Generation int64
	OK         bool
}

// Inbound is one frame from the daemon. Exactly one field is set.
type Inbound struct {
	Request *Request
	Answer  *Answer
}

// Error is the failure part of a Response.
type Error struct {
	Code       string `json:"code"`
	Message    string `json:"message"`
	ServerCode int    `json:"server_code,omitempty"`
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Errorf makes an Error with a formatted message.
func Errorf(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Response answers one Request. Exactly one of Result and Error is set.
type Response struct {
	Re      int64  `json:"re"`
	Session string `json:"session"`
	OK      bool   `json:"ok"`
	Result  any    `json:"result,omitempty"`
	Error   *Error `json:"error,omitempty"`
}

// Reply builds the response to r from a result or an error.
func (r *Request) Reply(result any, err *Error) Response {
	if err != nil {
		return Response{Re: r.ID, Session: r.Session, Error: err}
	}
	if result == nil {
		result = struct{}{}
	}
	return Response{Re: r.ID, Session: r.Session, OK: true, Result: result}
}

// Event tells the daemon something. ID is set when it waits for an answer; Generation when it is about an open session.
type Event struct {
	Event      string `json:"event"`
	Session    string `json:"session"`
	Generation int64  `json:"generation,omitempty"`
	ID         int64  `json:"id,omitempty"`
	Data       any    `json:"data"`
}

// Decode reads one frame of the daemon, without its newline.
func Decode(line []byte) (Inbound, error) {
	if !utf8.Valid(line) {
		return Inbound{}, fmt.Errorf("%w: not UTF-8", ErrMalformed)
	}
	var wire struct {
		Request
		Answer *int64 `json:"answer"`
		OK     *bool  `json:"ok"`
	}
	if err := json.Unmarshal(line, &wire); err != nil {
		return Inbound{}, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	switch {
	case wire.Answer != nil && wire.Op == "":
		if wire.OK == nil {
			return Inbound{}, fmt.Errorf("%w: answer without ok", ErrMalformed)
		}
		return Inbound{Answer: &Answer{ID: *wire.Answer, Session: wire.Session, Generation: wire.Generation, OK: *wire.OK}}, nil
	case wire.Answer == nil && wire.Op != "":
		if wire.ID <= 0 {
			return Inbound{}, fmt.Errorf("%w: request without a positive id", ErrMalformed)
		}
		request := wire.Request
		return Inbound{Request: &request}, nil
	default:
		return Inbound{}, fmt.Errorf("%w: neither a request nor an answer", ErrMalformed)
	}
}

// Encode writes one frame with its newline. ErrTooLong when it does not fit.
func Encode(frame any) ([]byte, error) {
	var buf bytes.Buffer
	encoder := json.NewEncoder(&buf)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(frame); err != nil {
		return nil, fmt.Errorf("encode frame: %w", err)
	}
	if buf.Len() > MaxFrame {
		return nil, ErrTooLong
	}
	return buf.Bytes(), nil
}
