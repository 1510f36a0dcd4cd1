package workers

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A worker's records are the daemon's, with their time, level and attributes; what else it says is a warning.
func TestPassOn(t *testing.T) {
	t.Parallel()
	var said, log bytes.Buffer
	logger := slog.New(slog.NewJSONHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug}))
	logger.Debug("quiet", "lease", 7)
	logger.With("engine", "e").Error("loud", "error", "no memory", "trace_id", "0af7")
	said.WriteString("panic: \xff\n\n" + strings.Repeat("x", 3*maxLine) + "\nlast")

	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	w := &process{device: &device{logger: slog.New(slog.NewTextHandler(&log, nil))}}
	w.cmd = &exec.Cmd{Process: self}
	w.passOn(context.Background(), &said)
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	for i, want := range []string{
		"level=ERROR msg=loud engine=e error=\"no memory\" trace_id=0af7 worker=", `level=WARN msg="worker: panic: ?"`,
	} {
		if !strings.Contains(lines[i], want) {
			t.Errorf("line %d is %q, not %q", i, lines[i], want)
		}
	}
	if w.said != "last" || strings.Contains(log.String(), "quiet") {
		t.Errorf("the last line is %q, of %.2000s", w.said, log.String())
	}
}
