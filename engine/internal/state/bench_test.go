// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"testing"

	"go.mau.fi/whatsmeow/store/sqlstore"
)

// BenchmarkPreKeys compares the first login's 812 keys in one transaction with whatsmeow's own way, one transaction each.
func BenchmarkPreKeys(b *testing.B) {
	ctx := context.Background()
	run := func(b *testing.B, own bool) {
		for range b.N {
			b.StopTimer()
			s, _ := paired(b)
			keys := s.Device.PreKeys
			if !own {
				container, _, err := newContainer(s.raw, s.Device.Log)
				if err != nil {
					b.Fatal(err)
				}
				keys = sqlstore.NewSQLStore(container, *s.Device.ID)
			}
			b.StartTimer()
			if _, err := keys.GetOrGenPreKeys(ctx, 812); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			mustClose(b, s)
			b.StartTimer()
		}
	}
	b.Run("one transaction", func(b *testing.B) { run(b, true) })
	b.Run("one each", func(b *testing.B) { run(b, false) })
}
