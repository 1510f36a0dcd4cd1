package selector

// Stateful is a Selector that builds on other layers, other steps, or other rows of the layer. The device
// keeps what it needs, hands it over in the Row, and counts its bytes with the shadow's.
type Stateful interface {
	Selector
	Needs() Needs
}

// Needs is what a selector wants of a device besides a shadow. Its zero value is that of most selectors.
type Needs struct {
	Carry  bool // Row.Carry
	Scores bool // Row.Scores
	Shares bool // to be asked as an Allocator
}

// NeedsOf returns what a selector needs.
func NeedsOf(s Selector) Needs {
	if stateful, ok := s.(Stateful); ok {
		return stateful.Needs()
	}
	return Needs{}
}

// Carry is a list that layers of one step leave to later ones. A step begins with it empty, however the
// last one ended.
type Carry struct {
	Layer int     // the model's index of the layer that left the list
	List  []int32 // ascending positions; empty: none was left yet
}
