//go:build linux && cgo && cuda

package main

import (
	"bytes"
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu"
)

// workers are the process ids of those that have leases, by their sockets.
func (d *daemon) workers() (pids []int) {
	d.t.Helper()
	sockets, err := filepath.Glob(d.path + ".*")
	if err != nil {
		d.t.Fatal(err)
	}
	for _, socket := range sockets {
		if pid, err := strconv.Atoi(strings.TrimPrefix(socket, d.path+".")); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// BenchmarkWorkerStart tells how long an engine waits for a lease, on a worker that is started for it and on a
// spare. Run it a few times (-test.benchtime 3x): a spare needs seconds in between.
func BenchmarkWorkerStart(b *testing.B) {
	for name, spares := range map[string]string{"cold": "0", "spare": "1"} {
		b.Run(name, func(b *testing.B) {
			c := start(b, "--spares", spares).dial()
			told, err := c.Capabilities(b.Context(), nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Logf("%s: MPS %v, unusable %q", told.GetDevices()[0].GetName(), told.GetDevices()[0].GetMps(), told.GetDevices()[0].GetUnusable())
			for b.Loop() {
				s, err := c.Open(b.Context(), client.OpenOptions{Geometry: client.Geometry{
					Layers: 2, QueryHeads: 8, KVHeads: 2, KDim: 64, Query: client.F16,
				}, Config: twiConfig})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Close(); err != nil {
					b.Error(err)
				}
				time.Sleep(3 * time.Second) // in which a spare starts
				b.StartTimer()
			}
		})
	}
}

// TestWorkerKilled kills a worker: its memory is back, its engine goes on, and another lease gives the same
// bits all along.
func TestWorkerKilled(t *testing.T) {
	d := start(t, "--spares", "0")
	c := d.dial()
	l := lends(t, gpu.CUDAIPC, 0)
	neighbour := newSmall(t, c, l)
	want := neighbour.decode()
	others := d.workers()
	for range 3 {
		free := func() int {
			t.Helper()
			n, err := l.Free()
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		before := free()
		s := newSmall(t, c, l)
		if !bytes.Equal(s.decode(), want) {
			t.Error("two leases' bits differ")
		}
		engines := s.memory.Size() + s.room.Size()
		with := free()
		var victim int
		for _, pid := range d.workers() {
			if !slices.Contains(others, pid) {
				victim = pid
			}
		}
		killed := time.Now()
		if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// The engine, too, takes something that it did not have before.
		const slack = 64 << 20
		most := free()
		for ; most < before-engines-slack; most = max(most, free()) {
			if time.Since(killed) > time.Second {
				t.Fatalf("%d bytes are free after a second, %d before the lease, whose engine has %d", most, before, engines)
			}
		}
		back := time.Since(killed)
		if !bytes.Equal(neighbour.decode(), want) {
			t.Error("the neighbour's bits differ after the kill")
		}
		for state, _ := s.session.State(); state == client.StateLive; state, _ = s.session.State() {
			time.Sleep(time.Millisecond)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		err := s.session.WaitLive(ctx)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		again := time.Since(killed)
		if !bytes.Equal(s.decode(), want) {
			t.Error("the new lease's bits differ")
		}
		if !bytes.Equal(neighbour.decode(), want) {
			t.Error("the neighbour's bits differ beside the new lease")
		}
		t.Logf("worker killed: of its %d MiB all but %d were back after %v, a new lease was there after %v",
			(before-engines-with)>>20, (before-engines-most)>>20, back, again)
		left := d.workers()
		if err := s.session.Close(); err != nil {
			t.Error(err)
		}
		for _, pid := range left {
			for !slices.Contains(others, pid) && syscall.Kill(pid, 0) == nil {
				time.Sleep(time.Millisecond)
			}
		}
	}
}
