package cli

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

// Every config in the repository is one that a daemon takes, once it has the files that it names.
func TestConfigs(t *testing.T) {
	t.Parallel()
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, glob := range []string{"../../benchmark/configs/*.json", "../../benchmark/configs/*/*.json", "demo.json"} {
		some, err := filepath.Glob(glob)
		if err != nil || len(some) == 0 {
			t.Fatalf("%s: %v, %v", glob, some, err)
		}
		files = append(files, some...)
	}
	inline, err := (&compareCmd{Calibration: demoFile}).inliner()
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		config, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if config, err = inline(config, file); err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if _, err := all.Parse(config); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}
