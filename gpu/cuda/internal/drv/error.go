//go:build linux && cgo && cuda

package drv

// #include "driver.h"
import "C"

import (
	"fmt"
	"reflect"
)

// Code is a CUresult. Codes are themselves errors: errors.Is(err, drv.OutOfMemory).
type Code int

// The codes that callers tell apart; the driver knows more.
const (
	OutOfMemory  Code = 2
	NotPermitted Code = 800
	NotSupported Code = 801

	// InvalidContext at IPCOpen means that the driver takes the memory for this process's own.
	InvalidContext Code = 201
)

func (c Code) Error() string {
	var name *C.char
	if C.cuGetErrorName(C.CUresult(c), &name) != 0 || name == nil {
		return fmt.Sprintf("CUDA error %d", int(c))
	}
	return fmt.Sprintf("%s (%d)", C.GoString(name), int(c))
}

// Sticky says that the error ended the context: every later call fails with it, and only a new
// process can go on.
func (c Code) Sticky() bool {
	switch c {
	case 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721:
		return true
	default:
		return false
	}
}

// Error is a driver call that failed.
type Error struct {
	Op   string
	Code Code
}

func (e *Error) Error() string { return e.Op + ": " + e.Code.Error() }

func (e *Error) Unwrap() error { return e.Code }

func check(op string, result C.CUresult) error {
	if result == 0 {
		return nil
	}
	return &Error{Op: op, Code: Code(result)}
}

// Wrap makes an Error of one that gorgonia.org/cu returned, whose type it does not export.
func Wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	if v := reflect.ValueOf(err); v.Kind() == reflect.Int {
		return &Error{Op: op, Code: Code(v.Int())}
	}
	return fmt.Errorf("%s: %w", op, err)
}
