// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/mattn/go-sqlite3"
)

// ErrDisk means that the disk, or the machine, cannot do what is asked just now. It says nothing about the state that is on it.
var ErrDisk = errors.New("the disk takes no reads or writes")

// What the system says when something is wrong with the machine and not with a file.
var machineTrouble = []error{
	syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EFBIG,
}

// IsDiskTrouble reports whether an error of files or of SQLite comes from the machine: a full or read-only disk, no memory or descriptors.
func IsDiskTrouble(err error) bool {
	is := func(err error) bool {
		return slices.ContainsFunc(machineTrouble, func(known error) bool { return errors.Is(err, known) })
	}
	if is(err) {
		return true
	}
	var failed sqlite3.Error
	if !errors.As(err, &failed) {
		return errors.Is(err, ErrDisk)
	}
	switch failed.Code {
	case sqlite3.ErrFull, sqlite3.ErrReadonly, sqlite3.ErrNomem:
		return true
	case sqlite3.ErrIoErr, sqlite3.ErrCantOpen:
		return is(failed.SystemErrno)
	}
	return false
}

// sorted gives an error of a directory the reason that its cause has.
func sorted(err error) error {
	if err != nil && IsDiskTrouble(err) {
		return fmt.Errorf("%w: %w", ErrDisk, err)
	}
	return err
}

// noticed counts what whatsmeow may keep to itself: when a device's keys cannot be stored it leaves the device out of a message.
func (c *container) noticed(err error) error {
	if err != nil && IsDiskTrouble(err) {
		c.troubles.Add(1)
	}
	return err
}

// Troubles counts how often the disk has failed while keys of contacts were written.
func (s *Store) Troubles() int64 { return s.troubles.Load() }
