package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/twilight-sidecar/twilight/telemetry"
)

// admin is a way to the admin listener of a process.
func (p *process) admin() (get func(path string, header ...string) (int, string)) {
	p.t.Helper()
	p.says("admin")
	var record struct{ Network, Address string }
	if err := json.Unmarshal(p.log.Bytes(), &record); err != nil {
		p.t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, record.Network, record.Address)
	}}}
	p.t.Cleanup(client.CloseIdleConnections)
	return func(path string, header ...string) (int, string) {
		p.t.Helper()
		req, err := http.NewRequestWithContext(p.t.Context(), http.MethodGet, "http://localhost"+path, nil)
		if err != nil {
			p.t.Fatal(err)
		}
		for _, h := range header {
			key, value, _ := strings.Cut(h, ": ")
			if key == "Host" {
				req.Host = value
			}
			req.Header.Set(key, value)
		}
		resp, err := client.Do(req)
		if err != nil {
			p.t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			p.t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
}

func TestAdmin(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	for network, url := range map[string]string{"tcp": "tcp://127.0.0.1:0", "unix": "unix://" + filepath.Join(dir, "admin.sock")} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(dir, network+".sock")
			p := launch(t, "--listen", "unix://"+path, "--admin", url, "--drain-timeout", "7s")
			get := p.admin()
			p.says("serving")
			if network == "unix" {
				if info, err := os.Stat(filepath.Join(dir, "admin.sock")); err != nil || info.Mode().Perm() != 0o600 {
					t.Errorf("the socket has mode %v, error %v", info.Mode(), err)
				}
			}
			e := open(t, dial(t, "unix://"+path))
			sampled := step(2)
			sampled.GetStep().Traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
			e.send(sampled)
			e.receive()
			last := layer()
			last.GetLayer().StepId = 2
			e.send(last)
			e.receive()
			for path, want := range map[string]string{
				"/": "<!doctype html>", "/healthz": "ok", "/debug/pprof/cmdline": "--admin", "/debug/pprof/": "goroutine",
			} {
				if code, body := get(path); code != http.StatusOK || !strings.Contains(body, want) {
					t.Errorf("%s: %d %.200s", path, code, body)
				}
			}
			if code, _ := get("/none"); code != http.StatusNotFound {
				t.Errorf("/none: %d", code)
			}
			if code, _ := get("/budgets", "Host: evil.example"); code != http.StatusMisdirectedRequest {
				t.Errorf("another host's name: %d", code)
			}

			code, body := get("/metrics", "Accept: application/openmetrics-text")
			for _, want := range []string{
				`twilight_row_kept_bucket{`, `twilight_layer_index="0"`, `twilight_leases 1.0`, `twilight_draining 0.0`,
				`target_info{`, `service_name="twilightd"`, `go_goroutine_count`, `rpc_server_call_duration_seconds_count{`,
				`twilight_memory_lent_bytes`, "# EOF",
			} {
				if code != http.StatusOK || !strings.Contains(body, want) {
					t.Errorf("/metrics: %d, no %s", code, want)
				}
			}
			var budgets telemetry.Snapshot
			if code, body := get("/budgets?sequence=1"); code != http.StatusOK || json.Unmarshal([]byte(body), &budgets) != nil {
				t.Fatalf("/budgets: %d %s", code, body)
			}
			if len(budgets.Leases) != 1 || len(budgets.Leases[0].Budget) != 1 || budgets.Leases[0].Kept[0][0] != 20 || budgets.Leases[0].Budget[0].Kept != 20 {
				t.Errorf("budgets %+v", budgets)
			}

			p.signal(syscall.SIGTERM)
			e.receive() // Draining
			if code, body := get("/healthz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "draining") {
				t.Errorf("/healthz while draining: %d %s", code, body)
			}
			if _, body := get("/metrics"); !strings.Contains(body, "twilight_draining 1") {
				t.Error("/metrics does not tell of the drain")
			}
			if err := e.stream.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if state := p.exit(); state.ExitCode() != 0 {
				t.Errorf("exit: %v", state)
			}
		})
	}
}
