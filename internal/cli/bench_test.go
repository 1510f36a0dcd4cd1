package cli

import (
	"strings"
	"testing"
)

// TestBench: what it reports beside times, which no test may judge.
func TestBench(t *testing.T) {
	t.Parallel()
	args := []string{
		"bench", "--tokens", "512", "--kv-heads", "1", "--group", "2", "--dim", "64", "--sequences", "2", "--rounds", "1",
		"--config", "../../benchmark/configs/config_full_twi.json",
	}
	var report benchReport
	_, stdout, _ := twilight(t, append(args, "--json")...)
	strictly(t, stdout, &report)
	const bytes = 512 * 2 * 64 * 2 // of keys and values
	if report.DenseBytes != bytes || report.Shape.Tokens != 512 || len(report.Results) != 2 {
		t.Fatalf("reported %+v", report)
	}
	dense, pruned := report.Results[0], report.Results[1]
	if dense.Name != "dense" || dense.Kept != 512 || dense.ReadBytes != bytes {
		t.Errorf("dense is %+v", dense)
	}
	if pruned.Name != "config_full_twi" || pruned.Candidates != 512 || !(pruned.Kept > 0 && pruned.Kept < 512) ||
		!(pruned.ReadBytes > 0 && pruned.ReadBytes < bytes) {
		t.Errorf("pruned is %+v", pruned)
	}
	_, plain, _ := twilight(t, append(args, "--through-service")...)
	if !strings.Contains(plain, "config_full_twi") || !strings.Contains(plain, "ms through service") {
		t.Errorf("printed\n%s", plain)
	}
}
