//go:build linux && cgo && cuda

package cuda

import (
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/engine"
	"github.com/twilight-sidecar/twilight/gpu/gputest"
)

// The engine is this test binary again, in a process of its own: it owns GPU memory and lends it, since
// a process cannot import what it exported.
const engineEnv = "TWILIGHT_TEST_ENGINE"

func TestMain(m *testing.M) {
	// As a worker's supervisor does. The driver has looked at it before this is run.
	const connections = "CUDA_DEVICE_MAX_CONNECTIONS"
	if os.Getenv(connections) == "" {
		err := unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), connections+"=32"))
		fmt.Fprintln(os.Stderr, "exec:", err)
		os.Exit(1)
	}
	if os.Getenv(engineEnv) != "" {
		if err := serveEngine(); err != nil {
			fmt.Fprintln(os.Stderr, "engine:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type engineRequest struct {
	Op     string // alloc, free, write, read, export
	ID     int
	Kind   gpu.RegionKind
	Size   int
	Offset int // of bytes in memory; of memory in its allocation
	Data   []byte
	Replay replayRequest
}

type engineReply struct {
	Status uint32
	Took   time.Duration
	Err    string
	ID     int
	Handle []byte
	Device string
	Offset uint64
	Chunks []uint64 // sizes; their descriptors follow on the other socket
	Data   []byte
}

func serveEngine() error {
	device, err := engine.Open("")
	if err != nil {
		return err
	}
	calls := os.NewFile(3, "calls")
	enc, dec := gob.NewEncoder(calls), gob.NewDecoder(calls)
	all := map[int]*engine.Memory{}
	for next := 1; ; next++ {
		var req engineRequest
		switch err := dec.Decode(&req); {
		case errors.Is(err, io.EOF):
			return nil // the test ended
		case err != nil:
			return err
		}
		reply, fds, err := serveCall(device, all, next, &req)
		if err != nil {
			reply.Err = err.Error()
		}
		if err := enc.Encode(reply); err != nil {
			return err
		}
		for _, fd := range fds {
			err := unix.Sendmsg(4, []byte{0}, unix.UnixRights(fd), nil, 0)
			if err := errors.Join(err, unix.Close(fd)); err != nil {
				return err
			}
		}
	}
}

func serveCall(device *engine.GPU, all map[int]*engine.Memory, next int, req *engineRequest) (reply engineReply, fds []int, err error) {
	m := all[req.ID]
	switch req.Op {
	case "alloc":
		if m, err = device.Alloc(req.Kind, req.Size, req.Offset); err != nil {
			return reply, nil, err
		}
		all[next] = m
		reply.ID = next
		return reply, nil, nil
	case "free":
		delete(all, req.ID)
		return reply, nil, m.Release()
	case "write":
		return reply, nil, m.Write(req.Offset, req.Data)
	case "read":
		reply.Data = make([]byte, req.Size)
		return reply, nil, m.Read(req.Offset, reply.Data)
	case "fill", "replay":
		return serveReplay(device, all, req)
	case "export":
		region, err := m.Export(0, m.Size(), true)
		if err != nil {
			return reply, nil, err
		}
		reply.Offset, reply.Device = region.Offset, region.Device
		for _, chunk := range region.Chunks {
			if chunk.FD < 0 {
				reply.Handle = chunk.Handle
				continue
			}
			fds = append(fds, chunk.FD)
			reply.Chunks = append(reply.Chunks, chunk.Size)
		}
		return reply, fds, nil
	}
	return reply, nil, fmt.Errorf("unknown call %q", req.Op)
}

// engineProcess is the test's end of the engine.
type engineProcess struct {
	cmd *exec.Cmd
	mu  sync.Mutex
	enc *gob.Encoder
	dec *gob.Decoder
	fds *net.UnixConn
}

// startEngine starts the engine that tests share.
var startEngine = sync.OnceValues(spawnEngine)

func spawnEngine() (*engineProcess, error) {
	calls, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), engineEnv+"=1")
	cmd.Stderr = os.Stderr
	theirs := []*os.File{os.NewFile(uintptr(calls[1]), "calls"), os.NewFile(uintptr(fds[1]), "fds")}
	cmd.ExtraFiles = theirs
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for _, f := range theirs {
		f.Close()
	}
	ours := os.NewFile(uintptr(calls[0]), "calls")
	conn, err := net.FileConn(os.NewFile(uintptr(fds[0]), "fds"))
	if err != nil {
		return nil, err
	}
	return &engineProcess{cmd: cmd, enc: gob.NewEncoder(ours), dec: gob.NewDecoder(ours), fds: conn.(*net.UnixConn)}, nil
}

func (e *engineProcess) call(t testing.TB, req *engineRequest) (reply engineReply, fds []int) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.enc.Encode(req); err != nil {
		t.Fatal(err)
	}
	if err := e.dec.Decode(&reply); err != nil {
		t.Fatal(err)
	}
	if reply.Err != "" {
		t.Fatalf("engine: %s: %s", req.Op, reply.Err)
	}
	for range reply.Chunks {
		var data [1]byte
		control := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := e.fds.ReadMsgUnix(data[:], control)
		if err != nil {
			t.Fatal(err)
		}
		messages, err := unix.ParseSocketControlMessage(control[:n])
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd...)
	}
	return reply, fds
}

// lender allocates memory of the engine's that is lent in one of the ways, and starts headroom bytes
// inside its allocation.
type lender struct {
	kind     gpu.RegionKind
	headroom int
	process  *engineProcess // nil: the one that tests share
}

var _ gputest.Memory = lender{}

func (l lender) Alloc(t testing.TB, size int) gputest.Buffer {
	t.Helper()
	process := l.process
	if process == nil {
		var err error
		if process, err = startEngine(); err != nil {
			t.Fatal(err)
		}
	}
	reply, _ := process.call(t, &engineRequest{Op: "alloc", Kind: l.kind, Size: size, Offset: l.headroom})
	if l.process == nil { // others end with their process
		t.Cleanup(func() { process.call(t, &engineRequest{Op: "free", ID: reply.ID}) })
	}
	return &lent{lender: l, engine: process, id: reply.ID}
}

type lent struct {
	lender
	engine *engineProcess
	id     int
}

func (b *lent) Region(t testing.TB, size int, writable bool) *gpu.Region {
	t.Helper()
	reply, fds := b.engine.call(t, &engineRequest{Op: "export", ID: b.id})
	region := &gpu.Region{Kind: b.kind, Size: uint64(size), Writable: writable, Device: reply.Device, Offset: reply.Offset}
	if b.kind == gpu.CUDAIPC {
		region.Chunks = []gpu.Chunk{{FD: -1, Handle: reply.Handle}}
	}
	for i, fd := range fds {
		region.Chunks = append(region.Chunks, gpu.Chunk{FD: fd, Size: reply.Chunks[i]})
	}
	return region
}

// panics is a testing.TB for calls outside of a test's goroutine or that have no way to fail.
type panics struct{ testing.TB }

func (panics) Helper()                   {}
func (panics) Fatal(args ...any)         { panic(fmt.Sprint(args...)) }
func (panics) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }

func (b *lent) Write(offset int, data []byte) {
	if len(data) > 0 {
		b.engine.call(panics{}, &engineRequest{Op: "write", ID: b.id, Offset: offset, Data: data})
	}
}

func (b *lent) Read(offset int, data []byte) {
	if len(data) > 0 {
		reply, _ := b.engine.call(panics{}, &engineRequest{Op: "read", ID: b.id, Offset: offset, Size: len(data)})
		copy(data, reply.Data)
	}
}

// The words of an engine on a GPU. That they lie in order is the engine's stream's doing.

func (b *lent) Store(offset int, v uint32) {
	b.Write(offset, binary.NativeEndian.AppendUint32(nil, v))
}

func (b *lent) Ring(offset int, v uint32) { b.Store(offset, v) }

func (b *lent) Load(offset int) uint32 {
	var word [4]byte
	b.Read(offset, word[:])
	return binary.NativeEndian.Uint32(word[:])
}

func (b *lent) Await(offset int, v uint32, timeout time.Duration) bool {
	return poll(b, offset, v, timeout)
}

// poll waits for a word of which a GPU's stores wake nobody.
func poll(b gputest.Ringer, offset int, v uint32, timeout time.Duration) bool {
	for start := time.Now(); ; runtime.Gosched() {
		if b.Load(offset) == v {
			return true
		}
		if time.Since(start) > timeout {
			return false
		}
	}
}

// mapped is shared memory of the host that a GPU sees.
type mapped struct{ gputest.Memfd }

func (m mapped) Alloc(t testing.TB, size int) gputest.Buffer {
	t.Helper()
	return mappedBuffer{m.Memfd.Alloc(t, size).(ringer)}
}

type ringer interface {
	gputest.Buffer
	gputest.Ringer
}

type mappedBuffer struct{ ringer }

func (b mappedBuffer) Await(offset int, v uint32, timeout time.Duration) bool {
	return poll(b.ringer, offset, v, timeout)
}
