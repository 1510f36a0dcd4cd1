package duo

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strconv"

	"github.com/twilight-sidecar/twilight/selector"
)

// Inline replaces heads_path in a Twilight config by the scores of the head file that it names, read by
// read: what a client does before it sends the config. A config that names no head file is returned as it
// is.
//
// The file is DuoAttention's full_attention_heads.tsv: a line for each layer of the model, with a number
// for each KV head; numbers outside [0, 1] count as the nearest in it, as there.
func Inline(config []byte, read func(path string) ([]byte, error)) ([]byte, error) {
	return selector.Inline(config, "duo", "heads_path", "heads", read,
		func(file []byte, _ map[string]json.RawMessage) (any, error) { return parse(file) })
}

func parse(file []byte) ([][]float64, error) {
	var heads [][]float64
	for line := range bytes.Lines(file) {
		var scores []float64
		for field := range bytes.FieldsSeq(line) {
			score, err := strconv.ParseFloat(string(field), 64)
			if err != nil || math.IsNaN(score) {
				return nil, fmt.Errorf("line %d has %.40q, expected a number for each KV head", len(heads)+1, field)
			}
			scores = append(scores, min(max(score, 0), 1))
		}
		if len(scores) == 0 || len(heads) > 0 && len(scores) != len(heads[0]) {
			return nil, fmt.Errorf("line %d has %d numbers, expected one for each KV head", len(heads)+1, len(scores))
		}
		heads = append(heads, scores)
	}
	return heads, nil
}
