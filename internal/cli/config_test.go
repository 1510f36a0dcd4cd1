package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/twilight-sidecar/twilight/benchmark"
)

// write makes a file in folder.
func write(t *testing.T, folder, name, text string) (path string) {
	t.Helper()
	path = filepath.Join(folder, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigCheck(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	good := write(t, folder, "good.json", `{"selector": {"type": "quest"}, "coverage": 0.97}`)
	bad := write(t, folder, "bad.json", `{
		"selector": {"type": "qest"},
		"weight_estimator": {"type": "min_max_quant", "quant_bit": 3},
		"weight_pruner": {"type": "top_p", "treshold": 0.9, "threshold_by_layer": {"3": 2}}
	}`)
	broken := write(t, folder, "broken.json", "{\n,}")
	absent := filepath.Join(folder, "absent.json")

	if out := succeed(t, "config", "check", good, questTwi); out != good+": ok\n"+questTwi+": ok\n" {
		t.Errorf("two good configs: %q", out)
	}
	code, stdout, stderr := twilight(t, "config", "check", bad, good, broken, absent)
	if code != exitFailed || !strings.Contains(stderr, "3 of 4 configs are not right") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	for i, line := range strings.Split(strings.TrimSuffix(stdout, "\n"), "\n") {
		want := []string{
			bad + `: error: selector.type: selector type "qest" is not available`,
			bad + `: error: weight_estimator.quant_bit: quant_bit is 3, expected 2, 4 or 8`,
			bad + `: error: weight_pruner.treshold: unknown key "treshold": did you mean "threshold"?`,
			bad + `: error: weight_pruner.threshold_by_layer["3"]: threshold is 2, expected p`,
			good + `: ok`,
			broken + `: error: config is not a JSON object: line 2: `,
			absent + `: error: open `,
		}[i]
		if !strings.HasPrefix(line, want) {
			t.Errorf("line %d is %q, want %q", i, line, want)
		}
	}

	code, stdout, _ = twilight(t, "config", "check", "--json", bad, good)
	var got []checked
	strictly(t, stdout, &got)
	if code != exitFailed || len(got) != 2 || len(got[0].Errors) != 4 || got[0].Errors[3].Path != `weight_pruner.threshold_by_layer["3"]` ||
		got[1].File != good || len(got[1].Errors) != 0 || got[1].Warnings == nil {
		t.Errorf("exit code %d, %+v", code, got)
	}
}

// TestConfigCheckFiles: what a config needs of another file is not missed if there is none, but read if
// there is.
func TestConfigCheckFiles(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	write(t, folder, "channels.json", `{"model.layers.0.self_attn.q_proj": [[1, 0, 2]]}`)
	write(t, folder, "no channels.json", `{"model.layers.0.self_attn.q_proj": [[1, 1, 2]]}`)
	for _, test := range []struct {
		selector         string
		errors, warnings []finding // messages by their beginnings
	}{
		{`"r": 2, "config_path": "channels.json"`, nil, nil},
		{`"r": 2, "config_path": "absent.json"`, nil, []finding{{"selector.config_path", "open "}}},
		{`"r": 0, "config_path": "absent.json"`, []finding{{"selector.r", "r is 0"}}, []finding{{"selector.config_path", "open "}}},
		{`"r": 2, "config_path": "absent.json", "channels": {}`, []finding{{"selector.channels", "channels is missing"}}, []finding{{"selector.config_path", "open "}}},
		{`"r": 4, "config_path": "channels.json"`, []finding{{`selector.channels["0"][0]`, "the list has 3 channels"}}, nil},
		{`"r": 2, "config_path": "no channels.json"`, []finding{{"selector.config_path", "no channels.json: "}}, nil},
		{`"r": 2`, []finding{{"selector.channels", "channels is missing"}}, nil},
	} {
		file := write(t, folder, "config.json", `{"selector": {"type": "ds", `+test.selector+`}}`)
		_, stdout, _ := twilight(t, "config", "check", "--json", file)
		var got []checked
		strictly(t, stdout, &got)
		for _, list := range []struct{ got, want []finding }{{got[0].Errors, test.errors}, {got[0].Warnings, test.warnings}} {
			same := len(list.got) == len(list.want)
			for i := range list.want {
				same = same && list.got[i].Path == list.want[i].Path && strings.HasPrefix(list.got[i].Message, list.want[i].Message)
			}
			if !same {
				t.Errorf("%s: %+v, want %+v", test.selector, list.got, list.want)
			}
		}
	}
}

func TestConfigSchema(t *testing.T) {
	t.Parallel()
	out := succeed(t, "config", "schema")
	if diff := cmp.Diff(string(benchmark.ConfigSchema), out); diff != "" || !json.Valid([]byte(out)) {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
