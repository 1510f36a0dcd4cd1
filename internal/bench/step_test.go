package bench_test

import (
	"context"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/armed/armedtest"
	"github.com/twilight-sidecar/twilight/internal/bench"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
	"github.com/twilight-sidecar/twilight/kv"
)

// standIn has shared memory in place of a GPU's.
type standIn struct{}

func (standIn) Name() string               { return "stand-in" }
func (standIn) UUID() string               { return "host" }
func (standIn) ReadRate() (float64, error) { return 1e9, nil }

func (standIn) Load(l *bench.StepLayout) (bench.Load, error) {
	fd, err := unix.MemfdCreate("bench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	if err := unix.Ftruncate(fd, int64(l.Bytes)); err != nil {
		return nil, err
	}
	data, err := unix.Mmap(fd, 0, l.Bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	random := rand.New(rand.NewPCG(1, 2))
	values := make([]float32, l.Outputs/kv.F16.Size())
	for i := range values {
		values[i] = float32(random.NormFloat64())
		if i >= l.Queries/kv.F16.Size() {
			values[i] *= 4
		}
	}
	kv.F16.Encode(data, values)
	return &standInLoad{l, fd, data}, nil
}

type standInLoad struct {
	*bench.StepLayout
	fd   int
	data []byte
}

func (l *standInLoad) Lend(ctx context.Context, s *client.Session, offset, size int, access client.Access) (*client.Buffer, error) {
	return s.ShareFD(ctx, client.Share{FD: l.fd, Offset: offset, Size: size, Access: access})
}

func (l *standInLoad) Read(offset int, data []byte) error {
	copy(data, l.data[offset:])
	return nil
}

func (l *standInLoad) Logits(layer, sequence, head int) ([]float32, error) {
	vector := func(at int) []float32 {
		x := make([]float32, l.Dim)
		kv.F16.Decode(x, l.data[at:][:l.Dim*kv.F16.Size()])
		return x
	}
	q := vector(l.Queries + (sequence*l.QueryHeads+head)*l.Dim*kv.F16.Size())
	var logits []float32
	for token := range l.Tokens {
		page := uint64(l.Tables[sequence][token/l.PageSize])
		k := vector(int(l.Cache.KOffset(layer) + page*l.Cache.K.Page + uint64(token%l.PageSize)*l.Cache.K.Token +
			uint64(head*l.KVHeads/l.QueryHeads)*l.Cache.K.Head))
		sum := float32(0)
		for d := range k {
			sum += q[d] * k[d]
		}
		logits = append(logits, sum)
	}
	return logits, nil
}

func (l *standInLoad) Close() error { return unix.Munmap(l.data) }

// serve starts a daemon on the CPU, and dials it.
func serve(t *testing.T) *client.Client {
	t.Helper()
	daemon, err := inprocess.Start(t.Context(), inprocess.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = daemon.Stop(context.Background()) })
	conn, err := client.Dial(daemon.Target())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestStep: what a step's report tells besides times.
func TestStep(t *testing.T) {
	t.Parallel()
	conn := serve(t)
	for _, page := range []int{1, 16} {
		step := bench.Step{QueryHeads: 4, KVHeads: 2, Dim: 32, Batch: 3, Tokens: 512, PageSize: page, Layers: 2}
		r, err := bench.RunStep(t.Context(), conn, standIn{}, bench.StepOptions{
			Step: step, Rounds: 2, Progress: func(string, ...any) {},
			Configs: []bench.Named{{Name: "dense", Config: `{}`}, {Name: "pruned", Config: `{"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.9}}`}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if r.Step != step || len(r.Results) != 2 || r.Rounds != 2 {
			t.Fatalf("reported %+v", r)
		}
		dense, pruned := r.Results[0], r.Results[1]
		const bytes = 2 * 3 * 2 * 512 * 32 * 2 // keys and values of all rows
		if dense.Kept != 512 || dense.ReadBytes != bytes || dense.TrueMass < .9999 || dense.Dense != 6 || dense.Rows != 6 ||
			dense.OutputError != 0 || dense.Speedup.Median != 1 {
			t.Errorf("dense is %+v", dense)
		}
		if !(pruned.Kept > 0 && pruned.Kept < 256) || pruned.Candidates != 512 || pruned.Dense != 0 ||
			!(pruned.TrueMass > .85 && pruned.TrueMass < .99) || !(pruned.WorstTrueMass > .7 && pruned.WorstTrueMass < pruned.TrueMass) ||
			!(pruned.OutputError > .001 && pruned.OutputError < .5) || !(pruned.ReadBytes > 0 && pruned.ReadBytes < bytes) ||
			!(pruned.ShadowPerToken > 0 && pruned.ShadowPerToken < 4*32) {
			t.Errorf("pruned is %+v", pruned)
		}
	}
}

func TestStepRefuses(t *testing.T) {
	t.Parallel()
	good := bench.Step{QueryHeads: 4, KVHeads: 2, Dim: 32, Batch: 3, Tokens: 512, PageSize: 16}
	for name, spoil := range map[string]func(*bench.Step){
		"heads": func(s *bench.Step) { s.KVHeads = 0 }, "batch": func(s *bench.Step) { s.Batch = 0 },
		"tokens": func(s *bench.Step) { s.Tokens = 500 }, "page": func(s *bench.Step) { s.PageSize = 0 },
	} {
		step := good
		spoil(&step)
		if _, err := bench.RunStep(t.Context(), nil, standIn{}, bench.StepOptions{Step: step}); err == nil {
			t.Errorf("%s: %+v was taken", name, step)
		}
	}
}

// streaming is such an engine whose streams run armed steps.
type streaming struct {
	standIn
	load *standInLoad
}

func (e *streaming) Load(l *bench.StepLayout) (bench.Load, error) {
	load, err := e.standIn.Load(l)
	if err == nil {
		e.load = load.(*standInLoad)
	}
	return load, err
}

func (e *streaming) NewStream() (client.Releaser, error) {
	return &armedtest.Stream{At: func(*client.Buffer) []byte { return e.load.data[e.load.Words:] }}, nil
}

// Each way of meeting the daemon runs its steps.
func TestArmed(t *testing.T) {
	t.Parallel()
	conn := serve(t)
	step := bench.Step{QueryHeads: 4, KVHeads: 2, Dim: 32, Batch: 2, Tokens: 512, PageSize: 16, Layers: 3}
	r, err := bench.RunArmed(t.Context(), conn, &streaming{}, bench.ArmedOptions{
		Step: step, Config: bench.Named{Name: "dense", Config: `{}`}, Steps: 5, Progress: func(string, ...any) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.Step != step || r.Steps != 5 || r.Kernels <= 0 || len(r.Ways) != 4 {
		t.Errorf("reported %+v", r)
	}
	for _, way := range r.Ways {
		if way.P99 < way.P50 || way.P50 <= -r.Kernels {
			t.Errorf("%+v", way)
		}
	}
}
