// Command cut makes a smaller capture out of a capture: some layers, some KV heads, every position
// and every decode step. It can cut the matching oracle file as well.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/twilight-sidecar/twilight/internal/capture"
)

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "cut:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("cut", flag.ContinueOnError)
	var layers, kvHeads ints
	in := flags.String("in", "", "capture to cut")
	out := flags.String("out", "", "capture to write")
	oracleIn := flags.String("oracle-in", "", "oracle of --in (optional)")
	oracleOut := flags.String("oracle-out", "", "oracle to write for --out")
	origin := flags.String("origin", "", "where the tensors come from, for the metadata")
	flags.Var(&layers, "layers", "layers to keep, their numbers in the model: 2,9,17")
	flags.Var(&kvHeads, "kv-heads", "KV heads to keep, with their query heads: 0,1")
	if err := flags.Parse(args); err != nil {
		return err
	}

	whole, err := capture.Open(*in)
	if err != nil {
		return err
	}
	small, err := capture.Cut(whole, layers, kvHeads)
	if err != nil {
		return err
	}
	small.Meta["cut"] = fmt.Sprintf("from %s: layers %s, KV heads %s with their query heads, all positions and steps",
		filepath.Base(*in), small.Meta["layers"], small.Meta["kv_heads"])
	if *origin != "" {
		small.Meta["origin"] = *origin
	}
	var file bytes.Buffer
	if err := capture.Write(&file, small); err != nil {
		return err
	}
	if err := publish(*out, file.Bytes()); err != nil {
		return err
	}
	if *oracleIn == "" {
		return nil
	}
	return cutOracle(*oracleIn, *oracleOut, whole, layers, kvHeads)
}

// cutOracle keeps of an oracle of whole the layers and heads that Cut kept of it.
func cutOracle(in, out string, whole *capture.Capture, layers, kvHeads []int) error {
	data, err := os.ReadFile(in)
	if err != nil {
		return err
	}
	oracle, err := capture.DecodeOracle(data)
	if err != nil {
		return err
	}
	kept := make(map[int][][]capture.Figures, len(layers))
	for _, l := range layers {
		for s, heads := range oracle.Layers[l] {
			if len(heads) != whole.QueryHeads {
				return fmt.Errorf("%s: layer %d, step %d has %d heads, the capture %d",
					in, l, s, len(heads), whole.QueryHeads)
			}
			var figures []capture.Figures
			for _, h := range kvHeads {
				figures = append(figures, heads[h*whole.Group():(h+1)*whole.Group()]...)
			}
			kept[l] = append(kept[l], figures)
		}
		if len(kept[l]) != whole.Steps {
			return fmt.Errorf("%s: layer %d has %d steps, the capture %d", in, l, len(kept[l]), whole.Steps)
		}
	}
	oracle.Layers = kept
	var file bytes.Buffer
	encoder := json.NewEncoder(&file)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(oracle); err != nil {
		return err
	}
	return publish(out, file.Bytes())
}

func publish(path string, data []byte) error {
	return os.WriteFile(path, data, 0o644) //nolint:gosec // G306: the files are for everyone to read
}

// ints is a flag of comma-separated numbers.
type ints []int

func (list *ints) String() string { return strings.Trim(fmt.Sprint([]int(*list)), "[]") }

func (list *ints) Set(text string) error {
	for field := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(field))
		if err != nil {
			return fmt.Errorf("%q is no number", field)
		}
		*list = append(*list, n)
	}
	return nil
}
