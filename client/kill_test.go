package client_test

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
)

var kills = flag.Int("kills", 2, "how often each kill is tried")

// The moments at which one side dies.
const (
	idle    = "idle"     // nothing is armed
	armed   = "armed"    // a step is, and has not begun
	waiting = "waiting"  // for the other side, between layers
	midStep = "mid-step" // at any point of running steps
)

var moments = []string{idle, armed, waiting, midStep}

// until brings an engine to a moment.
func (e *armedEngine) until(moment string) (a *client.Armed, err error) {
	if moment == idle {
		return nil, nil
	}
	if a, err = e.arm(); err != nil || moment == armed {
		return a, err
	}
	e.ready(a, 0)
	return a, a.Layer(0).Wait(e.t.Context())
}

// A daemon that dies, whenever and however, ends what waits for it by an error; with its successor the
// engine goes on.
func TestDaemonDies(t *testing.T) {
	const from = 150
	want := bits(t, from, 1)[0]
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		for _, moment := range moments {
			t.Run(fmt.Sprint(sig, " ", moment), func(t *testing.T) {
				for range *kills {
					daemonDies(t, sig, moment, from, want)
				}
			})
		}
	}
}

func daemonDies(t *testing.T, sig syscall.Signal, moment string, from int, want []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tw.sock")
	daemon := process(t, path)
	c, err := client.Dial("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.WaitServing(t.Context()); err != nil {
		t.Fatal(err)
	}
	files := openFiles(t, os.Getpid())
	e := newArmedEngine(t, c, nil)
	e.prefill(from)
	a, err := e.until(moment)
	if err != nil {
		t.Fatal(err)
	}
	kill := func() {
		if err := daemon.Process.Signal(sig); err != nil {
			t.Error(err)
		}
	}
	switch moment {
	case idle, armed:
		kill()
	case waiting:
		time.AfterFunc(2*time.Millisecond, kill)
	case midStep:
		time.AfterFunc(rand.N(2*time.Millisecond), kill)
		for err == nil {
			if _, err = e.replay(a, 1); err == nil {
				if a, err = e.until(waiting); errors.Is(err, client.ErrExhausted) {
					t.Fatal(err)
				}
			}
			if e.length == maxTokens {
				break
			}
		}
	}
	if a != nil && err == nil {
		next := 1
		if moment == armed {
			next = 0
		}
		err = a.Layer(next).Wait(t.Context())
	}
	told := sig == syscall.SIGTERM && (errors.Is(err, client.ErrDraining) || errors.Is(err, client.ErrCancelled))
	if a != nil && !told && !errors.Is(err, client.ErrLeaseLost) {
		t.Errorf("the engine's wait ended by %v", err)
	}
	_ = daemon.Wait()

	process(t, path)
	for state, _ := e.session.State(); state == client.StateLive || state == client.StateDraining; state, _ = e.session.State() {
		time.Sleep(time.Millisecond)
	}
	e.length = from
	e.retry(t, want)
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
	if now := openFiles(t, os.Getpid()); now > files {
		t.Errorf("the engine has %d files open, it had %d", now, files)
	}
}

// enginePath and engineMoment, in the environment, make TestEngineProcess an engine of the daemon at that
// path.
const (
	enginePath   = "TWILIGHT_TEST_ENGINE"
	engineMoment = "TWILIGHT_TEST_MOMENT"
)

// TestEngineProcess is the engine that TestEngineDies kills, in a process of its own.
func TestEngineProcess(t *testing.T) {
	path := os.Getenv(enginePath)
	if path == "" {
		return
	}
	e := newArmedEngine(t, dial(t, "unix://"+path), nil)
	e.prefill(100)
	a, err := e.until(os.Getenv(engineMoment))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("there")
	for os.Getenv(engineMoment) == midStep {
		if _, err := e.replay(a, 1); err != nil {
			t.Fatal(err)
		}
		if e.length == maxTokens {
			e.length = 100
			if a, err = e.cache.Arm(t.Context(), truncated(e, 100), e.how); err != nil {
				t.Fatal(err)
			}
			e.ready(a, 0)
			err = a.Layer(0).Wait(t.Context())
		} else {
			a, err = e.until(waiting)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	select {} // until killed
}

// An engine that is killed, at any moment, costs its neighbours nothing, and the daemon has back all that
// the engine took.
func TestEngineDies(t *testing.T) {
	const from = 150
	path := filepath.Join(t.TempDir(), "tw.sock")
	want := bits(t, from, 1)[0]
	daemon := process(t, path)
	e := newArmedEngine(t, dial(t, "unix://"+path), nil)
	e.prefill(from)
	step := func() {
		t.Helper()
		e.length = from
		e.retry(t, want)
	}
	step()
	files, maps := openFiles(t, daemon.Process.Pid), lentMaps(t, daemon.Process.Pid)
	for _, moment := range moments {
		for range *kills {
			engine, there := engineProcess(t, path, moment)
			there()
			step()
			if n := lentMaps(t, daemon.Process.Pid); n <= maps {
				t.Errorf("%s: the daemon has %d mappings of lent memory, %d without the engine", moment, n, maps)
			}
			time.Sleep(rand.N(3 * time.Millisecond))
			_ = engine.Process.Kill()
			_ = engine.Wait()
			step()
			for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
				nowFiles, nowMaps := openFiles(t, daemon.Process.Pid), lentMaps(t, daemon.Process.Pid)
				if nowFiles <= files && nowMaps <= maps {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s: the daemon has %d files and %d mappings of lent memory, it had %d and %d",
						moment, nowFiles, nowMaps, files, maps)
				}
			}
		}
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

// Engines that arm and never ring, one of them stopped, are no hindrance to one that works.
func TestSilentEngines(t *testing.T) {
	const from, engines = 150, 8
	path := filepath.Join(t.TempDir(), "tw.sock")
	want := bits(t, from, 1)[0]
	process(t, path)
	c := dial(t, "unix://"+path)
	stopped, there := engineProcess(t, path, midStep)
	there()
	stop(t, stopped)
	var silent []*armedEngine
	for i := range engines {
		s := newArmedEngine(t, c, nil)
		s.prefill(50)
		if _, err := s.until(moments[1+i%2]); err != nil {
			t.Fatal(err)
		}
		silent = append(silent, s)
	}
	e := newArmedEngine(t, c, nil)
	e.prefill(from)
	for range 50 {
		e.length = from
		e.retry(t, want)
	}
	var closing sync.WaitGroup
	for _, s := range append(silent, e) {
		closing.Go(func() {
			if err := s.session.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	closing.Wait()
}

// A daemon that hangs makes an engine's wait too long, and nothing worse: once it goes on, so do they.
func TestDaemonHangs(t *testing.T) {
	const from = 150
	want := bits(t, from, 1)[0]
	path := filepath.Join(t.TempDir(), "tw.sock")
	daemon := process(t, path)
	e := newArmedEngine(t, dial(t, "unix://"+path), nil)
	e.prefill(from)
	for range *kills {
		e.how.WaitTimeout = 50 * time.Millisecond
		e.length = from
		a, err := e.cache.Arm(t.Context(), truncated(e, from), e.how)
		if err != nil {
			t.Fatal(err)
		}
		stop(t, daemon)
		if _, err := e.replay(a, 0); !errors.Is(err, client.ErrDeadline) {
			t.Errorf("the wait for a daemon that hangs: %v", err)
		}
		if err := daemon.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		e.how.WaitTimeout, e.length = 20*time.Second, from
		e.retry(t, want)
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

// stop stops a process, and returns once it runs no more.
func stop(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("not stopped: %v, %v", status, err)
	}
}

// engineProcess starts an engine; there waits until it has come to its moment.
func engineProcess(t *testing.T, path, moment string) (engine *exec.Cmd, there func()) {
	t.Helper()
	engine = exec.Command(os.Args[0], "-test.run=^TestEngineProcess$")
	engine.Env = append(os.Environ(), enginePath+"="+path, engineMoment+"="+moment)
	output, err := engine.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := engine.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = engine.Process.Kill(); _ = engine.Wait() })
	return engine, func() {
		t.Helper()
		var said bytes.Buffer
		for lines := bufio.NewScanner(output); lines.Scan(); said.WriteString(lines.Text() + "\n") {
			if lines.Text() == "there" {
				return
			}
		}
		t.Fatalf("the engine ended: %s", &said)
	}
}

func openFiles(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// lentMaps counts a process's mappings of shared memory that engines made.
func lentMaps(t *testing.T, pid int) int {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(maps), "memfd:twilight ")
}
