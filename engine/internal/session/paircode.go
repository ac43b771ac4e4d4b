// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"go.mau.fi/whatsmeow"
)

// pairingCodeBound is how long WhatsApp may take to register a code.
const pairingCodeBound = 20 * time.Second

// defaultDisplay is what the phone names while a code is entered; the list of linked devices shows the device name afterwards.
const defaultDisplay = "Chrome (Linux)"

// knownDisplay are the names of the form `Browser (OS)` that WhatsApp does not refuse with 400 (whatsmeow pair-code.go, PairPhone).
var knownDisplay = regexp.MustCompile(`^(Chrome|Edge|Firefox|Opera|Safari) \((Linux|Windows|Mac OS)\)$`)

type pairingCodeData struct {
	Code  string `json:"code"`
	TTLMS int64  `json:"ttl_ms"`
}

// pairingCode is WhatsApp's answer to the wish for a code.
type pairingCode struct {
	code string
	err  error
}

// askForCode has the phone number linked by a code that is typed into the phone. The QR codes are not shown, but end at the same time. Called by the loop only.
func (s *Session) askForCode(qrCodes []string, timer *time.Timer) {
	p := &s.pairing
	if len(p.codes) > 0 || len(qrCodes) == 0 {
		return
	}
	p.codes, p.shown = qrCodes, len(qrCodes)
	lasts := s.cfg.Timing.QRFirst + time.Duration(len(qrCodes)-1)*s.cfg.Timing.QRNext
	s.codesEnd(time.Now().Add(lasts))
	timer.Reset(lasts)
	s.workers.Add(1)
	go s.guarded("pairing code", func() {
		defer s.workers.Done()
		ctx, cancel := context.WithTimeout(s.ctx, pairingCodeBound)
		defer cancel()
		code, err := s.cli.PairPhone(ctx, s.PhoneNumber, true, whatsmeow.PairClientChrome, displayName(s.DeviceName))
		s.post(pairingCode{code, err})
	})
}

// displayName is the device name where WhatsApp takes it.
func displayName(deviceName string) string {
	if knownDisplay.MatchString(deviceName) {
		return deviceName
	}
	return defaultDisplay
}

// showCode reports the code, or why there is none.
func (s *Session) showCode(answer pairingCode) {
	if answer.err == nil {
		s.emit(s.ctx, "pairing_code", pairingCodeData{Code: answer.code, TTLMS: time.Until(s.pairing.expires).Milliseconds()})
		return
	}
	if end := classifyPairingCode(answer.err); end != nil {
		s.finish(end)
	}
}

// classifyPairingCode is nil when the connection has gone: that is reported by itself, with its own reason.
func classifyPairingCode(err error) *ending {
	failed := func(code int, why string) *ending {
		return disconnected(reasonPairingFailed, code, "WhatsApp gave no pairing code: %s", why)
	}
	var iq *whatsmeow.IQError
	var dropped *whatsmeow.DisconnectedError
	switch {
	case errors.Is(err, whatsmeow.ErrPhoneNumberTooShort), errors.Is(err, whatsmeow.ErrPhoneNumberIsNotInternational):
		return failed(0, "the phone number is not in international form")
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, whatsmeow.ErrIQTimedOut):
		return failed(0, "no answer in time")
	case errors.Is(err, context.Canceled), errors.Is(err, whatsmeow.ErrNotConnected), errors.As(err, &dropped):
		return nil
	case errors.As(err, &iq):
		return failed(iq.Code, refusedCode(iq))
	}
	return failed(0, err.Error())
}

func refusedCode(iq *whatsmeow.IQError) string {
	switch iq.Code {
	case codeBadRequest, codeNotFound:
		return fmt.Sprintf("it refused the phone number (code %d)", iq.Code)
	case codeRateLimited:
		return fmt.Sprintf("too many codes were asked for lately; wait before the next (code %d)", iq.Code)
	}
	return fmt.Sprintf("it refused the request (code %d %s)", iq.Code, iq.Text)
}
