package server

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestMailboxAgainstModel compares the mailbox with a plain list under random puts and settles.
func TestMailboxAgainstModel(t *testing.T) {
	type item struct {
		key      settleKey
		position uint64
	}
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 1))
		var box mailbox
		var model []item
		position := uint64(0)
		for range 400 {
			key := settleKey{class: "message", id: fmt.Sprint(random.IntN(20))}
			if random.IntN(2) == 0 {
				position++
				box.put(Node{Tag: "message"}, key)
				model = append(model, item{key, position})
			} else {
				box.settle(key)
				if i := slices.IndexFunc(model, func(m item) bool { return m.key == key }); i >= 0 {
					model = slices.Delete(model, i, i+1)
				}
			}
			if box.live != len(model) || box.backlog().total != len(model) {
				t.Fatalf("seed %d: %d live, want %d", seed, box.live, len(model))
			}
			from := random.Uint64N(position + 2)
			got, ok := box.next(from)
			i := slices.IndexFunc(model, func(m item) bool { return m.position >= from })
			if ok != (i >= 0) || ok && (got.position != model[i].position || got.key != model[i].key) {
				t.Fatalf("seed %d: next(%d) is %v %v, model %v", seed, from, got, ok, model)
			}
		}
	}
}

func TestKeysAreGivenOutOnce(t *testing.T) {
	var ring keyring
	upload := func(from, to uint32) {
		var keys []OneTimeKey
		for id := from; id <= to; id++ {
			keys = append(keys, OneTimeKey{ID: id})
		}
		ring.upload(keys)
	}
	upload(1, 10)
	upload(5, 12) // the answer to the first upload was lost: the client repeats a part
	seen := map[uint32]bool{}
	warnings := 0
	for range 14 {
		bundle, _, low := ring.take()
		if low {
			warnings++
		}
		if bundle.OneTime == nil {
			continue
		}
		if seen[bundle.OneTime.ID] {
			t.Fatalf("key %d was given out twice", bundle.OneTime.ID)
		}
		seen[bundle.OneTime.ID] = true
	}
	if len(seen) != 12 || warnings != 1 {
		t.Fatalf("%d keys, %d warnings", len(seen), warnings)
	}
	upload(13, 22)
	for range 10 {
		if _, _, low := ring.take(); low {
			warnings++
		}
	}
	if warnings != 2 {
		t.Fatalf("%d warnings after a second supply", warnings)
	}
}

func TestDeviceNumbersAreNotReusedSoon(t *testing.T) {
	account := newAccount("15550001", "100", "")
	last := uint16(0)
	for range maxDeviceID {
		d, err := account.reserve()
		if err != nil || d.ID != last+1 {
			t.Fatalf("%v %v after %d", d, err, last)
		}
		account.add(d)
		last = d.ID
	}
	if _, err := account.reserve(); err == nil {
		t.Fatal("a number too many")
	}
	account.remove(account.Device(7))
	if d, err := account.reserve(); err != nil || d.ID != 7 || d.KeyIndex != maxDeviceID+1 {
		t.Fatalf("%v %v", d, err)
	}
}
