// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"errors"

	"github.com/mattn/go-sqlite3"
)

// Why this driver: docs/adr/0001-sqlite-driver.md.
const (
	driverName    = "sqlite3"
	driverOptions = "_foreign_keys=on&_journal_mode=WAL&_busy_timeout=5000&_txlock=immediate&_synchronous=FULL"
)

func isDriverError(err error) bool {
	var sqliteError sqlite3.Error
	return errors.As(err, &sqliteError)
}
