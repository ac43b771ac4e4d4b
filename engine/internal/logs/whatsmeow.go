// SPDX-License-Identifier: GPL-3.0-or-later

package logs

import (
	"fmt"
	"log/slog"
	"strings"

	waBinary "go.mau.fi/whatsmeow/binary"
	waLog "go.mau.fi/whatsmeow/util/log"
)

// Tap sees every stanza of one client: received ones before they are handled, sent ones just before they are written. It must not block.
type Tap interface {
	Received(node *waBinary.Node)
	Sent(node *waBinary.Node)
}

// Whatsmeow returns a logger for one whatsmeow client.
//
// whatsmeow shows its stanzas to nobody but the debug log of its modules "Recv" and "Send": tap gets them from there. Debug lines themselves go no
// further, because they hold whole stanzas, ciphertexts and names.
func Whatsmeow(log *slog.Logger, tap Tap) waLog.Logger {
	return &adapter{log: log, tap: tap}
}

type adapter struct {
	log    *slog.Logger
	tap    Tap
	module string
}

func (a *adapter) Sub(module string) waLog.Logger {
	if a.module != "" {
		module = a.module + "/" + module
	}
	return &adapter{log: a.log.With(KeyModule, module), tap: a.tap, module: module}
}

func (a *adapter) Debugf(_ string, args ...any) {
	if a.tap == nil || len(args) != 1 || (a.module != "Recv" && a.module != "Send") {
		return
	}
	node, ok := args[0].(*waBinary.Node)
	switch {
	case !ok || node == nil:
	case a.module == "Recv":
		a.tap.Received(node)
	default:
		a.tap.Sent(node)
	}
}

func (a *adapter) Infof(msg string, args ...any)  { a.log.Info(a.text(msg, args)) }
func (a *adapter) Warnf(msg string, args ...any)  { a.log.Warn(a.text(msg, args)) }
func (a *adapter) Errorf(msg string, args ...any) { a.log.Error(a.text(msg, args)) }

// text formats a line with every stanza reduced to its tag and the attributes that explain a failure.
func (a *adapter) text(msg string, args []any) string {
	for i, arg := range args {
		switch node := arg.(type) {
		case *waBinary.Node:
			args[i] = summary(node)
		case waBinary.Node:
			args[i] = summary(&node)
		}
	}
	return Redact(fmt.Sprintf(msg, args...))
}

func summary(node *waBinary.Node) string {
	if node == nil {
		return "<nil>"
	}
	var out strings.Builder
	out.WriteString("<" + node.Tag)
	for _, key := range []string{"id", "type", "class", "code", "reason", "error", "expire"} {
		if value, ok := node.Attrs[key]; ok {
			fmt.Fprintf(&out, " %s=%v", key, value)
		}
	}
	out.WriteString(">")
	return out.String()
}
