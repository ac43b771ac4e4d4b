package main

import (
	"bufio"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// beMain makes the test binary run the program itself.
const beMain = "WARREN_SIM_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(beMain) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), beMain+"=1")
	cmd.Stderr = os.Stderr
	return cmd
}

type ready struct {
	Endpoint, Control string
	RootKey           string `json:"root_key"`
	CAFile            string `json:"ca_file"`
}

// start runs the program until it is ready.
func start(t *testing.T, args ...string) (*exec.Cmd, io.WriteCloser, ready, *bufio.Reader) {
	t.Helper()
	cmd := command(t, args...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(stdout)
	line, err := reader.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	var r ready
	if err := json.Unmarshal(line, &r); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return cmd, stdin, r, reader
}

// ends checks that the program prints nothing more and exits with 0.
func ends(t *testing.T, cmd *exec.Cmd, stdout io.Reader) {
	t.Helper()
	watchdog := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
	defer watchdog.Stop()
	if rest, err := io.ReadAll(stdout); err != nil || len(rest) > 0 {
		t.Errorf("stdout after the first line: %q %v", rest, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestEndOfStandardInputStops(t *testing.T) {
	cmd, stdin, r, stdout := start(t)
	if !strings.HasPrefix(r.Endpoint, "wss://127.0.0.1:") || len(r.RootKey) != 64 {
		t.Fatalf("%+v", r)
	}
	data, err := os.ReadFile(r.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	if block, _ := pem.Decode(data); block == nil || block.Type != "CERTIFICATE" {
		t.Fatalf("%s", data)
	}
	response, err := http.Get(r.Control + "/stats")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Fatal(response.Status)
	}
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	ends(t, cmd, stdout)
	if _, err := os.Stat(r.CAFile); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the temporary CA file is left: %v", err)
	}
}

func TestSignalStops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.pem")
	for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		cmd, _, r, stdout := start(t, "--ca-file", path)
		if r.CAFile != path {
			t.Fatalf("%+v", r)
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		ends(t, cmd, stdout)
		if _, err := os.Stat(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOnlyLoopback(t *testing.T) {
	for _, args := range [][]string{
		{"--listen", "0.0.0.0:0"}, {"--control", ":0"}, {"--listen", "192.0.2.1:0"}, {"--log-level", "loud"}, {"--seed", "x"}, {"surplus"},
	} {
		cmd := command(t, args...)
		cmd.Stderr = nil
		out, err := cmd.Output()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || len(out) > 0 {
			t.Errorf("%v: %v, stdout %q", args, err, out)
		}
	}
}

func TestSeedFixesTheRootKey(t *testing.T) {
	keys := map[string]bool{}
	for _, seed := range []string{"7", "7", "8"} {
		cmd, stdin, r, stdout := start(t, "--seed", seed)
		keys[r.RootKey] = true
		if err := stdin.Close(); err != nil {
			t.Fatal(err)
		}
		ends(t, cmd, stdout)
	}
	if len(keys) != 2 {
		t.Fatalf("two seeds gave %d root keys", len(keys))
	}
}
