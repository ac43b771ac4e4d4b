package control

import (
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"warren/engine/internal/sim/noise"
	"warren/engine/internal/sim/random"
	"warren/engine/internal/sim/server"
)

var exampleLine = regexp.MustCompile(`(?m)^    \$ curl -s (?:-X (\w+) )?"?(?:\$C|http://127\.0\.0\.1:8089)([^\s"]+)"?(?: -d '([^']*)')?$`)

// TestDocumentedRequests makes every example of docs/simulator.md, and finds one for every request there is. A phone
// without clients refuses many of them; what none may be is unknown or malformed.
func TestDocumentedRequests(t *testing.T) {
	page, err := os.ReadFile("../../../../docs/simulator.md")
	if err != nil {
		t.Fatal(err)
	}
	var source random.Source
	stream := source.Stream("")
	identity, err := noise.NewIdentity(stream.KeyPair(), stream.KeyPair(), stream.KeyPair(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	api := New(server.New(identity, time.Second, source, log), source, log)
	for _, number := range []string{"15550001", "15550002", "15550003"} {
		if _, err := api.AddPhone(number, ""); err != nil {
			t.Fatal(err)
		}
	}
	key := base64.StdEncoding.EncodeToString(make([]byte, 32))
	missing := slices.Clone(api.patterns)
	for _, example := range exampleLine.FindAllStringSubmatch(string(page), -1) {
		method, path, body := example[1], example[2], strings.ReplaceAll(example[3], "2@…", strings.Join([]string{"2@", key, key, key}, ","))
		if method == "" {
			method = http.MethodGet
			if body != "" {
				method = http.MethodPost
			}
		}
		request := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
		_, pattern := api.mux.Handler(request)
		missing = slices.DeleteFunc(missing, func(p string) bool { return p == pattern })
		recorder := httptest.NewRecorder()
		api.ServeHTTP(recorder, request)
		var answer struct{ Error apiError }
		if err := json.Unmarshal(recorder.Body.Bytes(), &answer); err != nil || answer.Error.Code == "not_found" || answer.Error.Code == "bad_request" {
			t.Errorf("%s: %s", example[0], recorder.Body)
		}
	}
	if len(missing) > 0 {
		t.Errorf("without an example in docs/simulator.md: %v", missing)
	}
}
