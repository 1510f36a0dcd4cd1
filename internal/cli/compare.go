package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
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
	TokenBudget int             `placeholder:"N" help:"Candidates of each selector that has a budget, in place of the configs'."`
	Markdown    bool            `xor:"form" help:"Print the table as Markdown."`
	JSON        bool            `name:"json" xor:"form" help:"Print an array of reports as JSON, and nothing else, on stdout."`
}

func (*compareCmd) Help() string {
	return `Quality of some configs on the demo's capture, in both group modes:

    twilight compare --configs 'benchmark/configs/*_twi*.json' --group union,per_query_head --token-budget 1024

The table to paste into a document:

    twilight compare --capture FILE --layers 2,9,17,25 --configs 'benchmark/configs/quality/*.json' --markdown

What INT4 makes of outlier channels, which some models have, with and without equalisation:

    twilight compare --shift-keys '5=77;40=-40' --configs 'benchmark/configs/equalize/*.json'

Candidates and kept are tokens of a query head in a step; coverage and mass are the shares of the true
attention that candidates and kept tokens hold, as computed here; the coverage comes from a second run of
the config without its pruner. Head error is the mean of the single outputs' relative errors, error that
of all together.`
}

// compared is one run of compare.
type compared struct {
	Name   string         `json:"name"`
	Group  string         `json:"group"`
	Report *replay.Report `json:"report"`
	// Coverage is the report of the same config without its pruner: its masses are the candidates'.
	Coverage             coverage `json:"coverage"`
	MillisecondsPerLayer float64  `json:"milliseconds_per_layer"`
}

// coverage is the candidates' true mass.
type coverage struct {
	Mean  float64 `json:"mean"`
	Worst float64 `json:"worst"`
}

func (c *compareCmd) Run(ctx context.Context, term *terminal) (err error) {
	loaded, err := c.load()
	if err != nil {
		return err
	}
	files, err := c.files()
	if err != nil {
		return err
	}
	inline, err := c.inliner()
	if err != nil {
		return err
	}
	conn, stop, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()

	groups := c.Group
	if len(groups) == 0 {
		groups = []string{""}
	}
	bar := newProgress(term.err)
	var runs []compared
	for i, file := range files {
		for _, group := range groups {
			name := strings.TrimSuffix(filepath.Base(file), ".json")
			run, err := c.run(ctx, conn, loaded, file, group, inline, func(done, all int) {
				bar.show("compare: %s %s (%d of %d): %d of %d", name, group, i+1, len(files), done, all)
			})
			if err != nil {
				bar.clear()
				return fmt.Errorf("%s: %w", file, err)
			}
			run.Name = name
			runs = append(runs, *run)
		}
	}
	bar.clear()
	for _, run := range runs {
		if text := denseText(run.Report); text != "" {
			fmt.Fprintf(term.err, "%s, %s: dense were %s\n", run.Name, run.Group, text)
		}
	}
	if c.JSON {
		return printJSON(term.out, runs)
	}
	if c.Markdown {
		compareTable(runs, false).markdown(term.out)
	} else {
		compareTable(runs, true).print(term.out)
	}
	return nil
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

// run runs a config, and again without its pruner.
func (c *compareCmd) run(
	ctx context.Context, conn *client.Client, loaded *capture.Capture, file, group string, inline inliner,
	progress func(done, all int),
) (*compared, error) {
	var reports [2]*replay.Report
	for i := range reports {
		config, err := readConfig(file, replay.Overrides{Group: group, TokenBudget: c.TokenBudget, NoPruner: i == 1}, inline)
		if err != nil {
			return nil, err
		}
		reports[i], err = replay.Run(ctx, conn, replay.Options{
			Capture: loaded, Config: config, EngineName: "twilight compare", Seed: 1,
			Progress: func(done, all int) { progress(i*all+done, len(reports)*all) },
		})
		if err != nil {
			return nil, err
		}
	}
	r := reports[0]
	var ran struct {
		Group string `json:"group"`
	}
	if err := json.Unmarshal(r.Config, &ran); err != nil {
		return nil, err
	}
	calls := r.Steps * len(r.Layers)
	return &compared{
		Group: ran.Group, Report: r,
		Coverage:             coverage{Mean: reports[1].MeanTrueMass, Worst: reports[1].WorstTrueMass},
		MillisecondsPerLayer: r.Facts.Decode.Seconds() * 1000 / float64(calls),
	}, nil
}

// compareTable shows the runs; timed adds how long a layer took, which only this machine now can tell.
func compareTable(runs []compared, timed bool) *table {
	t := &table{header: []string{
		"config", "group", "candidates", "kept", "min", "max", "coverage", "worst", "mass", "worst", "head error", "error",
		"shadow B/token",
	}}
	if timed {
		t.header = append(t.header, "ms/layer")
	}
	for _, run := range runs {
		r := run.Report
		cells := []string{
			run.Name, run.Group, fmt.Sprintf("%.0f", r.MeanCandidates),
			tokens(r.MeanKept), fmt.Sprint(r.Facts.Kept.Min), fmt.Sprint(r.Facts.Kept.Max),
			share(run.Coverage.Mean), share(run.Coverage.Worst), share(r.MeanTrueMass), share(r.WorstTrueMass),
			relErr(r.MeanHeadRelErr), relErr(r.RelErr),
			fmt.Sprintf("%.0f", r.Facts.Shadow.PerToken),
		}
		if timed {
			cells = append(cells, fmt.Sprintf("%.1f", run.MillisecondsPerLayer))
		}
		t.add(cells...)
	}
	return t
}
