package fault_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

func TestKindsHaveNames(t *testing.T) {
	t.Parallel()
	seen := map[string]fault.Kind{}
	for k := fault.Internal; k <= fault.Unavailable; k++ {
		name := k.Error()
		if other, ok := seen[name]; ok || name == "" {
			t.Errorf("kinds %d and %d are both called %q", other, k, name)
		}
		seen[name] = k
	}
}

func TestErrorIsItsKind(t *testing.T) {
	t.Parallel()
	err := fmt.Errorf("step 7: %w", fault.Newf(fault.OutOfRange, "lengths[3]", "%d is not in [0, %d)", 9, 8))
	if got, want := err.Error(), "step 7: lengths[3]: 9 is not in [0, 8)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !errors.Is(err, fault.OutOfRange) || errors.Is(err, fault.Invalid) {
		t.Errorf("%v is of another kind", err)
	}
	if got := fault.Newf(fault.Internal, "", "no field").Error(); got != "no field" {
		t.Errorf("without a field: %q", got)
	}
}

func TestExhausted(t *testing.T) {
	t.Parallel()
	err := fault.Exhaustedf("pages", 5, 3, "%d pages are left", 3)
	if !errors.Is(err, fault.Exhausted) || err.Requested != 5 || err.Available != 3 {
		t.Errorf("got %+v", err)
	}
}

func TestIn(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ field, want string }{
		{"", "step"},
		{"lengths[3]", "step.lengths[3]"},
		{"[3]", "step[3]"},
	} {
		inner := fault.Exhaustedf(c.field, 5, 3, "text")
		err := fault.In("step", fmt.Errorf("wrapped: %w", inner))
		var f *fault.Error
		if !errors.As(err, &f) {
			t.Fatalf("%v is no fault", err)
		}
		if f.Field != c.want || f.Kind != fault.Exhausted || f.Requested != 5 || f.Available != 3 || f.Text != "text" {
			t.Errorf("%q became %+v, want %s", c.field, f, c.want)
		}
		if inner.Field != c.field {
			t.Errorf("the inner error became %+v", inner)
		}
	}
	other := errors.New("other")
	if err := fault.In("step", other); !errors.Is(err, other) || err.Error() != "other" {
		t.Errorf("an error that is no fault became %v", err)
	}
	if err := fault.In("step", nil); err != nil {
		t.Errorf("no error became %v", err)
	}
}
