// Package registry finds methods by the names that a config gives them. A registry is a value, filled
// by one explicit list; nothing registers itself.
package registry

import (
	"maps"
	"slices"
	"strings"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// Method is an entry: a named way to do something, whose configuration is a C.
type Method[C any] struct {
	Type    string   // the config's "type"
	Aliases []string // other values of "type" that mean the same
	Default func() C // makes a configuration that holds the method's defaults
}

// Registry holds the methods of one kind. Names are compared without regard to case. A filled registry
// may be read by any number of goroutines.
type Registry[C any] struct {
	kind    string
	methods map[string]Method[C] // by type
	types   map[string]string    // by type and alias, in lower case
}

// New makes a registry of the given methods. The kind is a noun for errors: "selector".
func New[C any](kind string, methods ...Method[C]) (*Registry[C], error) {
	r := &Registry[C]{kind: kind, methods: make(map[string]Method[C]), types: make(map[string]string)}
	for _, m := range methods {
		if err := r.Add(m); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Add enters a method. A name that is taken, as a type or as an alias, is an error of kind
// fault.AlreadyExists and leaves the registry as it was.
func (r *Registry[C]) Add(m Method[C]) error {
	types := maps.Clone(r.types)
	for _, name := range append([]string{m.Type}, m.Aliases...) {
		lower := strings.ToLower(name)
		if by, taken := types[lower]; taken {
			return fault.Newf(fault.AlreadyExists, "",
				"%s %q: the name %q already stands for %q", r.kind, m.Type, name, by)
		}
		types[lower] = m.Type
	}
	r.types = types
	r.methods[m.Type] = m
	return nil
}

// Lookup finds a method by its type or an alias. An unknown name is an error of kind
// fault.Unsupported, with the field "type", that lists what is available.
func (r *Registry[C]) Lookup(name string) (Method[C], error) {
	if m, ok := r.methods[r.types[strings.ToLower(name)]]; ok {
		return m, nil
	}
	return Method[C]{}, fault.Newf(fault.Unsupported, "type",
		"%s type %q is not available; available: %s", r.kind, name, r)
}

// Types lists the methods' types, sorted.
func (r *Registry[C]) Types() []string { return slices.Sorted(maps.Keys(r.methods)) }

// String lists the methods with their aliases, sorted: "none (full), quest".
func (r *Registry[C]) String() string {
	list := r.Types()
	for i, name := range list {
		if aliases := r.methods[name].Aliases; len(aliases) > 0 {
			list[i] += " (" + strings.Join(aliases, ", ") + ")"
		}
	}
	return strings.Join(list, ", ")
}
