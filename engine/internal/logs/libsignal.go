// SPDX-License-Identifier: GPL-3.0-or-later

package logs

import (
	"log/slog"

	"go.mau.fi/libsignal/logger"
)

// SetupLibsignal gives libsignal a logger. Its own prints to stdout, and is set up by whoever logs first, without a lock. Call it once, before any session opens.
func SetupLibsignal(log *slog.Logger) {
	var loggable logger.Loggable = libsignal{log.With(KeyModule, "libsignal")}
	logger.Setup(&loggable)
}

// libsignal passes on what went wrong, for --log-level debug: whatsmeow reports the outcome. The rest describes keys.
type libsignal struct{ log *slog.Logger }

func (libsignal) Debug(string, string)             {}
func (libsignal) Info(string, string)              {}
func (l libsignal) Warning(caller, message string) { l.log.Debug(message, "caller", caller) }
func (l libsignal) Error(caller, message string)   { l.log.Debug(message, "caller", caller) }
func (libsignal) Configure(string)                 {}
