// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"

	"go.mau.fi/whatsmeow/proto/waCompanionReg"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"

	"warren/engine/internal/waversion"
)

// TestParallelPairingsKeepTheirNames asks for registrations side by side: whatsmeow keeps one name for the whole process.
func TestParallelPairingsKeepTheirNames(t *testing.T) {
	before := store.DeviceProps.GetOs()
	var pairings sync.WaitGroup
	for i := range 8 {
		s, _ := newSession(t, quick())
		s.DeviceName = fmt.Sprint("name ", i)
		pairings.Add(1)
		go func() {
			defer pairings.Done()
			for range 50 {
				props := &waCompanionReg.DeviceProps{}
				if err := proto.Unmarshal(s.cli.GetClientPayload().GetDevicePairingData().GetDeviceProps(), props); err != nil || props.GetOs() != s.DeviceName {
					t.Errorf("%q pairs as %q (%v)", s.DeviceName, props.GetOs(), err)
				}
			}
		}()
	}
	pairings.Wait()
	if store.DeviceProps.GetOs() != before {
		t.Error("the name of the process was changed")
	}
}

type servedVersion string

func (v servedVersion) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(`{"client_revision":` + string(v) + `,`))}, nil
}

func TestARefusedVersionIsReported(t *testing.T) {
	s, _ := newSession(t, quick())
	keeper := waversion.New(waversion.Options{HTTP: &http.Client{Transport: servedVersion("2999999999")}, Log: slog.New(slog.DiscardHandler)})
	s.cfg.WAVersion = keeper
	keeper.BeforeOpen(t.Context())
	if version, _ := keeper.Current(); version != s.version {
		t.Fatalf("%s before anything was refused", version)
	}
	s.handle(&events.ClientOutdated{})
	keeper.BeforeOpen(t.Context())
	if version, _ := keeper.Current(); version.String() != "2.3000.2999999999" {
		t.Errorf("%s after a refusal", version)
	}
	if claimed := s.cli.GetClientPayload().GetUserAgent().GetAppVersion().GetTertiary(); claimed != s.version[2] {
		t.Errorf("claims %d", claimed)
	}
}

func TestOwnAddressesInAGroup(t *testing.T) {
	s, _ := newSession(t, quick())
	pairDevice(t, s)
	group := types.NewJID("120363000000000000", types.GroupServer)
	isRecipient := s.isRecipient(group, group)
	for text, want := range map[string]bool{"15550001@s.whatsapp.net": false, "15550001:3@s.whatsapp.net": false, "900001@lid": false, "900002:1@lid": true} {
		jid, err := types.ParseJID(text)
		if err != nil || isRecipient(jid) != want {
			t.Errorf("%s: %v", text, isRecipient(jid))
		}
	}
	self := types.GroupParticipant{JID: types.NewJID("900001", types.HiddenUserServer)}
	friend := types.GroupParticipant{JID: types.NewJID("900002", types.HiddenUserServer)}
	if !s.onlyOwn([]types.GroupParticipant{self}) || s.onlyOwn([]types.GroupParticipant{self, friend}) {
		t.Error("who else is there")
	}
	if s.aloneIn(types.NewJID("15550002", types.DefaultUserServer)) || s.aloneIn(group) { // there is no connection to ask over
		t.Error("alone")
	}
}
