// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"go.mau.fi/whatsmeow/socket"
	"go.mau.fi/whatsmeow/types/events"

	"warren/engine/internal/state"
)

// Reasons of a "disconnected" event.
const (
	reasonRestartRequired = "restart_required"
	reasonNetwork         = "network"
	reasonServer          = "server"
	reasonReplaced        = "replaced"
	reasonTemporaryBan    = "temporary_ban"
	reasonClientOutdated  = "client_outdated"
	reasonQRExpired       = "qr_expired"
	reasonPairingFailed   = "pairing_failed"
	reasonHandlerTimeout  = "handler_timeout"
	reasonFailure         = "failure"
	reasonInternal        = "internal"
	reasonDiskTrouble     = "disk_trouble"
)

// Codes that WhatsApp uses.
const (
	codeLoggedOut       = 401
	codeTemporaryBan    = 402
	codeClientOutdated  = 405
	codeInternalError   = 500
	codeRestartRequired = 515
)

// disconnectedData is the data of a "disconnected" event.
type disconnectedData struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Code    int    `json:"code,omitempty"`
	Until   string `json:"until,omitempty"`
}

// loggedOutData is the data of a "logged_out" event.
type loggedOutData struct {
	Code      int    `json:"code"`
	Message   string `json:"message"`
	OnConnect bool   `json:"on_connect"`
}

// ending says how a generation ends. A session has exactly one: the first.
type ending struct {
	event string // terminal event; empty when the daemon asked for the end
	data  any

	// deleteDevice: WhatsApp has unlinked the device, so its row must not stay.
	deleteDevice bool
	// abrupt: nothing may be acknowledged any more, not even what the daemon answers now.
	abrupt bool
	// drain bounds the wait for the event that is with the daemon.
	drain time.Duration
}

func disconnected(reason string, code int, format string, args ...any) *ending {
	return &ending{
		event: "disconnected", drain: drainAfterDrop,
		data: disconnectedData{Reason: reason, Message: fmt.Sprintf(format, args...), Code: code},
	}
}

func abruptly(end *ending) *ending {
	end.abrupt, end.drain = true, 0
	return end
}

func internalEnding(format string, args ...any) *ending {
	return abruptly(disconnected(reasonInternal, 0, format, args...))
}

// databaseEnding is that of a session whose database fails: nothing that comes can be kept.
func databaseEnding(err error) *ending {
	if state.IsDiskTrouble(err) {
		return abruptly(disconnected(reasonDiskTrouble, 0, "the disk with the session's state takes no writes: %v", err))
	}
	return internalEnding("the database failed: %v", err)
}

func loggedOut(code int, onConnect bool, message string) *ending {
	return &ending{
		event: "logged_out", deleteDevice: true, drain: drainAfterDrop,
		data: loggedOutData{Code: code, Message: message, OnConnect: onConnect},
	}
}

// classifyConnect turns the error of Connect into an ending.
func classifyConnect(err error) *ending {
	var status socket.ErrWithStatusCode
	if errors.As(err, &status) {
		return disconnected(reasonServer, status.StatusCode, "WhatsApp answered the connection with HTTP status %d", status.StatusCode)
	}
	return disconnected(reasonNetwork, 0, "could not connect: %v", err)
}

// classifyEvent turns a whatsmeow event into the ending that it means; nil when the session goes on. serverCode is the 5xx code that whatsmeow saw and kept to itself.
func classifyEvent(evt any, serverCode int, now time.Time) *ending {
	switch evt := evt.(type) {
	case *events.ManualLoginReconnect:
		return disconnected(reasonRestartRequired, codeRestartRequired, "paired: WhatsApp wants a new connection")
	case *events.Disconnected:
		if serverCode != 0 {
			return serverEnding(serverCode)
		}
		return disconnected(reasonNetwork, 0, "the connection was lost")
	case *events.LoggedOut:
		if !evt.OnConnect {
			return loggedOut(codeLoggedOut, false, "the device was unlinked on the phone")
		}
		return loggedOut(int(evt.Reason), true, evt.Reason.String())
	case *events.StreamReplaced:
		return disconnected(reasonReplaced, 0, "this device is connected elsewhere")
	case *events.TemporaryBan:
		return temporaryBan(evt, now)
	case *events.ClientOutdated:
		return disconnected(reasonClientOutdated, codeClientOutdated, "WhatsApp no longer accepts this version of the client")
	case *events.ConnectFailure:
		if evt.Reason >= codeInternalError {
			return serverEnding(int(evt.Reason))
		}
		return disconnected(reasonFailure, int(evt.Reason), "WhatsApp refused the login: %s", evt.Reason)
	case *events.CATRefreshError:
		return disconnected(reasonFailure, 0, "WhatsApp asked for a token that this kind of client does not have")
	case *events.StreamError:
		code, _ := strconv.Atoi(evt.Code)
		return serverEnding(code)
	case *events.PairError:
		return disconnected(reasonPairingFailed, 0, "pairing failed: %v", evt.Error)
	case *events.PairPasskeyRequest, *events.PairPasskeyConfirmation, *events.PairPasskeyError:
		return disconnected(reasonPairingFailed, 0, "this account needs a passkey to link a device, which is not supported")
	}
	return nil
}

func serverEnding(code int) *ending {
	return disconnected(reasonServer, code, "WhatsApp ended the connection (code %d)", code)
}

func temporaryBan(evt *events.TemporaryBan, now time.Time) *ending {
	end := disconnected(reasonTemporaryBan, codeTemporaryBan, "the account is banned for a while: %s", evt.Code)
	if evt.Expire > 0 {
		data := end.data.(disconnectedData)
		data.Until = rfc3339(now.Add(evt.Expire).Truncate(time.Second))
		end.data = data
	}
	return end
}
