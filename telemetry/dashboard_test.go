package telemetry

import (
	"context"
	"encoding/json"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/kv"
)

// The dashboard asks for series and labels that are there.
func TestDashboard(t *testing.T) {
	t.Parallel()
	told, _ := started(t)
	l := leased(told, 1)
	defer l.Close()
	addCache(l)
	stepped(l, 1, sampledParent, 100)
	r := result(1, 20)
	r.Audited, r.TrueMass, r.OutputError = []uint32{1}, []float32{.9}, []float32{.1}
	for _, layer := range []int{4, 5, 6} {
		layered(l, layer, r)
	}
	l.BeginStep(context.Background(), l.Received(), &Step{Cache: 1, ID: 2})
	l.EndStep(&kv.IndexStats{}, &Failure{Code: "internal"})
	told.GPU("GPU-1", true, true)
	told.EndedWorker("ended")
	answer := httptest.NewRecorder()
	told.Handler(Admin{}).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	scraped := answer.Body.String()

	text, err := os.ReadFile("../deploy/grafana/twilight.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`\b(twilight|otel|error)_\w+`)
	asked := 0
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			for _, series := range name.FindAllString(target.Expr, -1) {
				asked++
				if !regexp.MustCompile(`(?m)^`+series+`[ {]`).MatchString(scraped) && !regexp.MustCompile(`[{,]`+series+`="`).MatchString(scraped) {
					t.Errorf("%s: %s is not scraped", panel.Title, series)
				}
			}
		}
	}
	if asked < 50 {
		t.Errorf("only %d names were asked for", asked)
	}
}

// A metric has one name and says what it is.
func TestUniqueNames(t *testing.T) {
	t.Parallel()
	told, _ := started(t)
	l := leased(told, 1)
	defer l.Close()
	addCache(l)
	stepped(l, 1, "", 100)
	layered(l, 4, result(1, 20))
	data, err := told.metrics.Produce(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range data[0].Metrics {
		names = append(names, m.Name)
		if m.Description == "" {
			t.Errorf("%s says nothing", m.Name)
		}
	}
	slices.Sort(names)
	if len(slices.Compact(slices.Clone(names))) != len(names) || len(names) < 20 {
		t.Errorf("names %v", names)
	}
}
