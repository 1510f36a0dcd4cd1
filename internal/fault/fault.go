// Package fault says what is wrong with a request, in a form that every room can make and service/
// turns into the wire's errors.
package fault

import (
	"errors"
	"fmt"
)

// Kind classifies an Error. Kinds are themselves errors: errors.Is(err, fault.OutOfRange).
type Kind uint8

// The kinds; proto/twilight/v1/error.proto says what each means to an engine.
const (
	Internal Kind = iota
	Invalid
	NotFound
	AlreadyExists
	StaleGeneration
	Precondition
	OutOfRange
	Unsupported
	Exhausted
	Permission
	DataLoss
	Unavailable
	Cancelled
	Deadline
)

var kindNames = [...]string{
	"internal error", "invalid argument", "not found", "already exists", "stale generation",
	"failed precondition", "out of range", "unsupported", "resource exhausted", "permission denied",
	"data loss", "unavailable", "cancelled", "deadline exceeded",
}

func (k Kind) Error() string { return kindNames[k] }

// Code is the kind's number where only a number travels: the ErrorCode of the wire.
func (k Kind) Code() uint32 {
	if k == Internal {
		return uint32(Deadline) + 1
	}
	return uint32(k)
}

// Error is a fault in a request. Its text names the field, the value and the remedy, and never holds a
// handle, an address or tensor data.
type Error struct {
	Kind  Kind
	Field string // path within the request, as in "lengths[3]"; "" if none is at fault
	Text  string
	// Requested and Available are set for Exhausted, in the unit that Text names.
	Requested, Available uint64
}

func (e *Error) Error() string {
	if e.Field == "" {
		return e.Text
	}
	return e.Field + ": " + e.Text
}

func (e *Error) Unwrap() error { return e.Kind }

// Newf makes an Error. field may be empty.
func Newf(kind Kind, field, format string, args ...any) *Error {
	return &Error{Kind: kind, Field: field, Text: fmt.Sprintf(format, args...)}
}

// Exhaustedf makes an Error of kind Exhausted.
func Exhaustedf(field string, requested, available uint64, format string, args ...any) *Error {
	e := Newf(Exhausted, field, format, args...)
	e.Requested, e.Available = requested, available
	return e
}

// In puts prefix before the field of a fault within err, so that "lengths[3]" becomes
// "step.lengths[3]". Other errors pass unchanged.
func In(prefix string, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	in := *e
	switch {
	case in.Field == "":
		in.Field = prefix
	case in.Field[0] == '[':
		in.Field = prefix + in.Field
	default:
		in.Field = prefix + "." + in.Field
	}
	return &in
}
