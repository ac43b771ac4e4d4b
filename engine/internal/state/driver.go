// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"database/sql"
	"database/sql/driver"
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

// connector opens connections that tell of each row they write.
type connector struct {
	name string
	hook func(op int, database, table string, row int64) // nil: nobody wants to know
}

func (c connector) Connect(context.Context) (driver.Conn, error) {
	return c.driver().Open(c.name)
}

func (c connector) Driver() driver.Driver { return c.driver() }

func (c connector) driver() *sqlite3.SQLiteDriver {
	if c.hook == nil {
		return &sqlite3.SQLiteDriver{}
	}
	return &sqlite3.SQLiteDriver{ConnectHook: func(conn *sqlite3.SQLiteConn) error {
		conn.RegisterUpdateHook(c.hook)
		return nil
	}}
}

func openDatabase(path, mode string, hook func(op int, database, table string, row int64)) *sql.DB {
	raw := sql.OpenDB(connector{name: fileURI(path) + "?mode=" + mode + "&" + driverOptions, hook: hook})
	// One connection: whatsmeow never waits for itself, and SQLITE_BUSY can only come from outside.
	raw.SetMaxOpenConns(1)
	raw.SetConnMaxLifetime(0)
	return raw
}

// openReadOnly reads a file that nobody changes and that has no journal.
func openReadOnly(path string) (*sql.DB, error) {
	return sql.Open(driverName, fileURI(path)+"?mode=ro&immutable=1")
}
