// SPDX-License-Identifier: GPL-3.0-or-later

package waversion

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"go.mau.fi/whatsmeow/store"
)

// pattern keeps each part within 32 bits.
var pattern = regexp.MustCompile(`^[0-9]{1,4}\.[0-9]{1,5}\.[0-9]{1,9}$|^[0-9]{1,4}\.[0-9]{1,5}\.[1-3][0-9]{9}$`)

// Parse reads a version such as 2.3000.1045649367.
func Parse(text string) (store.WAVersionContainer, error) {
	if !pattern.MatchString(text) {
		return store.WAVersionContainer{}, fmt.Errorf("%.40q is no version of the form 2.3000.1045649367", text)
	}
	version, err := store.ParseVersion(text)
	if err == nil && version.IsZero() {
		err = errors.New("the version is zero")
	}
	return version, err
}

// cached is what outlives the process.
type cached struct {
	version   store.WAVersionContainer
	confirmed time.Time
}

type cacheFile struct {
	Version   string    `json:"version"`
	Confirmed time.Time `json:"confirmed_at"`
}

// readCache returns the zero value when there is no cache yet.
func readCache(path string) (cached, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return cached{}, nil
	} else if err != nil {
		return cached{}, err
	}
	var file cacheFile
	if err := json.Unmarshal(text, &file); err != nil {
		return cached{}, fmt.Errorf("%s: %w", path, err)
	}
	version, err := Parse(file.Version)
	if err != nil {
		return cached{}, fmt.Errorf("%s: %w", path, err)
	}
	if file.Confirmed.After(time.Now()) { // a clock that was set back: when is not known
		file.Confirmed = time.Time{}
	}
	return cached{version, file.Confirmed}, nil
}

// writeCache replaces the file in one step; several engines may share it.
func writeCache(path string, c cached) error {
	text, err := json.Marshal(cacheFile{c.version.String(), c.confirmed.UTC()})
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = file.Write(append(text, '\n'))
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return nil
}
