// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"fmt"
	"sync"
	"testing"

	"go.mau.fi/whatsmeow/proto/waCompanionReg"
	"go.mau.fi/whatsmeow/store"
	"google.golang.org/protobuf/proto"
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
