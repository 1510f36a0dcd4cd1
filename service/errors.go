package service

import (
	"context"
	"errors"
	"fmt"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"buf.build/go/protovalidate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/twilight-sidecar/twilight/internal/fault"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// errorCodes is the one table from faults to what engines see: the code within a lease, and the status
// of a unary call or of the stream's end.
var errorCodes = [...]struct {
	code   twilightv1.ErrorCode
	status codes.Code
}{
	fault.Internal:        {twilightv1.ErrorCode_ERROR_CODE_INTERNAL, codes.Internal},
	fault.Invalid:         {twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, codes.InvalidArgument},
	fault.NotFound:        {twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND, codes.NotFound},
	fault.AlreadyExists:   {twilightv1.ErrorCode_ERROR_CODE_ALREADY_EXISTS, codes.AlreadyExists},
	fault.StaleGeneration: {twilightv1.ErrorCode_ERROR_CODE_STALE_GENERATION, codes.FailedPrecondition},
	fault.Precondition:    {twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION, codes.FailedPrecondition},
	fault.OutOfRange:      {twilightv1.ErrorCode_ERROR_CODE_OUT_OF_RANGE, codes.OutOfRange},
	fault.Unsupported:     {twilightv1.ErrorCode_ERROR_CODE_UNSUPPORTED, codes.Unimplemented},
	fault.Exhausted:       {twilightv1.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, codes.ResourceExhausted},
	fault.Permission:      {twilightv1.ErrorCode_ERROR_CODE_PERMISSION_DENIED, codes.PermissionDenied},
	fault.DataLoss:        {twilightv1.ErrorCode_ERROR_CODE_DATA_LOSS, codes.DataLoss},
	fault.Unavailable:     {twilightv1.ErrorCode_ERROR_CODE_UNAVAILABLE, codes.Unavailable},
	fault.Cancelled:       {twilightv1.ErrorCode_ERROR_CODE_CANCELLED, codes.Canceled},
	fault.Deadline:        {twilightv1.ErrorCode_ERROR_CODE_DEADLINE_EXCEEDED, codes.DeadlineExceeded},
}

// internalText is all that an engine learns of an error that no room meant it to see.
const internalText = "internal error of the daemon: its log has the details"

// toError says an error in the words of the wire, and with which status a call ends by it.
func toError(err error) (*twilightv1.Error, codes.Code) {
	var f *fault.Error
	var invalid *protovalidate.ValidationError
	switch {
	case errors.As(err, &f):
		row := errorCodes[f.Kind]
		return &twilightv1.Error{
			Code: row.code, Field: f.Field, Message: f.Text, Requested: f.Requested, Available: f.Available,
		}, row.status
	case errors.As(err, &invalid) && len(invalid.Violations) > 0:
		v := invalid.Violations[0]
		return violationError(v.Proto, v.FieldValue), codes.InvalidArgument
	case errors.Is(err, context.Canceled):
		return &twilightv1.Error{
			Code: twilightv1.ErrorCode_ERROR_CODE_CANCELLED, Message: "the request was cancelled while it ran",
		}, codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return &twilightv1.Error{
			Code: twilightv1.ErrorCode_ERROR_CODE_DEADLINE_EXCEEDED, Message: "the request ran out of time",
		}, codes.DeadlineExceeded
	}
	return &twilightv1.Error{Code: twilightv1.ErrorCode_ERROR_CODE_INTERNAL, Message: internalText}, codes.Internal
}

// violationError names the field, its rule and, where it is a number, its value: bytes may be secret.
func violationError(v *validate.Violation, value protoreflect.Value) *twilightv1.Error {
	text := v.GetMessage()
	switch number := value.Interface().(type) {
	case int32, int64, uint32, uint64, float32, float64, protoreflect.EnumNumber:
		text = fmt.Sprintf("is %v, but %s", number, text)
	}
	return &twilightv1.Error{
		Code:    twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT,
		Field:   protovalidate.FieldPathString(v.GetField()),
		Message: text,
	}
}

// toStatus says the error of a call as a status that carries a twilight.v1.Error. What is a status
// already, as interceptors make them, keeps its code and text.
func (s *Server) toStatus(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if st, is := status.FromError(err); is {
		detail := violationDetail(st)
		if detail == nil {
			return err
		}
		return withDetail(st, detail)
	}
	told := Status(err)
	if status.Code(told) == codes.Internal {
		s.logger.ErrorContext(ctx, "call failed", "error", err)
	}
	return told
}

// Status says an error, unless it is a status, as one that carries a twilight.v1.Error.
func Status(err error) error {
	if _, is := status.FromError(err); is {
		return err
	}
	detail, code := toError(err)
	text := detail.GetMessage()
	if detail.GetField() != "" {
		text = detail.GetField() + ": " + text
	}
	return withDetail(status.New(code, text), detail)
}

func withDetail(st *status.Status, detail *twilightv1.Error) error {
	if detailed, err := st.WithDetails(detail); err == nil {
		st = detailed
	}
	return st.Err()
}

// violationDetail reads what protovalidate's interceptor found, nil if it is not at fault.
func violationDetail(st *status.Status) *twilightv1.Error {
	for _, detail := range st.Details() {
		if found, ok := detail.(*validate.Violations); ok && len(found.GetViolations()) > 0 {
			return violationError(found.GetViolations()[0], protoreflect.Value{})
		}
	}
	return nil
}
