package pipeline

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// Faults are all that is wrong with a config, no field twice: first what cannot be read, then what is out
// of range. To errors.As they are also one *fault.Error, that of the first field, whose text names others.
type Faults []*fault.Error

const (
	mostFaults = 100 // that are looked for
	mostNamed  = 20  // in one text
)

func (f Faults) Error() string {
	var lines []string
	for _, one := range f {
		lines = append(lines, one.Error())
	}
	return strings.Join(lines, "\n")
}

// Unwrap makes errors.Is find the kind of each.
func (f Faults) Unwrap() []error {
	var list []error
	for _, one := range f {
		list = append(list, one)
	}
	return list
}

// As is for errors.As.
func (f Faults) As(target any) bool {
	to, ok := target.(**fault.Error)
	if !ok || len(f) == 0 {
		return false
	}
	merged := *f[0]
	for i, other := range f[1:] {
		if i == mostNamed {
			merged.Text += fmt.Sprintf("; and %d more", len(f)-1-i)
			break
		}
		merged.Text += "; " + other.Error()
	}
	*to = &merged
	return true
}

// add takes up what err, nil for nothing, says of the value of key; "" adds nothing to its fields.
func (f *Faults) add(key string, err error) {
	var list Faults
	if one := (*fault.Error)(nil); !errors.As(err, &list) && errors.As(err, &one) {
		list = Faults{one}
	}
	for _, one := range list {
		if key != "" {
			one, _ = errors.AsType[*fault.Error](fault.In(key, one))
		}
		if len(*f) < mostFaults && !slices.ContainsFunc(*f, func(had *fault.Error) bool { return had.Field == one.Field }) {
			*f = append(*f, one)
		}
	}
}

// err returns nil, the one fault, or all.
func (f Faults) err() error {
	switch len(f) {
	case 0:
		return nil
	case 1:
		return f[0]
	}
	return f
}
