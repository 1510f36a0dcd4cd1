package capture

import (
	"encoding/json"
	"fmt"
)

// Oracle holds figures of dense attention on a capture, computed in float64 by another program.
type Oracle struct {
	Model      string              `json:"model"`
	TextSource string              `json:"text_source"`
	Positions  string              `json:"positions"`
	Note       string              `json:"note"`
	N          int                 `json:"n"`
	Scale      float64             `json:"scale"`
	Index      string              `json:"index"`
	Layers     map[int][][]Figures `json:"layers"` // [layer in the model][step][query head]
}

// Figures are the figures of one (layer, step, query head).
type Figures struct {
	Norm   float64        `json:"norm"`   // ||out||, to 10 digits
	Out4   [4]float64     `json:"out4"`   // the output's first 4 values, to 10 digits
	Budget map[string]int `json:"budget"` // by p: the fewest tokens whose weights sum to >= p
	Sink4  float64        `json:"sink4"`  // the weight of tokens 0..3, to 8 digits
}

// DecodeOracle reads an oracle file.
func DecodeOracle(data []byte) (*Oracle, error) {
	var o Oracle
	if err := json.Unmarshal(data, &o); err != nil {
		return nil, fmt.Errorf("capture: oracle: %w", err)
	}
	return &o, nil
}
