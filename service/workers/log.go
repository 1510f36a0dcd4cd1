package workers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"slices"
	"time"
)

// maxLine bounds a line of a worker's output.
const maxLine = 64 << 10

// passOn makes records of the daemon's log of a worker's, which are JSON, and of whatever else it says.
func (w *process) passOn(ctx context.Context, output io.Reader) {
	lines := bufio.NewReaderSize(output, maxLine)
	handler := w.device.logger.Handler()
	for {
		line, err := lines.ReadSlice('\n')
		if len(bytes.TrimSpace(line)) > 0 {
			r, ok := record(line)
			if !ok {
				w.mu.Lock()
				w.said = r.Message
				w.mu.Unlock()
				r.Message = "worker: " + r.Message
			}
			r.AddAttrs(slog.Int("worker", w.pid()))
			if handler.Enabled(ctx, r.Level) {
				_ = handler.Handle(ctx, r)
			}
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// record reads a line of a slog.JSONHandler; anything else is a warning.
func record(line []byte) (r slog.Record, ok bool) {
	var head struct {
		Time    time.Time  `json:"time"`
		Level   slog.Level `json:"level"`
		Message string     `json:"msg"`
	}
	var fields map[string]any
	if json.Unmarshal(line, &head) != nil || head.Time.IsZero() || json.Unmarshal(line, &fields) != nil {
		return slog.NewRecord(time.Now(), slog.LevelWarn, string(bytes.ToValidUTF8(bytes.TrimSpace(line), []byte("?"))), 0), false
	}
	r = slog.NewRecord(head.Time, head.Level, head.Message, 0)
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		switch key {
		case slog.TimeKey, slog.LevelKey, slog.MessageKey:
		default:
			r.AddAttrs(slog.Any(key, fields[key]))
		}
	}
	return r, true
}
