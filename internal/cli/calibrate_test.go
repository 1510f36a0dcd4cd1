package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCalibrate: a config beside the file that it names runs as one that compare calibrates itself.
func TestCalibrate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var configs []string
	for name, args := range map[string][]string{
		"config_ds_twi":  {"ds", "--out", filepath.Join(dir, "channels.json")},
		"config_duo_twi": {"duo", "--out", filepath.Join(dir, "full_attention_heads.tsv")},
	} {
		if code, _, stderr := twilight(t, append([]string{"calibrate"}, append(args, "--capture", demoFile)...)...); code != exitOK {
			t.Fatalf("%v: exit %d, %s", args, code, stderr)
		}
		config, err := os.ReadFile(filepath.Join("../../benchmark/configs", name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		// A label of all 64 channels would rank as the keys themselves do.
		config = []byte(strings.Replace(string(config), `"r": 64`, `"r": 8`, 1))
		file := filepath.Join(dir, name+".json")
		if err := os.WriteFile(file, config, 0o600); err != nil {
			t.Fatal(err)
		}
		configs = append(configs, "--configs", file)
	}
	args := append([]string{"compare", "--layers", "9", "--json"}, configs...)
	var byFiles, byCapture comparison
	_, stdout, _ := twilight(t, args...)
	strictly(t, stdout, &byFiles)
	_, stdout, _ = twilight(t, append(args, "--calibration", demoFile)...)
	strictly(t, stdout, &byCapture)
	for i := range byFiles.Configs {
		a, b := &byFiles.Configs[i], &byCapture.Configs[i]
		if a.MeanKept != b.MeanKept || a.RelErr != b.RelErr || a.MeanKept == 0 {
			t.Errorf("%s: kept %v with error %v by files, %v with %v by capture",
				a.Name, a.MeanKept, a.RelErr, b.MeanKept, b.RelErr)
		}
	}
}

func TestCompareRefusesToCalibrateOnWhatItJudges(t *testing.T) {
	t.Parallel()
	code, _, stderr := twilight(t, "compare", "--capture", demoFile, "--calibration", demoFile,
		"--configs", "../../benchmark/configs/config_ds_twi.json")
	if code != exitFailed || !strings.Contains(stderr, "calibrate on another text") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

func TestConfigWhoseFileIsMissing(t *testing.T) {
	t.Parallel()
	code, _, stderr := twilight(t, "compare", "--configs", "../../benchmark/configs/config_ds_twi.json")
	if code != exitFailed || !strings.Contains(stderr, "channels.json") || !strings.Contains(stderr, "config_path") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}
