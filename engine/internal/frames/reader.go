// SPDX-License-Identifier: GPL-3.0-or-later

package frames

import (
	"bufio"
	"errors"
	"io"
)

// Reader reads the daemon's frames.
type Reader struct {
	buffered *bufio.Reader
}

// NewReader reads frames from r. Its buffer is as large as a frame may be, so that a longer one is noticed without being stored.
func NewReader(r io.Reader) *Reader {
	return &Reader{buffered: bufio.NewReaderSize(r, MaxFrame)}
}

// Next returns the next frame. io.EOF means that the daemon is gone, also in the middle of a line.
func (r *Reader) Next() (Inbound, error) {
	line, err := r.buffered.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return Inbound{}, ErrTooLong
	case err != nil:
		return Inbound{}, err
	}
	return Decode(line[:len(line)-1])
}
