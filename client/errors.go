package client

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// Code says why a request failed. Codes are themselves errors, for errors.Is:
//
//	if errors.Is(err, client.ErrExhausted) { ... }
type Code uint32

// Codes that the daemon answers, numbered as in proto ErrorCode, which says what each means. After
// any of them the session goes on, and the daemon's state is as if the request had not been sent.
const (
	ErrInvalid Code = iota + 1
	ErrNotFound
	ErrAlreadyExists
	ErrStaleGeneration
	ErrPrecondition
	ErrOutOfRange
	ErrUnsupported
	ErrExhausted
	ErrPermission
	ErrDataLoss
	ErrDraining // or still testing itself: no new work either way
	ErrCancelled
	ErrDeadline
	ErrInternal
)

// Codes of the SDK's own.
const (
	// ErrLeaseLost: the stream broke under the request, or is broken. The session opens a fresh lease
	// by itself; until it is StateLive again, attend without Twilight. Then start anew with a Step.
	ErrLeaseLost Code = iota + 101
	// ErrClosed: the client, session, cache or buffer was closed.
	ErrClosed
	// ErrUnreachable: no daemon answers at the target.
	ErrUnreachable
)

func (c Code) Error() string {
	switch c {
	case ErrInvalid:
		return "invalid argument"
	case ErrNotFound:
		return "not found"
	case ErrAlreadyExists:
		return "already exists"
	case ErrStaleGeneration:
		return "stale generation"
	case ErrPrecondition:
		return "failed precondition"
	case ErrOutOfRange:
		return "out of range"
	case ErrUnsupported:
		return "unsupported"
	case ErrExhausted:
		return "resource exhausted"
	case ErrPermission:
		return "permission denied"
	case ErrDataLoss:
		return "data loss"
	case ErrDraining:
		return "draining"
	case ErrCancelled:
		return "cancelled"
	case ErrDeadline:
		return "deadline exceeded"
	case ErrInternal:
		return "internal error"
	case ErrLeaseLost:
		return "lease lost"
	case ErrClosed:
		return "closed"
	case ErrUnreachable:
		return "unreachable"
	}
	return fmt.Sprintf("error code %d", uint32(c))
}

// Error is a failed request.
type Error struct {
	Code Code
	// Field is the path of the field at fault within the request, named as in the proto
	// ("step.lengths[3]"); "" if none is.
	Field string
	// Message names the value and the remedy.
	Message string
	// Requested and Available are set for ErrExhausted, in the unit that Message names.
	Requested, Available uint64

	cause error
}

func (e *Error) Error() string {
	switch {
	case e.Message == "":
		return e.Code.Error()
	case e.Field == "":
		return e.Message
	}
	return e.Field + ": " + e.Message
}

// Unwrap returns the code and, if there is one, the error behind it, such as context.Canceled.
func (e *Error) Unwrap() []error {
	if e.cause == nil {
		return []error{e.Code}
	}
	return []error{e.Code, e.cause}
}

func errorf(code Code, field, format string, args ...any) *Error {
	return &Error{Code: code, Field: field, Message: fmt.Sprintf(format, args...)}
}

func leaseLost(cause error) *Error {
	return &Error{
		Code:    ErrLeaseLost,
		Message: fmt.Sprintf("the lease's stream broke (%v); start anew with a step once the session is live", cause),
		cause:   cause,
	}
}

func fromProto(e *twilightv1.Error) *Error {
	return &Error{
		Code:      Code(e.GetCode()),
		Field:     e.GetField(),
		Message:   e.GetMessage(),
		Requested: e.GetRequested(),
		Available: e.GetAvailable(),
	}
}

// fromStatus turns a gRPC error into an Error: the twilight.v1.Error in its details if it has one.
func fromStatus(err error) error {
	if err == nil {
		return nil
	}
	if e := (*Error)(nil); errors.As(err, &e) {
		return err
	}
	s := status.Convert(err)
	for _, detail := range s.Details() {
		if e, ok := detail.(*twilightv1.Error); ok {
			return fromProto(e)
		}
	}
	e := &Error{Code: ErrInternal, Message: s.Message(), cause: err}
	switch s.Code() {
	case codes.InvalidArgument:
		e.Code = ErrInvalid
	case codes.NotFound:
		e.Code = ErrNotFound
	case codes.AlreadyExists:
		e.Code = ErrAlreadyExists
	case codes.FailedPrecondition:
		e.Code = ErrPrecondition
	case codes.OutOfRange:
		e.Code = ErrOutOfRange
	case codes.Unimplemented:
		e.Code = ErrUnsupported
	case codes.ResourceExhausted:
		e.Code = ErrExhausted
	case codes.PermissionDenied, codes.Unauthenticated:
		e.Code = ErrPermission
	case codes.DataLoss:
		e.Code = ErrDataLoss
	case codes.Unavailable:
		e.Code = ErrUnreachable
	case codes.Canceled:
		e.Code, e.cause = ErrCancelled, context.Canceled
	case codes.DeadlineExceeded:
		e.Code, e.cause = ErrDeadline, context.DeadlineExceeded
	default:
	}
	return e
}
