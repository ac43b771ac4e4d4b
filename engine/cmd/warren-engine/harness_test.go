// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const patience = 15 * time.Second

var binaries string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "warren-engine-test")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		// WARREN_TEST_BUILD=-race looks for races in the programs themselves.
		arguments := append([]string{"build", "-o", dir}, strings.Fields(os.Getenv("WARREN_TEST_BUILD"))...)
		build := exec.Command("go", append(arguments, ".", "../warren-sim")...)
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
			return 1
		}
		binaries = dir
		return m.Run()
	}())
}

// simulator is a running warren-sim.
type simulator struct {
	Endpoint string `json:"endpoint"`
	Control  string `json:"control"`
	RootKey  string `json:"root_key"`
	CAFile   string `json:"ca_file"`
}

func startSimulator(t testing.TB) *simulator {
	t.Helper()
	command := exec.Command(filepath.Join(binaries, "warren-sim"), strings.Fields(os.Getenv("WARREN_TEST_SIM"))...)
	stdin, err1 := command.StdinPipe()
	stdout, err2 := command.StdoutPipe()
	command.Stderr = os.Stderr
	if err := errors.Join(err1, err2, command.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = command.Wait()
	})
	sim := &simulator{}
	if err := json.NewDecoder(stdout).Decode(sim); err != nil {
		t.Fatal(err)
	}
	return sim
}

// call makes one control request and decodes its answer into a map.
func (s *simulator) call(t testing.TB, method, path string, body any) map[string]any {
	t.Helper()
	encoded, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	request, err := http.NewRequest(method, s.Control+path, bytes.NewReader(encoded))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	if response.StatusCode >= 300 {
		t.Fatalf("%s %s: %d %s", method, path, response.StatusCode, text)
	}
	result := map[string]any{}
	if err := json.Unmarshal(text, &result); err != nil {
		t.Fatalf("%s %s: %s", method, path, text)
	}
	return result
}

func (s *simulator) phone(t testing.TB, number string) {
	t.Helper()
	s.call(t, "POST", "/phones", map[string]any{"number": number, "name": "Phone " + number})
}

func (s *simulator) sendTo(t testing.TB, from, to, text string, count int) []string {
	t.Helper()
	result := s.call(t, "POST", "/phones/"+from+"/send", map[string]any{"to": to, "text": text, "count": count})
	var ids []string
	for _, id := range result["message_ids"].([]any) {
		ids = append(ids, id.(string))
	}
	return ids
}

func (s *simulator) pending(t testing.TB, number string) int {
	t.Helper()
	total := 0
	for _, device := range s.call(t, "GET", "/phones/"+number+"/pending", nil)["devices"].([]any) {
		total += int(device.(map[string]any)["pending"].(float64))
	}
	return total
}

// shown returns the texts that a person sees on a phone.
func (s *simulator) shown(t testing.TB, number, from string) (texts []string) {
	t.Helper()
	for _, entry := range s.call(t, "GET", "/phones/"+number+"/received?from="+from, nil)["shown"].([]any) {
		texts = append(texts, entry.(map[string]any)["text"].(string))
	}
	return texts
}

// frame is any frame of the engine.
type frame struct {
	Re         int64          `json:"re"`
	OK         bool           `json:"ok"`
	Result     map[string]any `json:"result"`
	Error      map[string]any `json:"error"`
	Event      string         `json:"event"`
	Session    string         `json:"session"`
	Generation int64          `json:"generation"`
	ID         int64          `json:"id"`
	Data       map[string]any `json:"data"`
}

func (f frame) text(key string) string {
	value, _ := f.Data[key].(string)
	return value
}

// policy decides what the test's daemon answers: nil means nothing.
type policy func(frame) *bool

func yes(frame) *bool { ok := true; return &ok }
func no(frame) *bool  { ok := false; return &ok }
func silent(frame) *bool {
	return nil
}

// daemon is the test's end of the pipe of one engine process.
type daemon struct {
	t       testing.TB
	command *exec.Cmd
	conn    net.Conn
	stderr  *lockedBuffer

	mu      sync.Mutex
	changed *sync.Cond
	policy  policy
	frames  []frame
	nextID  int64
	eof     bool
	waited  chan struct{}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func startEngine(t testing.TB, sim *simulator, extra ...string) *daemon {
	t.Helper()
	arguments := append([]string{"--endpoint", sim.Endpoint, "--root-key", sim.RootKey, "--ca-file", sim.CAFile}, extra...)
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	_ = ours.Close()
	d := &daemon{t: t, conn: conn, stderr: &lockedBuffer{}, policy: yes, waited: make(chan struct{})}
	d.changed = sync.NewCond(&d.mu)
	d.command = exec.Command(filepath.Join(binaries, "warren-engine"), arguments...)
	d.command.ExtraFiles = []*os.File{theirs}
	d.command.Stderr = d.stderr
	if err := d.command.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirs.Close()
	go d.read()
	go func() {
		_ = d.command.Wait()
		close(d.waited)
	}()
	t.Cleanup(func() {
		d.kill()
		if t.Failed() {
			t.Logf("log of the engine:\n%s", d.stderr.String())
		}
	})
	d.wait("hello", func(f frame) bool { return f.Event == "hello" })
	return d
}

func (d *daemon) read() {
	lines := bufio.NewReaderSize(d.conn, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			d.mu.Lock()
			d.eof = true
			d.changed.Broadcast()
			d.mu.Unlock()
			return
		}
		var f frame
		if err := json.Unmarshal(line, &f); err != nil {
			d.t.Errorf("no frame: %q", line)
			continue
		}
		d.mu.Lock()
		d.frames = append(d.frames, f)
		policy := d.policy
		d.changed.Broadcast()
		d.mu.Unlock()
		if f.Event != "" && f.ID != 0 {
			if ok := policy(f); ok != nil {
				d.answer(f, *ok)
			}
		}
	}
}

func (d *daemon) answer(f frame, ok bool) {
	d.write(map[string]any{"answer": f.ID, "session": f.Session, "generation": f.Generation, "ok": ok})
}

func (d *daemon) write(value any) {
	line, err := json.Marshal(value)
	if err != nil {
		d.t.Error(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	_, _ = d.conn.Write(append(line, '\n'))
}

func (d *daemon) setPolicy(p policy) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.policy = p
}

// wait returns the first frame that matches.
func (d *daemon) wait(what string, match func(frame) bool) frame {
	d.t.Helper()
	deadline := time.AfterFunc(patience, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.changed.Broadcast()
	})
	defer deadline.Stop()
	end := time.Now().Add(patience)
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		if i := slices.IndexFunc(d.frames, match); i >= 0 {
			return d.frames[i]
		}
		if d.eof || !time.Now().Before(end) {
			var got []string
			for _, f := range d.frames {
				got = append(got, fmt.Sprintf("%s%v %s/%d %v%v", f.Event, f.Re, f.Session, f.Generation, f.Data, f.Error))
			}
			d.t.Fatalf("no %s (eof %v); frames:\n%s\nlog:\n%s", what, d.eof, strings.Join(got, "\n"), d.stderr.String())
		}
		d.changed.Wait()
	}
}

func (d *daemon) event(session string, generation int64, name string) frame {
	d.t.Helper()
	return d.wait(fmt.Sprintf("%s of %s/%d", name, session, generation), func(f frame) bool {
		return f.Event == name && f.Session == session && f.Generation == generation
	})
}

// all returns the frames that match, so far.
func (d *daemon) all(match func(frame) bool) []frame {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []frame
	for _, f := range d.frames {
		if match(f) {
			list = append(list, f)
		}
	}
	return list
}

func messagesOf(session string) func(frame) bool {
	return func(f frame) bool { return f.Event == "message" && f.Session == session }
}

// start sends a request and returns its id.
func (d *daemon) start(op, session string, generation int64, arguments map[string]any) int64 {
	d.mu.Lock()
	d.nextID++
	id := d.nextID
	d.mu.Unlock()
	request := map[string]any{"op": op, "id": id, "session": session, "generation": generation}
	for key, value := range arguments {
		request[key] = value
	}
	d.write(request)
	return id
}

func (d *daemon) response(id int64) frame {
	d.t.Helper()
	return d.wait(fmt.Sprintf("response to %d", id), func(f frame) bool { return f.Re == id })
}

func (d *daemon) request(op, session string, generation int64, arguments map[string]any) frame {
	d.t.Helper()
	return d.response(d.start(op, session, generation, arguments))
}

func (d *daemon) must(op, session string, generation int64, arguments map[string]any) map[string]any {
	d.t.Helper()
	response := d.request(op, session, generation, arguments)
	if !response.OK {
		d.t.Fatalf("%s: %v", op, response.Error)
	}
	return response.Result
}

func (d *daemon) refused(code, op, session string, generation int64, arguments map[string]any) {
	d.t.Helper()
	response := d.request(op, session, generation, arguments)
	if response.OK || response.Error["code"] != code {
		d.t.Fatalf("%s: got %v %v instead of %s", op, response.Result, response.Error, code)
	}
}

func (d *daemon) open(session string, generation int64, dir string, create bool) map[string]any {
	d.t.Helper()
	return d.must("open", session, generation, map[string]any{"dir": dir, "create": create, "device_name": "warren test"})
}

func (d *daemon) online(session string, generation int64, dir string) {
	d.t.Helper()
	d.open(session, generation, dir, false)
	d.event(session, generation, "connected")
}

// pair links a new session to the phone with this number; it is online in generation 2.
func (d *daemon) pair(sim *simulator, session, number string) (dir string) {
	d.t.Helper()
	dir = d.t.TempDir()
	if result := d.open(session, 1, dir, true); result["paired"] != false {
		d.t.Fatalf("a new session is paired: %v", result)
	}
	qr := d.event(session, 1, "qr")
	sim.call(d.t, "POST", "/phones/"+number+"/scan", map[string]any{"qr": qr.text("code")})
	end := d.event(session, 1, "disconnected")
	if end.text("reason") != "restart_required" {
		d.t.Fatalf("after pairing: %v", end.Data)
	}
	d.event(session, 1, "paired")
	d.online(session, 2, dir)
	return dir
}

func (d *daemon) send(session string, generation int64, id, to, text string) frame {
	d.t.Helper()
	return d.request("send", session, generation, map[string]any{"message_id": id, "to": to, "text": text, "timeout_ms": 10000})
}

func (d *daemon) kill() {
	_ = d.command.Process.Kill()
	<-d.waited
	_ = d.conn.Close()
}

// exit waits for the process and returns its status.
func (d *daemon) exit() int {
	d.t.Helper()
	select {
	case <-d.waited:
		return d.command.ProcessState.ExitCode()
	case <-time.After(patience):
		d.t.Fatalf("the engine does not exit; log:\n%s", d.stderr.String())
		return -1
	}
}

// eventually waits for a condition of the simulator.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if condition() {
			return
		}
	}
	t.Fatalf("not reached: %s", what)
}
