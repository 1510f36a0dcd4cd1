package workers_test

import (
	"testing"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/service/workers"
)

// A lease is served by a worker of its own, at an endpoint of its own, and ends with it.
func TestLease(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	serve(t, dir, workers.Options{Spares: 1})
	e := newEngine(t, dial(t, dir), "GPU-0")
	want := e.mustDecode(200)
	if len(want) != 2*headSize*4 {
		t.Errorf("the output has %d bytes", len(want))
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
	e.until(client.StateClosed)
}
