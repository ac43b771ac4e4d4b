// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"go.mau.fi/whatsmeow"

	"warren/engine/internal/frames"
	"warren/engine/internal/state"
)

// Codes of refused sends.
const (
	codeBadRequest  = 400
	codeRateLimited = 429
	codeRestricted  = 463
	codeForbidden   = 403
	codeNotFound    = 404
)

// classifySend turns an error of whatsmeow into the error of the protocol.
func classifySend(err error) *frames.Error {
	var iq *whatsmeow.IQError
	var dropped *whatsmeow.DisconnectedError
	switch {
	case errors.Is(err, whatsmeow.ErrMessageTimedOut), errors.Is(err, whatsmeow.ErrIQTimedOut), errors.Is(err, context.DeadlineExceeded):
		return frames.Errorf(frames.CodeTimeout, "WhatsApp did not answer in time")
	case errors.Is(err, whatsmeow.ErrNotConnected), errors.Is(err, whatsmeow.ErrNotLoggedIn):
		return frames.Errorf(frames.CodeNotConnected, "the session is not online")
	case errors.As(err, &dropped), errors.Is(err, context.Canceled):
		return frames.Errorf(frames.CodeDisconnected, "the connection was lost before WhatsApp answered")
	case errors.Is(err, whatsmeow.ErrServerReturnedError):
		return refused(ackCode(err), "WhatsApp refused the message")
	case errors.Is(err, whatsmeow.ErrRecipientADJID), errors.Is(err, whatsmeow.ErrUnknownServer):
		return frames.Errorf(frames.CodeInvalidRecipient, "%v", err)
	case errors.Is(err, whatsmeow.ErrGroupNotFound):
		return frames.Errorf(frames.CodeRecipientNotFound, "%v", err)
	case errors.Is(err, whatsmeow.ErrNotInGroup):
		return refused(codeForbidden, "the account is not in this group")
	case errors.As(err, &iq):
		return refused(iq.Code, "WhatsApp refused a query for the message")
	case state.IsDiskTrouble(err):
		return frames.Errorf(frames.CodeDiskTrouble, "the disk with the session's state takes no writes: %v", err)
	}
	// A frame that could not be written: whether it left is not known.
	if strings.Contains(err.Error(), "failed to send message node") {
		return frames.Errorf(frames.CodeDisconnected, "the connection broke while the message was written")
	}
	return frames.Errorf(frames.CodeInternal, "%v", err)
}

func refused(code int, what string) *frames.Error {
	result := frames.Errorf(frames.CodeRejected, "%s (code %d)", what, code)
	switch code {
	case codeRestricted:
		result.Code = frames.CodeRestricted
	case codeRateLimited:
		result.Code = frames.CodeRateLimited
	case codeNotFound:
		result.Code = frames.CodeRecipientNotFound
	}
	result.ServerCode = code
	return result
}

// ackCode reads the code that whatsmeow only puts at the end of the error's text.
func ackCode(err error) int {
	text := err.Error()
	code, _ := strconv.Atoi(text[strings.LastIndexByte(text, ' ')+1:])
	return code
}
