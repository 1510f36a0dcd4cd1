package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

const uuid = "GPU-00000000-0000-0000-0000-000000000001"

// lend shares what exports to.
func lend(ctx context.Context, s *client.Session, exports ...client.GPUExport) (*client.Buffer, error) {
	return s.ShareGPU(ctx, client.GPUShare{
		Device: uuid, Size: 4096, Access: client.ReadWrite, Probe: &client.Probe{Offset: 8, Bytes: []byte("probe")},
		Export: func(context.Context) (client.GPUExport, error) {
			if len(exports) == 0 {
				return nil, errors.New("exported once too often")
			}
			export := exports[0]
			exports = exports[1:]
			return export, nil
		},
	})
}

func TestShareGPU(t *testing.T) {
	t.Parallel()
	handle := bytes.Repeat([]byte{7}, 64)
	for name, tc := range map[string]struct {
		export client.GPUExport
		names  func(*twilightv1.RegisterRegion) bool
	}{
		"ipc": {
			client.CUDAIPC{Handle: handle, Offset: 512},
			func(r *twilightv1.RegisterRegion) bool {
				m := r.GetCudaIpc()
				return bytes.Equal(m.GetHandle(), handle) && m.GetOffset() == 512
			},
		},
		"fabric": {
			client.CUDAFabric{Chunks: []client.FabricChunk{{Handle: handle, Size: 1 << 21}, {Handle: handle, Size: 1 << 22}}, Offset: 3},
			func(r *twilightv1.RegisterRegion) bool {
				m := r.GetCudaFabric()
				return len(m.GetChunks()) == 2 && m.GetChunks()[1].GetSize() == 1<<22 && m.GetOffset() == 3 &&
					bytes.Equal(m.GetChunks()[1].GetHandle(), handle)
			},
		},
	} {
		f := newFake(t)
		session := f.open(nil)
		b, err := lend(t.Context(), session, tc.export, tc.export)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if b.Bytes() != nil || b.Size() != 4096 {
			t.Errorf("%s: the buffer has %d bytes here, %d in all", name, len(b.Bytes()), b.Size())
		}
		r := f.requests[0].GetRegisterRegion()
		if r.GetDevice() != uuid || r.GetSize() != 4096 || r.GetProbe().GetOffset() != 8 ||
			r.GetAccess() != twilightv1.Access_ACCESS_READ_WRITE || !tc.names(r) {
			t.Errorf("%s: lent %v", name, r)
		}
		// A cache, tensors and lists may lie in it.
		c, err := session.RegisterCache(t.Context(), spec(b))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		at := client.Location{Buffer: b, Offset: 64}
		_, err = f.step(c, batch(16, 1)).Layer(t.Context(), client.Layer{
			QueryAt: &client.Tensor{Location: at}, Output: &client.Tensor{Location: at},
			ListBuffer: &client.ListBuffer{Lists: at, Counts: at, Capacity: 1},
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		layer := f.requests[len(f.requests)-1].GetLayer()
		if layer.GetQueryTensor().GetAt().GetRegionId() != 1 || layer.GetOutputTensor().GetAt().GetOffset() != 64 ||
			layer.GetListBuffer().GetCounts().GetRegionId() != 1 {
			t.Errorf("%s: sent %v", name, layer)
		}
		before := f.count()
		f.last().broken <- nil
		for f.count() < before+2 { // region and cache
			time.Sleep(time.Millisecond)
		}
		if r := f.requests[before].GetRegisterRegion(); r.GetProbe() != nil || !tc.names(r) {
			t.Errorf("%s: lent again as %v", name, r)
		}
	}
}

// chunks are memory of a file each.
func chunks(t *testing.T, n int, content string) client.CUDAVMM {
	t.Helper()
	export := client.CUDAVMM{Offset: 100}
	for i := range n {
		path := filepath.Join(t.TempDir(), "chunk")
		if err := os.WriteFile(path, fmt.Appendf(nil, "%s %d", content, i), 0o600); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		export.Chunks = append(export.Chunks, client.VMMChunk{FD: fd, Size: 1 << 21})
	}
	return export
}

func TestShareVMM(t *testing.T) {
	t.Parallel()
	const n = fdsock.MaxDescriptors + 1 // two packets
	f := newFake(t)
	if _, err := lend(t.Context(), f.open(nil), chunks(t, n, "first"), chunks(t, 2, "second")); err != nil {
		t.Fatal(err)
	}
	f.last().broken <- nil
	for f.count() < 2 {
		time.Sleep(time.Millisecond)
	}
	for i, want := range []struct {
		content string
		chunks  int
	}{{"first", n}, {"second", 2}} {
		m := f.requests[i].GetRegisterRegion().GetCudaVmm()
		if len(m.GetChunks()) != want.chunks || m.GetOffset() != 100 {
			t.Fatalf("lent %d chunks at %d", len(m.GetChunks()), m.GetOffset())
		}
		for i, chunk := range m.GetChunks() {
			fds, missing := f.inbox.Claim([]fdsock.Token{fdsock.Token(chunk.GetFdToken())})
			if missing >= 0 {
				t.Fatalf("chunk %d was not sent", i)
			}
			got := make([]byte, 100)
			read, err := unix.Pread(fds[0], got, 0)
			if text := fmt.Sprintf("%s %d", want.content, i); err != nil || string(got[:read]) != text {
				t.Errorf("chunk %d is %q (%v), want %q", i, got[:max(read, 0)], err, text)
			}
			unix.Close(fds[0])
		}
	}
}

// What an export brings is the session's to close, whatever becomes of it.
func TestShareVMMCloses(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	session := f.open(nil)
	for name, tc := range map[string]struct {
		spoil func(*client.CUDAVMM)
		code  client.Code // 0: lent
	}{
		"lent":     {func(*client.CUDAVMM) {}, 0},
		"offset":   {func(e *client.CUDAVMM) { e.Offset = -1 }, client.ErrInvalid},
		"too many": {func(e *client.CUDAVMM) { e.Chunks = append(e.Chunks, chunks(t, 100, "x").Chunks...) }, client.ErrUnreachable},
	} {
		reader, writer, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		export := chunks(t, 1, "x")
		fd, err := unix.FcntlInt(writer.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		writer.Close()
		export.Chunks = append(export.Chunks, client.VMMChunk{FD: fd, Size: 1})
		tc.spoil(&export)
		before := f.count()
		if _, err := lend(t.Context(), session, export); tc.code == 0 && err != nil || tc.code != 0 && !errors.Is(err, tc.code) {
			t.Errorf("%s: %v", name, err)
		}
		for _, r := range f.requests[before:] {
			for _, chunk := range r.GetRegisterRegion().GetCudaVmm().GetChunks() {
				fds, _ := f.inbox.Claim([]fdsock.Token{fdsock.Token(chunk.GetFdToken())})
				for _, fd := range fds {
					unix.Close(fd)
				}
			}
		}
		f.inbox.Close() // what was sent and not lent
		f.inbox = f.fds.Open(leaseToken, uint32(os.Getuid()), 100)
		_ = reader.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := reader.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: a descriptor is still open", name)
		}
		reader.Close()
	}
}

func TestShareGPURefuses(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	session := f.open(nil)
	for name, share := range map[string]client.GPUShare{
		"size":   {Device: uuid, Export: func(context.Context) (client.GPUExport, error) { return client.CUDAIPC{}, nil }},
		"export": {Device: uuid, Size: 1},
		"offset": {Device: uuid, Size: 1, Export: func(context.Context) (client.GPUExport, error) {
			return client.CUDAIPC{Offset: -1}, nil
		}},
	} {
		var refused *client.Error
		_, err := session.ShareGPU(t.Context(), share)
		if !errors.As(err, &refused) || refused.Code != client.ErrInvalid || refused.Field != name {
			t.Errorf("%s: %v", name, err)
		}
	}
	var refused *client.Error
	_, err := session.ShareGPU(t.Context(), client.GPUShare{
		Device: uuid, Size: 1, Export: func(context.Context) (client.GPUExport, error) { return nil, nil },
	})
	if !errors.As(err, &refused) || refused.Field != "export" {
		t.Errorf("an export of nothing: %v", err)
	}
	broken := errors.New("the memory is gone")
	_, err = session.ShareGPU(t.Context(), client.GPUShare{
		Device: uuid, Size: 1, Export: func(context.Context) (client.GPUExport, error) { return nil, broken },
	})
	if !errors.Is(err, broken) {
		t.Errorf("the export's error became %v", err)
	}
	if f.count() != 0 {
		t.Errorf("%d requests were sent", f.count())
	}

	// A daemon of the CPU takes none.
	e := newEngine(t, dial(t, serve(t, "").Target()), nil)
	_, err = lend(t.Context(), e.session, client.CUDAIPC{Handle: make([]byte, 64)})
	if !errors.As(err, &refused) || refused.Code != client.ErrUnsupported || refused.Field != "register_region.cuda_ipc" {
		t.Errorf("the host's refusal is %v", err)
	}
}
