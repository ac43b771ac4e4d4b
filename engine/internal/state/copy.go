// SPDX-License-Identifier: GPL-3.0-or-later

package state

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// partSuffix marks a copy that is being written. A file with this name is worth nothing.
const partSuffix = ".part"

// copyOptions: the copy is a new file that nobody else sees, so neither a journal nor a sync in between serves anything. It must not carry WAL in its header:
// then nothing lies beside it.
const copyOptions = "_foreign_keys=off&_journal_mode=OFF&_synchronous=OFF&_busy_timeout=5000&_txlock=deferred"

// A message whose row in the event buffer has no plaintext any more has been handled: the row only recognises it when WhatsApp delivers it again.
const handledEvent = "plaintext IS NULL"

// copyStore writes whatsmeow's tables of the database from into a new file at to: all rows as one moment saw them, without the handled ones of the event buffer,
// without gaps, with mark as its user_version. to appears when it is whole and on disk, or not at all. Writers of from are not held up: SQLite's
// write-ahead log lets them go on beside a reader.
func copyStore(ctx context.Context, from, to string, mark int) (err error) {
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is there already (%w)", to, fs.ErrExist)
	}
	part := to + partSuffix
	if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(part)
		}
	}()
	file, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := fillCopy(ctx, from, part, mark); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	if err := os.Rename(part, to); err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(to))
}

func fillCopy(ctx context.Context, from, to string, mark int) (err error) {
	raw, err := sql.Open(driverName, fileURI(to)+"?mode=rw&"+copyOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, raw.Close()) }()
	conn, err := raw.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, "ATTACH ? AS source", fileURI(from)+"?mode=rw"); err != nil {
		return err
	}
	// Its first reading fixes the moment that all of it is from.
	transaction, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer transaction.Rollback() //nolint:errcheck // after a commit there is nothing to take back
	if err := copyTables(ctx, transaction); err != nil {
		return err
	}
	if _, err := transaction.ExecContext(ctx, fmt.Sprintf("PRAGMA main.user_version=%d", mark)); err != nil {
		return err
	}
	return transaction.Commit()
}

// copyTables makes the tables, fills them, and makes their indexes, as VACUUM does.
func copyTables(ctx context.Context, transaction *sql.Tx) error {
	rows, err := transaction.QueryContext(ctx, `
		SELECT type, name, sql FROM source.sqlite_master
		WHERE tbl_name GLOB 'whatsmeow_*' AND sql IS NOT NULL ORDER BY type = 'table' DESC`)
	if err != nil {
		return err
	}
	defer rows.Close()
	type object struct{ kind, name, sql string }
	var objects []object
	for rows.Next() {
		var o object
		if err := rows.Scan(&o.kind, &o.name, &o.sql); err != nil {
			return err
		}
		objects = append(objects, o)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for _, o := range objects {
		if _, err := transaction.ExecContext(ctx, o.sql); err != nil {
			return fmt.Errorf("%s: %w", o.name, err)
		}
		if o.kind != "table" {
			continue
		}
		if _, err := transaction.ExecContext(ctx, fillStatement(o.name)); err != nil {
			return fmt.Errorf("%s: %w", o.name, err)
		}
	}
	return nil
}

func fillStatement(table string) string {
	quoted := `"` + strings.ReplaceAll(table, `"`, `""`) + `"`
	statement := "INSERT INTO main." + quoted + " SELECT * FROM source." + quoted
	if table == "whatsmeow_event_buffer" {
		statement += " WHERE NOT (" + handledEvent + ")"
	}
	return statement
}

func fileURI(path string) string {
	return "file:" + (&url.URL{Path: path}).EscapedPath()
}
