package selector

import "github.com/twilight-sidecar/twilight/kv"

// Fitter is a Selector that does not serve every model.
type Fitter interface {
	Selector
	// Fits reports what keeps the method from serving a layer, the model's index, of a model, as a
	// *fault.Error whose field is the config's key at fault. Where it does, Select's candidates are all
	// tokens.
	Fits(layer int, g *kv.Geometry) error
}
