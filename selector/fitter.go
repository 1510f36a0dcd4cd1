package selector

import "github.com/twilight-sidecar/twilight/kv"

// Fitter is a Selector that does not serve every model.
type Fitter interface {
	Selector
	// Fits reports what keeps the method from serving a layer of a model, by the model's index, as a
	// *fault.Error whose field is the config's key at fault. A row of such a layer gets candidates
	// nevertheless, but not by the method.
	Fits(layer int, g *kv.Geometry) error
}
