package cli

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/replay"
	"github.com/twilight-sidecar/twilight/testdata"
)

//go:embed demo.json
var demoConfig []byte

type demoCmd struct {
	Group string `enum:",union,per_query_head" default:"" placeholder:"MODE" help:"What the query heads of a KV head share: union or per_query_head (per_query_head)."`
	JSON  bool   `name:"json" help:"Print the report as JSON, and nothing else, on stdout."`
	Out   string `type:"path" placeholder:"DIR" help:"Also write the heat map there, as kept.svg."`
}

func (*demoCmd) Help() string {
	return `Starts a daemon in this process on a temporary Unix socket, lends it keys and values of a real model (SmolLM2,
4,096 tokens of text) in shared memory, decodes 8 steps through the stream, and prints for every layer
and query head how many tokens were candidates, how many were kept, the share of the true attention they
hold, and how far the output is from dense attention.

    twilight demo
    twilight demo --group union --out pictures`
}

func (c *demoCmd) Run(ctx context.Context, term *terminal) (err error) {
	loaded, err := capture.Decode(testdata.SmolLM2)
	if err != nil {
		return err
	}
	config := demoConfig
	if c.Group != "" {
		if config, err = (replay.Overrides{Group: c.Group}).Apply(config); err != nil {
			return err
		}
	}
	conn, stop, err := serveHere(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	bar := newProgress(term.err)
	report, err := replay.Run(ctx, conn, replay.Options{
		Capture: loaded, Config: string(config), EngineName: "twilight demo", Seed: 1,
		Progress: func(done, all int) { bar.bar("demo", float64(done), float64(all)) },
	})
	bar.clear()
	if err != nil {
		return err
	}
	heat := newHeatmap(report)
	if c.Out != "" {
		var picture bytes.Buffer
		if err := heat.svg(&picture); err != nil {
			return err
		}
		if err := os.MkdirAll(c.Out, 0o755); err != nil { //nolint:gosec // a picture is for everybody
			return err
		}
		if err := os.WriteFile(filepath.Join(c.Out, "kept.svg"), picture.Bytes(), 0o644); err != nil { //nolint:gosec // likewise
			return err
		}
	}
	if c.JSON {
		return printJSON(term.out, report)
	}
	fmt.Fprint(term.out, "A daemon in this process served these attention layers over a Unix socket, out of shared memory.\n\n")
	describe(term.out, report, loaded)
	printHeads(term.out, report)
	fmt.Fprintln(term.out, "\nTokens kept, mean of the steps:")
	heat.print(term.out, coloursOf(term.out), columnsOf(term.out))
	if c.Out != "" {
		fmt.Fprintf(term.out, "\nThe picture is %s.\n", filepath.Join(c.Out, "kept.svg"))
	}
	return nil
}
