package replay_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"go.uber.org/goleak"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/armed/armedtest"
	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/internal/replay"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
	"github.com/twilight-sidecar/twilight/testdata"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	full  = `{"skip_first_two_layers": false}`
	quest = `{"selector": {"type": "quest", "token_budget": 512}, "weight_estimator": {"type": "min_max_quant"},
		"weight_pruner": {"type": "top_p", "threshold": 0.9}, "skip_first_two_layers": false}`
)

// daemon serves a test.
func daemon(t *testing.T) *client.Client {
	t.Helper()
	d, err := inprocess.Start(t.Context(), inprocess.Options{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.Dial(d.Target())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(), d.Stop(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return c
}

func smolLM2(t *testing.T) *capture.Capture {
	t.Helper()
	c, err := capture.Decode(testdata.SmolLM2)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// small is one layer of it, and one KV head.
func small(t *testing.T) *capture.Capture {
	t.Helper()
	c, err := capture.Cut(smolLM2(t), []int{17}, []int{1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func run(t *testing.T, c *client.Client, o replay.Options) *replay.Report {
	t.Helper()
	r, err := replay.Run(t.Context(), c, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Attention over all tokens is dense attention, up to what the element types lose.
func TestFullIsDense(t *testing.T) {
	t.Parallel()
	c, whole, part := daemon(t), smolLM2(t), small(t)
	for dtype, most := range map[client.DType]float64{client.F32: 1e-5, client.F16: 1e-3, client.BF16: 2e-2, client.F8E4M3: 2e-1} {
		loaded := whole
		if most > 1e-3 {
			loaded = part
		}
		r := run(t, c, replay.Options{Capture: loaded, Config: full, DType: dtype})
		for _, l := range r.Layers {
			for _, h := range l.Heads {
				if h.RelErr > most || h.WorstTrueMass < 1-1e-12 {
					t.Errorf("%v: layer %d, head %d: error %g, mass %g", dtype, l.Layer, h.Head, h.RelErr, h.WorstTrueMass)
				}
				for step, kept := range h.KeptPerStep {
					if kept != loaded.N+step+1 {
						t.Errorf("%v: layer %d, head %d: kept %d at step %d", dtype, l.Layer, h.Head, kept, step)
					}
				}
			}
		}
		if r.RelErr > most || r.RelErr == 0 || r.Facts.Dense[1] != r.Facts.Rows {
			t.Errorf("%v: error %g; dense rows %v of %d", dtype, r.RelErr, r.Facts.Dense, r.Facts.Rows)
		}
	}
}

// Exact top-p keeps as few tokens as another program found can hold the share.
func TestExactTopPIsMinimal(t *testing.T) {
	t.Parallel()
	c, loaded := daemon(t), smolLM2(t)
	oracle, err := capture.DecodeOracle(testdata.SmolLM2Oracle)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"0.85", "0.95"} {
		config := `{"weight_pruner": {"type": "top_p", "threshold": ` + p + `}, "group": "per_query_head", "skip_first_two_layers": false}`
		r := run(t, c, replay.Options{Capture: loaded, Config: config})
		if !r.Facts.PerQueryHead {
			t.Error("heads shared their lists")
		}
		for _, l := range r.Layers {
			for _, h := range l.Heads {
				for step, kept := range h.KeptPerStep {
					want := oracle.Layers[l.Layer][step][h.Head].Budget[p]
					if want == 0 || kept < want-1 || kept > want+1 {
						t.Errorf("p %s, layer %d, step %d, head %d: kept %d, minimal are %d", p, l.Layer, step, h.Head, kept, want)
					}
				}
			}
		}
	}
}

// Where and how the cache lies in memory changes nothing.
func TestLayoutsAgree(t *testing.T) {
	t.Parallel()
	c, loaded := daemon(t), small(t)
	for _, group := range []string{"union", "per_query_head"} {
		config, err := replay.Overrides{Group: group}.Apply([]byte(quest))
		if err != nil {
			t.Fatal(err)
		}
		var want []byte
		for _, kind := range layout.Kinds() {
			sizes := []int{1, 7, 16, 32, 64}
			if kind == layout.Slots || kind == layout.Contiguous {
				sizes = []int{16} // have their own
			}
			for _, size := range sizes {
				r := run(t, c, replay.Options{
					Capture: loaded, Config: string(config), Layout: kind, PageSize: size, Seed: uint64(size),
				})
				got, err := json.Marshal(r)
				if err != nil {
					t.Fatal(err)
				}
				if want == nil {
					want = got
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%s: %s with pages of %d: %s\nis not %s", group, kind, size, got, want)
				}
			}
		}
	}
}

// keysOf collects the keys of every object in v, by their paths; arrays count as one element.
func keysOf(v any, path string, keys map[string]bool) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			keys[path+key] = true
			keysOf(value, path+key+".", keys)
		}
	case []any:
		for _, value := range v {
			keysOf(value, path, keys)
		}
	}
}

// The report has the keys that its readers know, and no others.
func TestReportJSON(t *testing.T) {
	t.Parallel()
	var told []string
	r := run(t, daemon(t), replay.Options{Capture: small(t), Config: quest, Progress: func(done, all int) {
		told = append(told, fmt.Sprint(done, all))
	}})
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var again replay.Report
	strict := json.NewDecoder(bytes.NewReader(data))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&again); err != nil {
		t.Fatal(err)
	}
	var all map[string]any
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatal(err)
	}
	config := all["config"].(map[string]any)
	all["config"] = nil
	keys := make(map[string]bool)
	keysOf(all, "", keys)
	want := []string{
		"config", "layers", "layers.heads", "layers.heads.candidates", "layers.heads.head", "layers.heads.kept",
		"layers.heads.kept_per_step", "layers.heads.rel_err", "layers.heads.true_mass", "layers.heads.worst_true_mass",
		"layers.layer", "layers.rel_err", "mean_candidates", "mean_head_rel_err", "mean_kept", "mean_true_mass",
		"rel_err", "steps", "worst_true_mass",
	}
	if got := slices.Sorted(maps.Keys(keys)); !slices.Equal(got, want) {
		t.Errorf("keys are %q", got)
	}
	if config["group"] != "union" || config["skip_first_two_layers"] != false || config["compressor"] == nil {
		t.Errorf("config is not the whole one that ran: %v", config)
	}
	if len(told) != 9 || told[0] != "1 9" || told[8] != "9 9" {
		t.Errorf("progress was %q", told)
	}
}

// A group's heads share their list under union, and only there.
func TestGroups(t *testing.T) {
	t.Parallel()
	c, loaded := daemon(t), small(t)
	for _, group := range []string{"union", "per_query_head"} {
		config, err := replay.Overrides{Group: group}.Apply([]byte(quest))
		if err != nil {
			t.Fatal(err)
		}
		r := run(t, c, replay.Options{Capture: loaded, Config: string(config)})
		shared := true
		for _, l := range r.Layers {
			for _, h := range l.Heads {
				first := l.Heads[h.Head/loaded.Group()*loaded.Group()]
				shared = shared && slices.Equal(h.KeptPerStep, first.KeptPerStep)
			}
		}
		if shared != (group == "union") {
			t.Errorf("%s: groups share their lists: %v", group, shared)
		}
		if r.MeanKept >= r.MeanCandidates || r.WorstTrueMass >= r.MeanTrueMass || r.Facts.Kept.Max <= r.Facts.Kept.Min {
			t.Errorf("%s: report is %+v", group, r)
		}
	}
}

func TestRunFails(t *testing.T) {
	t.Parallel()
	c, loaded := daemon(t), small(t)
	if _, err := replay.Run(t.Context(), c, replay.Options{Capture: loaded, Config: `{"selektor": {}}`}); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("a config with an unknown key: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	o := replay.Options{Capture: loaded, Config: quest, Progress: func(done, _ int) {
		if done == 2 {
			cancel()
		}
	}}
	if _, err := replay.Run(ctx, c, o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// afar is memory of which the host has a copy, as of a GPU's.
type afar struct{}

func (afar) Lend(ctx context.Context, s *client.Session, size int, access client.Access) (replay.Buffer, error) {
	b, err := s.NewBuffer(ctx, size, access)
	return farBuffer{b, make([]byte, size)}, err
}

type farBuffer struct {
	memory *client.Buffer
	copied []byte
}

func (b farBuffer) Lent() *client.Buffer { return b.memory }
func (b farBuffer) Bytes() []byte        { return b.copied }

func (b farBuffer) Push() error {
	copy(b.memory.Bytes(), b.copied)
	return nil
}

func (b farBuffer) Pull() error {
	copy(b.copied, b.memory.Bytes())
	return nil
}

// onStreams is such memory, of a GPU whose streams run armed steps.
type onStreams struct {
	afar
	words func([]client.Word) ([]client.Word, error) // what streams do in place of words; nil: them
}

func (m onStreams) NewStream() (client.Releaser, error) {
	return &armedtest.Stream{Change: m.words}, nil
}

// A stream that takes no words, and one that waits for a layer that nobody rang when the replay is
// cancelled, end the replay.
func TestStreamFails(t *testing.T) {
	t.Parallel()
	c := daemon(t)
	ctx, cancel := context.WithCancel(t.Context())
	refused := errors.New("refused")
	refuses := func([]client.Word) ([]client.Word, error) { return nil, refused }
	stalls := func(words []client.Word) ([]client.Word, error) {
		switch {
		case len(words) > 1: // a beginning
			return words, nil
		case words[0].Wait:
			cancel()
			return words, nil
		}
		return nil, nil
	}
	o := replay.Options{Capture: small(t), Config: quest, Armed: true}
	o.Memory = onStreams{words: refuses}
	if _, err := replay.Run(ctx, c, o); !errors.Is(err, refused) {
		t.Errorf("words are refused: %v", err)
	}
	o.Memory = onStreams{words: stalls}
	if _, err := replay.Run(ctx, c, o); !errors.Is(err, client.ErrCancelled) {
		t.Errorf("cancelled while the stream waits: %v", err)
	}
}

// Armed steps give what messages give, wherever the memory is, and whoever meets the daemon.
func TestArmed(t *testing.T) {
	t.Parallel()
	c := daemon(t)
	loaded, err := capture.Cut(smolLM2(t), []int{2, 17}, []int{1})
	if err != nil {
		t.Fatal(err)
	}
	var first []byte
	for _, o := range []replay.Options{{}, {Armed: true}, {Memory: afar{}}, {Memory: afar{}, Armed: true}, {Memory: onStreams{}, Armed: true}} {
		o.Capture, o.Config = loaded, quest
		report, err := json.Marshal(run(t, c, o))
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = report
		}
		if !bytes.Equal(report, first) {
			t.Errorf("armed %t, memory %T:\n%s\nby messages, in shared memory:\n%s", o.Armed, o.Memory, report, first)
		}
	}
}

// What a prefill saw goes to the methods that start from it: they keep what they would without a daemon
// between, and are refused where the capture has nothing.
func TestPrefill(t *testing.T) {
	t.Parallel()
	const compressed = `{"compressor": {"type": "snap_kv", "window_size": 8, "max_capacity_prompt": 300}, "skip_first_two_layers": false}`
	const heavy = `{"selector": {"type": "h2o", "token_budget": 300}, "skip_first_two_layers": false}`
	c, seen := daemon(t), small(t)
	plain := *seen
	plain.Window, plain.Layers = 0, slices.Clone(seen.Layers)
	plain.Layers[0].QWindow, plain.Layers[0].Mass = nil, nil
	_, err := replay.Run(t.Context(), c, replay.Options{Capture: &plain, Config: compressed})
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Field != "layer.observation" {
		t.Errorf("without an observation: error %v, want one about layer.observation", err)
	}

	without := run(t, c, replay.Options{Capture: &plain, Config: heavy})
	for _, dtype := range []client.DType{client.F16, client.F32} {
		r := run(t, c, replay.Options{Capture: seen, Config: compressed, DType: dtype})
		for _, h := range r.Layers[0].Heads {
			for step, kept := range h.KeptPerStep {
				if kept != 300+1+step {
					t.Errorf("%v, head %d, step %d: kept %d, want what the compressor kept and all since", dtype, h.Head, step, kept)
				}
			}
		}
		if r.MeanTrueMass < .8 {
			t.Errorf("%v: what the window asked for holds %v of the mass", dtype, r.MeanTrueMass)
		}
		with := run(t, c, replay.Options{Capture: seen, Config: heavy, DType: dtype})
		if with.MeanTrueMass <= without.MeanTrueMass {
			t.Errorf("%v: heavy hitters hold %v of the mass with the prefill's and %v without", dtype, with.MeanTrueMass, without.MeanTrueMass)
		}
	}
}
