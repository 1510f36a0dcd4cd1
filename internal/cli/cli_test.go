package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/twilight-sidecar/twilight/internal/replay"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	questTwi = "../../benchmark/configs/config_quest_twi.json"
	demoFile = "../../testdata/smollm2-demo.safetensors"
)

// twilight runs the command.
func twilight(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(t.Context(), args, &out, &err, nil)
	return code, out.String(), err.String()
}

// succeed runs the command, which must succeed and say nothing on stderr.
func succeed(t *testing.T, args ...string) string {
	t.Helper()
	code, stdout, stderr := twilight(t, args...)
	if code != exitOK || stderr != "" {
		t.Fatalf("twilight %q exited %d: %s", args, code, stderr)
	}
	return stdout
}

func daemon(t *testing.T) (target string) {
	t.Helper()
	d, err := inprocess.Start(t.Context(), inprocess.Options{Version: "v9"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return d.Target()
}

// strictly decodes all of text into v, which must know every key.
func strictly(t *testing.T, text string, v any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		t.Errorf("more than one value: %s", text)
	}
}

func TestDemo(t *testing.T) {
	t.Parallel()
	var r replay.Report
	strictly(t, succeed(t, "demo", "--json"), &r)
	if r.Steps != 8 || len(r.Layers) != 3 {
		t.Fatalf("%d layers and %d steps", len(r.Layers), r.Steps)
	}
	for _, l := range r.Layers {
		if len(l.Heads) != 6 {
			t.Errorf("layer %d has %d heads", l.Layer, len(l.Heads))
		}
		for _, h := range l.Heads {
			if len(h.KeptPerStep) != 8 || h.Kept >= h.Candidates || h.TrueMass <= 0.5 || h.RelErr >= 1 {
				t.Errorf("layer %d: %+v", l.Layer, h)
			}
		}
	}
}

func TestDemoText(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "a", "b")
	text := succeed(t, "demo", "--group", "union", "--out", out)
	for _, want := range []string{"SmolLM2", "group union", "true mass", "layer  17  ", "tokens kept (logarithmic)", "kept.svg"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Errorf("escape sequences outside of a terminal: %q", text)
	}
	for line := range strings.SplitSeq(text, "\n") {
		if strings.TrimRight(line, " ") != line {
			t.Errorf("line ends in spaces: %q", line)
		}
	}

	picture, err := os.ReadFile(filepath.Join(out, "kept.svg"))
	if err != nil {
		t.Fatal(err)
	}
	cells, texts := 0, 0
	for d := xml.NewDecoder(bytes.NewReader(picture)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok {
			switch e.Name.Local {
			case "g":
				cells++
			case "text":
				texts++
			}
		}
	}
	if cells != 3*6 || texts < 2*cells {
		t.Errorf("the picture has %d cells and %d texts", cells, texts)
	}
}

func TestReplay(t *testing.T) {
	t.Parallel()
	target := daemon(t)
	args := []string{"replay", "--target", target, "--capture", demoFile, "--config", questTwi}
	text := succeed(t, args...)
	for _, want := range []string{"token_budget=8192", "threshold=0.85", "group union", "fp16 cache", "candidates", "  all "} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
	var r replay.Report
	strictly(t, succeed(t, append(args, "--json", "--group", "per_query_head", "--p", "0.5", "--layout", "packed", "--page-size", "7",
		"--dtype", "bf16")...), &r)
	var config struct {
		Group  string `json:"group"`
		Pruner struct {
			Threshold float64 `json:"threshold"`
		} `json:"weight_pruner"`
	}
	if err := json.Unmarshal(r.Config, &config); err != nil || config.Group != "per_query_head" || config.Pruner.Threshold != 0.5 {
		t.Errorf("ran %s, %v", r.Config, err)
	}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	args := []string{
		"compare", "--layers", "9", "--configs", "../../benchmark/configs/config_full.json",
		"--configs", "../../benchmark/configs/config_quest_twi*.json", "--group", "union,per_query_head", "--token-budget", "512",
	}
	var found comparison
	_, stdout, stderr := twilight(t, append(args, "--json")...)
	strictly(t, stdout, &found)
	runs := found.Configs
	if len(runs) != 6 || runs[2].Name != "config_quest_twi" || runs[2].Group != "union" || runs[5].Group != "per_query_head" {
		t.Fatalf("ran %+v", runs)
	}
	if !strings.Contains(stderr, "config_full, union: dense were 16 of 16 list rows: configured") {
		t.Errorf("dense rows are passed over: %q", stderr)
	}
	for _, run := range runs[2:] {
		if run.MeanCandidates < 490 || run.MeanCandidates > 512 || run.MeanCoverage <= run.MeanTrueMass ||
			run.WorstCoverage < run.WorstTrueMass || run.TokenBudget != 512 {
			t.Errorf("%+v", run)
		}
	}
	full := runs[0]
	if full.MeanCoverage < 1-1e-9 || full.RelErr > 1e-3 || full.TokenBudget != 0 || full.ShadowBytesPerToken != 0 {
		t.Errorf("%+v", full)
	}
	// Dense attention reads keys and values of 64 fp16 elements each, 4097 to 4104 of them.
	if full.BytesPerRow != 4100.5*2*64*2 {
		t.Errorf("dense attention reads %v bytes a row", full.BytesPerRow)
	}

	_, markdown, _ := twilight(t, append(args, "--markdown")...)
	lines := strings.Split(strings.TrimSpace(markdown), "\n")
	if len(lines) != 2+6 || !strings.HasPrefix(lines[1], "|---|---|---:|") {
		t.Errorf("table is\n%s", markdown)
	}
	for _, line := range lines {
		if strings.Count(line, "|") != strings.Count(lines[0], "|") {
			t.Errorf("columns differ in %s", line)
		}
	}
	_, plain, _ := twilight(t, append(args, "--target", daemon(t))...)
	if !strings.Contains(plain, "config_quest_twi_p95") || strings.Contains(plain, "|") {
		t.Errorf("table is\n%s", plain)
	}
}

// TestCompareBudgets sweeps the budgets of those configs that have one.
func TestCompareBudgets(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "pictures")
	_, plain, _ := twilight(t, "compare", "--layers", "9", "--token-budget", "256,512", "--out", dir,
		"--configs", "../../benchmark/configs/config_quest_twi.json", "--configs", "../../benchmark/configs/config_quest_1024.json",
		"--configs", "../../benchmark/configs/config_full_twi.json")
	data, err := os.ReadFile(filepath.Join(dir, "compare.json"))
	if err != nil {
		t.Fatal(err)
	}
	var found comparison
	strictly(t, string(data), &found)
	var budgets []int
	for i, run := range found.Configs {
		budgets = append(budgets, run.TokenBudget)
		if run.BytesPerRow <= 0 || i < 4 && run.MeanCandidates > float64(run.TokenBudget) {
			t.Errorf("%+v", run)
		}
	}
	if want := []int{256, 512, 256, 512, 0}; !slices.Equal(budgets, want) {
		t.Errorf("ran with budgets %v, want %v", budgets, want)
	}
	if fields := strings.Fields(plain); fields[2] != "budget" {
		t.Errorf("table is\n%s", plain)
	}
	for _, name := range []string{"compare.svg", "compare.png"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCapabilities(t *testing.T) {
	t.Parallel()
	target := daemon(t)
	text := succeed(t, "capabilities", "--target", target)
	for _, want := range []string{"twilightd v9", "device host", "f16", "quest", "top_p", "shared_memory"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
	text = succeed(t, "capabilities", "--target", target, "--config", questTwi, "--layers", "32", "--kv-heads", "8",
		"--query-heads", "32", "--head-size", "128")
	if !strings.Contains(text, "bytes a token") {
		t.Errorf("no shadow in:\n%s", text)
	}
	var answer map[string]any
	strictly(t, succeed(t, "capabilities", "--target", target, "--json"), &answer)
	if answer["version"] != "v9" {
		t.Errorf("answer is %v", answer)
	}
	if code, _, stderr := twilight(t, "capabilities", "--target", target, "--config", questTwi); code != exitFailed ||
		!strings.Contains(stderr, "--layers") {
		t.Errorf("exited %d: %s", code, stderr)
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	if text := succeed(t, "health", "--target", daemon(t), "--wait", "1s"); text != "serving\n" {
		t.Errorf("said %q", text)
	}
	late := filepath.Join(t.TempDir(), "late")
	code := make(chan int)
	go func() {
		code <- run(t.Context(), []string{"health", "--target", "unix://" + late, "--wait", "20s"}, io.Discard, io.Discard, nil)
	}()
	d, err := inprocess.Start(t.Context(), inprocess.Options{Path: late})
	if err != nil {
		t.Fatal(err)
	}
	if got := <-code; got != exitOK {
		t.Errorf("waiting for a daemon that starts: exited %d", got)
	}
	if err := d.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	nobody := "unix://" + filepath.Join(t.TempDir(), "nobody")
	for _, args := range [][]string{{}, {"--wait", "50ms"}} {
		code, stdout, stderr := twilight(t, append([]string{"health", "--target", nobody}, args...)...)
		if code != exitFailed || stdout != "" || !strings.Contains(stderr, "nobody") {
			t.Errorf("%q: exited %d: %s%s", args, code, stdout, stderr)
		}
	}
}

func TestVersionAndHelp(t *testing.T) {
	t.Parallel()
	if text := succeed(t, "version"); !strings.HasPrefix(text, "twilight ") {
		t.Errorf("version is %q", text)
	}
	for _, args := range [][]string{{"--help"}, {"demo", "--help"}, {"replay", "--help"}, {"compare", "--help"}, {"capabilities", "--help"}, {"health", "--help"}} {
		if text := succeed(t, args...); !strings.Contains(text, "TWILIGHT_") && len(args) == 1 ||
			len(args) == 2 && !strings.Contains(text, "    twilight "+args[0]) {
			t.Errorf("%q teaches too little:\n%s", args, text)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		args  []string
		names string
	}{
		{[]string{}, "expected one of"},
		{[]string{"dance"}, "dance"},
		{[]string{"demo", "--jason"}, "--jason"},
		{[]string{"demo", "--group", "some"}, "--group"},
		{[]string{"replay"}, "--capture"},
		{[]string{"replay", "--capture", "nowhere", "--config", questTwi}, "nowhere"},
		{[]string{"replay", "--capture", demoFile, "--config", questTwi, "--layout", "x"}, "--layout"},
		{[]string{"compare"}, "--configs"},
		{[]string{"compare", "--configs", "x", "--json", "--markdown"}, "--markdown"},
		{[]string{"capabilities", "--layers", "3"}, "--kv-heads"},
		{[]string{"--settings", "nowhere", "version"}, "nowhere"},
	} {
		code, stdout, stderr := twilight(t, tc.args...)
		if code != exitUsage || stdout != "" || !strings.Contains(stderr, tc.names) || !strings.Contains(stderr, "--help") {
			t.Errorf("%q exited %d: %s%s", tc.args, code, stdout, stderr)
		}
	}
}

func TestFailures(t *testing.T) {
	t.Parallel()
	broken := filepath.Join(t.TempDir(), "broken.json")
	if err := os.WriteFile(broken, []byte(`{"selector": {"type": "quest", "budget": 3}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args  []string
		names string
	}{
		{[]string{"compare", "--configs", "nowhere*"}, "nowhere*"},
		{[]string{"compare", "--configs", "[", "--layers", "9"}, "["},
		{[]string{"compare", "--configs", broken}, "selector.budget"},
		{[]string{"compare", "--configs", questTwi, "--layers", "5"}, "layer 5"},
		{[]string{"replay", "--target", daemon(t), "--capture", broken, "--config", questTwi}, "capture"},
		{[]string{"replay", "--target", daemon(t), "--capture", demoFile, "--config", "../../benchmark/configs/config_full.json", "--p", "0.5"}, "top_p"},
	} {
		code, stdout, stderr := twilight(t, tc.args...)
		if code != exitFailed || stdout != "" || !strings.Contains(stderr, tc.names) {
			t.Errorf("%q exited %d: %s%s", tc.args, code, stdout, stderr)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var stderr bytes.Buffer
	if code := run(ctx, []string{"demo"}, io.Discard, &stderr, nil); code != exitFailed || stderr.String() != "twilight: interrupted\n" {
		t.Errorf("interrupted: exited %d: %s", code, stderr.String())
	}
}

// A flag beats the environment, which beats the file.
func TestSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "settings.json")
	set := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	asks := func(want string, args ...string) {
		t.Helper()
		_, _, stderr := twilight(t, append(args, "health")...)
		if !strings.Contains(stderr, want) {
			t.Errorf("%q: asked another than %s: %s", args, want, stderr)
		}
	}
	set(`{"target": "unix:///from/file", "page-size": 7, "wait": "1ms"}`)
	asks("/from/file", "--settings", file)
	t.Setenv("TWILIGHT_SETTINGS", file)
	asks("/from/file")
	t.Setenv("TWILIGHT_TARGET", "unix:///from/env")
	asks("/from/env")
	if _, _, stderr := twilight(t, "health", "--target", "unix:///from/flag"); !strings.Contains(stderr, "/from/flag") {
		t.Errorf("asked another: %s", stderr)
	}
	for text, names := range map[string]string{`{"targett": 1}`: "targett", `[]`: "file", `{"wait": "x"}`: "wait"} {
		set(text)
		if code, _, stderr := twilight(t, "health"); code != exitUsage || !strings.Contains(stderr, names) {
			t.Errorf("%s: exited %d: %s", text, code, stderr)
		}
	}
}
