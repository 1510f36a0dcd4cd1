package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/figure"
	"github.com/twilight-sidecar/twilight/internal/replay"
	"github.com/twilight-sidecar/twilight/selector/ds"
	"github.com/twilight-sidecar/twilight/selector/duo"
	"github.com/twilight-sidecar/twilight/testdata"
)

type compareCmd struct {
	Target      string          `placeholder:"URL" help:"Where twilightd listens; without, a daemon in this process serves."`
	Capture     string          `type:"existingfile" placeholder:"FILE" help:"Keys, values and queries of a model (those of the demo)."`
	Calibration string          `type:"existingfile" placeholder:"FILE" help:"Capture to calibrate methods on that need it; else they need the files that their configs name."`
	Configs     []string        `sep:"none" required:"" placeholder:"GLOB" help:"Twilight configs to run. May be repeated."`
	Layers      []int           `placeholder:"L" help:"Layers of the capture to run (all)."`
	Group       []string        `enum:"union,per_query_head" placeholder:"MODE" help:"Run each config in these group modes, in place of its own: union, per_query_head."`
	ShiftKeys   map[int]float32 `placeholder:"CHANNEL=BY" help:"Add a constant to key channels: outlier channels, with the same attention."`
	TokenBudget []int           `placeholder:"N" help:"Candidates of each selector, and tokens that SnapKV leaves of a prompt, in place of the configs'. Of several, each is run."`
	Out         string          `type:"path" placeholder:"DIR" help:"Also write there what --json prints, as compare.json, and pictures of it, as compare.svg and compare.png."`
	Markdown    bool            `xor:"form" help:"Print the table as Markdown."`
	JSON        bool            `name:"json" xor:"form" help:"Print the results as JSON, and nothing else, on stdout."`
}

func (*compareCmd) Help() string {
	return `Quality of some configs on the demo's capture, in both group modes:

    twilight compare --configs 'benchmark/configs/*_twi*.json' --group union,per_query_head --token-budget 1024

The table to paste into a document:

    twilight compare --capture FILE --layers 2,9,17,25 --configs 'benchmark/configs/quality/*.json' --markdown

Pictures of what pruning buys and costs: fixed budgets as curves, and what is pruned by points:

    twilight compare --configs 'benchmark/configs/config_quest*.json' --token-budget 256,512,1024,2048 --out pictures

What INT4 makes of outlier channels, which some models have, with and without equalisation:

    twilight compare --shift-keys '5=77;40=-40' --configs 'benchmark/configs/equalize/*.json'

Candidates and kept are tokens of a query head in a step; coverage and mass are the shares of the true
attention that candidates and kept tokens hold, as computed here; the coverage comes from a second run of
the config without its pruner. Head error is the mean of the single outputs' relative errors, error that
of all together. Bytes a row are what a KV head of a layer reads in a step, of cache and shadow together.

With --json: {"configs": [{"name": ..., what replay --json has but its layers, "mean_coverage": ..., "bytes_per_row": ...,
"shadow_bytes_per_token": ..., ...}]}.`
}

// comparison is what compare found.
type comparison struct {
	Configs []compared `json:"configs"`
}

// compared is one run of compare.
type compared struct {
	Name string `json:"name"`
	// TokenBudget is that of --token-budget; 0 without, and where the selector has none.
	TokenBudget int             `json:"token_budget,omitempty"`
	Group       string          `json:"group"`
	Config      json.RawMessage `json:"config"`
	replay.Figures
	// Coverage is the true mass of the candidates.
	MeanCoverage         float64 `json:"mean_coverage"`
	WorstCoverage        float64 `json:"worst_coverage"`
	MinKept              int     `json:"min_kept"`
	MaxKept              int     `json:"max_kept"`
	BytesPerRow          float64 `json:"bytes_per_row"`
	ShadowBytesPerToken  float64 `json:"shadow_bytes_per_token"`
	MillisecondsPerLayer float64 `json:"milliseconds_per_layer"`

	dense string // which rows were, and why
}

// job is a config to run, and the same without its pruner, whose kept tokens are the candidates.
type job struct {
	file             string
	budget           int
	config, unpruned string
}

func (j *job) name() string { return strings.TrimSuffix(filepath.Base(j.file), ".json") }

func (c *compareCmd) Run(ctx context.Context, term *terminal) (err error) {
	loaded, err := c.load()
	if err != nil {
		return err
	}
	jobs, err := c.jobs()
	if err != nil {
		return err
	}
	conn, stop, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()

	found, err := compareAll(ctx, conn, loaded, jobs, newProgress(term.err))
	if err != nil {
		return err
	}
	for _, run := range found.Configs {
		if run.dense != "" {
			fmt.Fprintf(term.err, "%s, %s: dense were %s\n", run.Name, run.Group, run.dense)
		}
	}
	if c.Out != "" {
		if err := found.write(c.Out); err != nil {
			return err
		}
	}
	switch t := compareTable(found.Configs, len(c.TokenBudget) > 1, !c.Markdown); {
	case c.JSON:
		return printJSON(term.out, found)
	case c.Markdown:
		t.markdown(term.out)
	default:
		t.print(term.out)
	}
	return nil
}

// compareAll runs the jobs, equal configs once.
func compareAll(
	ctx context.Context, conn *client.Client, loaded *capture.Capture, jobs []job, bar *progress,
) (*comparison, error) {
	defer bar.clear()
	reports := make(map[string]*replay.Report)
	for _, j := range jobs {
		reports[j.config], reports[j.unpruned] = nil, nil
	}
	done := 0
	run := func(j *job, config string) (*replay.Report, error) {
		if r := reports[config]; r != nil {
			return r, nil
		}
		r, err := replay.Run(ctx, conn, replay.Options{
			Capture: loaded, Config: config, EngineName: "twilight compare", Seed: 1,
			Progress: func(part, parts int) {
				bar.bar(fmt.Sprintf("compare: %s (%d of %d)", j.name(), done+1, len(reports)),
					float64(done)+float64(part)/float64(parts), float64(len(reports)))
			},
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", j.file, err)
		}
		reports[config] = r
		done++
		return r, nil
	}
	found := &comparison{}
	for i := range jobs {
		j := &jobs[i]
		r, err := run(j, j.config)
		if err != nil {
			return nil, err
		}
		candidates, err := run(j, j.unpruned)
		if err != nil {
			return nil, err
		}
		var ran struct {
			Group string `json:"group"`
		}
		if err := json.Unmarshal(r.Config, &ran); err != nil {
			return nil, err
		}
		found.Configs = append(found.Configs, compared{
			Name: j.name(), TokenBudget: j.budget, Group: ran.Group, Config: r.Config, Figures: r.Figures,
			MeanCoverage: candidates.MeanTrueMass, WorstCoverage: candidates.WorstTrueMass,
			MinKept: r.Facts.Kept.Min, MaxKept: r.Facts.Kept.Max,
			BytesPerRow: r.BytesPerRow(), ShadowBytesPerToken: r.Facts.Shadow.PerToken,
			MillisecondsPerLayer: r.Facts.Decode.Seconds() * 1000 / float64(r.Steps*len(r.Layers)),
			dense:                denseText(r),
		})
	}
	return found, nil
}

func (c *compareCmd) load() (*capture.Capture, error) {
	var loaded *capture.Capture
	var err error
	if c.Capture == "" {
		loaded, err = capture.Decode(testdata.SmolLM2)
	} else {
		loaded, err = capture.Open(c.Capture)
	}
	if err == nil {
		err = capture.ShiftKeys(loaded, c.ShiftKeys)
	}
	if err != nil || len(c.Layers) == 0 {
		return loaded, err
	}
	heads := make([]int, loaded.KVHeads)
	for i := range heads {
		heads[i] = i
	}
	return capture.Cut(loaded, c.Layers, heads)
}

// inliner gives configs the files that they name or, calibrated, what calibration puts there instead.
func (c *compareCmd) inliner() (inliner, error) {
	if c.Calibration == "" {
		return fromFiles, nil
	}
	if same(c.Calibration, c.Capture) {
		return nil, errors.New("--calibration is the capture to judge by: calibrate on another text")
	}
	calibration, err := capture.Open(c.Calibration)
	if err != nil {
		return nil, err
	}
	channels, err := channelFile(calibration)
	if err != nil {
		return nil, err
	}
	defaults := duo.Default()
	heads, err := headFile(defaults.SinkSize, defaults.RecentSize, calibration)
	if err != nil {
		return nil, err
	}
	return func(config []byte, _ string) ([]byte, error) {
		config, err := ds.Inline(config, func(string) ([]byte, error) { return channels, nil })
		if err != nil {
			return nil, err
		}
		return duo.Inline(config, func(string) ([]byte, error) { return heads, nil })
	}, nil
}

// same tells whether two paths lead to one file.
func same(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

func (c *compareCmd) files() ([]string, error) {
	var files []string
	for _, glob := range c.Configs {
		some, err := filepath.Glob(glob)
		if err != nil {
			return nil, fmt.Errorf("--configs %s: %w", glob, err)
		}
		if len(some) == 0 {
			return nil, fmt.Errorf("--configs %s: no such file", glob)
		}
		files = append(files, some...)
	}
	return files, nil
}

// connect gives a daemon, and what ends the use of it.
func (c *compareCmd) connect(ctx context.Context) (*client.Client, func() error, error) {
	if c.Target == "" {
		return serveHere(ctx)
	}
	conn, err := (&connection{Target: c.Target}).dialServing(ctx, patience)
	if err != nil {
		return nil, nil, err
	}
	return conn, conn.Close, nil
}

// jobs are the configs in each group mode, with each budget.
func (c *compareCmd) jobs() ([]job, error) {
	files, err := c.files()
	if err != nil {
		return nil, err
	}
	inline, err := c.inliner()
	if err != nil {
		return nil, err
	}
	groups := c.Group
	if len(groups) == 0 {
		groups = []string{""}
	}
	for _, budget := range c.TokenBudget {
		if budget < 1 {
			return nil, fmt.Errorf("--token-budget names %d tokens, expected at least 1", budget)
		}
	}
	var jobs []job
	for _, file := range files {
		own, err := readConfig(file, replay.Overrides{}, inline)
		if err != nil {
			return nil, err
		}
		budgets := c.TokenBudget
		if len(budgets) == 0 || !replay.HasBudget([]byte(own)) {
			budgets = []int{0}
		}
		for _, group := range groups {
			for _, budget := range budgets {
				j := job{file: file, budget: budget}
				for to, o := range map[*string]replay.Overrides{
					&j.config:   {Group: group, TokenBudget: budget},
					&j.unpruned: {Group: group, TokenBudget: budget, NoPruner: true},
				} {
					changed, err := o.Apply([]byte(own))
					if err != nil {
						return nil, fmt.Errorf("%s: %w", file, err)
					}
					*to = string(changed)
				}
				jobs = append(jobs, j)
			}
		}
	}
	return jobs, nil
}

// write writes all of it to a folder, for programs and for people.
func (c *comparison) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // for everyone to read, as are the files
		return err
	}
	series, err := c.series()
	if err != nil {
		return err
	}
	for name, write := range map[string]func(io.Writer) error{
		"compare.json": func(w io.Writer) error { return printJSON(w, c) },
		"compare.svg":  func(w io.Writer) error { return figure.Write(w, "svg", series) },
		"compare.png":  func(w io.Writer) error { return figure.Write(w, "png", series) },
	} {
		var file bytes.Buffer
		if err := write(&file); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), file.Bytes(), 0o644); err != nil { //nolint:gosec // likewise
			return err
		}
	}
	return nil
}

// series gathers the budgets of each config. Dense attention is none of them.
func (c *comparison) series() ([]figure.Series, error) {
	var list []figure.Series
	at := make(map[[2]string]int)
	groups := make(map[string]bool)
	for _, run := range c.Configs {
		groups[run.Group] = true
	}
	for _, run := range c.Configs {
		var config pictured
		if err := json.Unmarshal(run.Config, &config); err != nil {
			return nil, err
		}
		s := figure.Series{Method: config.method(), Pruner: config.pruner()}
		if s.Method == allTokens && s.Pruner == "" {
			continue
		}
		if len(groups) > 1 {
			s.Method += ", " + strings.ReplaceAll(run.Group, "_", " ")
		}
		key := [2]string{run.Name, run.Group}
		i, has := at[key]
		if !has {
			i = len(list)
			at[key], list = i, append(list, s)
		}
		list[i].Points = append(list[i].Points,
			figure.Point{Kept: run.MeanKept, HeadError: run.MeanHeadRelErr, WorstMass: run.WorstTrueMass})
	}
	return list, nil
}

// pictured is what a picture tells of a config.
type pictured struct {
	Compressor, Selector struct{ Type string }
	Pruner               struct {
		Type      string
		Threshold float64
	} `json:"weight_pruner"`
	Coverage float64
	POver    string `json:"p_over"`
}

const allTokens = "all tokens"

// method names what selects the candidates.
func (p *pictured) method() string {
	var parts []string
	for _, kind := range []string{p.Compressor.Type, p.Selector.Type} {
		if kind != "none" {
			parts = append(parts, kind)
		}
	}
	name := cmp.Or(strings.Join(parts, " + "), allTokens)
	if p.Coverage > 0 {
		name += fmt.Sprintf(", coverage %v", p.Coverage)
	}
	return name
}

// pruner names what prunes them, "" for nothing.
func (p *pictured) pruner() string {
	if p.Pruner.Type == "none" {
		return ""
	}
	name := fmt.Sprintf("%s %v", p.Pruner.Type, p.Pruner.Threshold)
	if p.POver == "all" {
		name += " over all"
	}
	return name
}

// compareTable shows the runs; timed adds how long a layer took, which only this machine now can tell.
func compareTable(runs []compared, budgets, timed bool) *table {
	t := &table{text: 2, header: []string{"config", "group"}}
	if budgets {
		t.header = append(t.header, "budget")
	}
	t.header = append(t.header, "candidates", "coverage", "worst", "kept", "min", "max", "mass", "worst", "head error", "error",
		"bytes/row", "shadow B/token")
	if timed {
		t.header = append(t.header, "ms/layer")
	}
	for _, run := range runs {
		cells := []string{run.Name, run.Group}
		if budgets {
			budget := ""
			if run.TokenBudget > 0 {
				budget = fmt.Sprint(run.TokenBudget)
			}
			cells = append(cells, budget)
		}
		cells = append(cells,
			fmt.Sprintf("%.0f", run.MeanCandidates), share(run.MeanCoverage), share(run.WorstCoverage),
			tokens(run.MeanKept), fmt.Sprint(run.MinKept), fmt.Sprint(run.MaxKept),
			share(run.MeanTrueMass), share(run.WorstTrueMass), relErr(run.MeanHeadRelErr), relErr(run.RelErr),
			fmt.Sprintf("%.0f", run.BytesPerRow), fmt.Sprintf("%.0f", run.ShadowBytesPerToken),
		)
		if timed {
			cells = append(cells, fmt.Sprintf("%.1f", run.MillisecondsPerLayer))
		}
		t.add(cells...)
	}
	return t
}
