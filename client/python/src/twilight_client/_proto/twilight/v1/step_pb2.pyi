from . import error_pb2 as _error_pb2
from . import memory_pb2 as _memory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIST_MODE_UNSPECIFIED: _ClassVar[ListMode]
    LIST_MODE_INLINE: _ClassVar[ListMode]
    LIST_MODE_BUFFER: _ClassVar[ListMode]

class Path(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PATH_UNSPECIFIED: _ClassVar[Path]
    PATH_SPARSE: _ClassVar[Path]
    PATH_DENSE: _ClassVar[Path]
    PATH_VOID: _ClassVar[Path]

class PathReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PATH_REASON_UNSPECIFIED: _ClassVar[PathReason]
    PATH_REASON_CONFIGURED: _ClassVar[PathReason]
    PATH_REASON_SKIPPED_LAYER: _ClassVar[PathReason]
    PATH_REASON_SHORT_CONTEXT: _ClassVar[PathReason]
    PATH_REASON_KEPT_NEARLY_ALL: _ClassVar[PathReason]
    PATH_REASON_UNSUPPORTED_SHAPE: _ClassVar[PathReason]
    PATH_REASON_EMPTY: _ClassVar[PathReason]
    PATH_REASON_BAD_ROW: _ClassVar[PathReason]
    PATH_REASON_NOT_FINITE: _ClassVar[PathReason]
LIST_MODE_UNSPECIFIED: ListMode
LIST_MODE_INLINE: ListMode
LIST_MODE_BUFFER: ListMode
PATH_UNSPECIFIED: Path
PATH_SPARSE: Path
PATH_DENSE: Path
PATH_VOID: Path
PATH_REASON_UNSPECIFIED: PathReason
PATH_REASON_CONFIGURED: PathReason
PATH_REASON_SKIPPED_LAYER: PathReason
PATH_REASON_SHORT_CONTEXT: PathReason
PATH_REASON_KEPT_NEARLY_ALL: PathReason
PATH_REASON_UNSUPPORTED_SHAPE: PathReason
PATH_REASON_EMPTY: PathReason
PATH_REASON_BAD_ROW: PathReason
PATH_REASON_NOT_FINITE: PathReason

class Step(_message.Message):
    __slots__ = ("cache_id", "step_id", "sequences", "lengths", "first_valid", "table", "claims", "slots", "ended", "index_only", "device", "armed", "traceparent", "tracestate")
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    FIRST_VALID_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    INDEX_ONLY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ARMED_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    cache_id: int
    step_id: int
    sequences: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    first_valid: _containers.RepeatedScalarFieldContainer[int]
    table: TableUpdate
    claims: Claims
    slots: WrittenSlots
    ended: _containers.RepeatedScalarFieldContainer[int]
    index_only: bool
    device: DeviceBatch
    armed: Armed
    traceparent: str
    tracestate: str
    def __init__(self, cache_id: _Optional[int] = ..., step_id: _Optional[int] = ..., sequences: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., first_valid: _Optional[_Iterable[int]] = ..., table: _Optional[_Union[TableUpdate, _Mapping]] = ..., claims: _Optional[_Union[Claims, _Mapping]] = ..., slots: _Optional[_Union[WrittenSlots, _Mapping]] = ..., ended: _Optional[_Iterable[int]] = ..., index_only: bool = ..., device: _Optional[_Union[DeviceBatch, _Mapping]] = ..., armed: _Optional[_Union[Armed, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class TableUpdate(_message.Message):
    __slots__ = ("starts", "counts", "entries", "v_entries")
    STARTS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    V_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    entries: _containers.RepeatedScalarFieldContainer[int]
    v_entries: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, starts: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., entries: _Optional[_Iterable[int]] = ..., v_entries: _Optional[_Iterable[int]] = ...) -> None: ...

class Claims(_message.Message):
    __slots__ = ("unchanged_prefix", "prefix_of", "truncate_to")
    UNCHANGED_PREFIX_FIELD_NUMBER: _ClassVar[int]
    PREFIX_OF_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_TO_FIELD_NUMBER: _ClassVar[int]
    unchanged_prefix: _containers.RepeatedScalarFieldContainer[int]
    prefix_of: _containers.RepeatedScalarFieldContainer[int]
    truncate_to: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, unchanged_prefix: _Optional[_Iterable[int]] = ..., prefix_of: _Optional[_Iterable[int]] = ..., truncate_to: _Optional[_Iterable[int]] = ...) -> None: ...

class WrittenSlots(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ...) -> None: ...

class DeviceBatch(_message.Message):
    __slots__ = ("batch", "lengths", "table", "table_stride", "slots", "num_slots", "first_valid", "max_length")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    TABLE_STRIDE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_VALID_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    batch: int
    lengths: _memory_pb2.Location
    table: _memory_pb2.Location
    table_stride: int
    slots: _memory_pb2.Location
    num_slots: int
    first_valid: _memory_pb2.Location
    max_length: int
    def __init__(self, batch: _Optional[int] = ..., lengths: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., table: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., table_stride: _Optional[int] = ..., slots: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., num_slots: _Optional[int] = ..., first_valid: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., max_length: _Optional[int] = ...) -> None: ...

class Armed(_message.Message):
    __slots__ = ("layers", "step", "status", "wait_timeout_ms", "as_before", "layer_results")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    WAIT_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    AS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LAYER_RESULTS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[ArmedLayer]
    step: _memory_pb2.Location
    status: _memory_pb2.Location
    wait_timeout_ms: int
    as_before: bool
    layer_results: bool
    def __init__(self, layers: _Optional[_Iterable[_Union[ArmedLayer, _Mapping]]] = ..., step: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., status: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., wait_timeout_ms: _Optional[int] = ..., as_before: bool = ..., layer_results: bool = ...) -> None: ...

class ArmedLayer(_message.Message):
    __slots__ = ("layer", "ready", "done", "query", "output", "lists")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LISTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ready: _memory_pb2.Location
    done: _memory_pb2.Location
    query: Tensor
    output: Tensor
    lists: ListBuffer
    def __init__(self, layer: _Optional[int] = ..., ready: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., done: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., query: _Optional[_Union[Tensor, _Mapping]] = ..., output: _Optional[_Union[Tensor, _Mapping]] = ..., lists: _Optional[_Union[ListBuffer, _Mapping]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("index", "armed")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ARMED_FIELD_NUMBER: _ClassVar[int]
    index: IndexStats
    armed: bool
    def __init__(self, index: _Optional[_Union[IndexStats, _Mapping]] = ..., armed: bool = ...) -> None: ...

class IndexStats(_message.Message):
    __slots__ = ("tokens_indexed", "tokens_claimed", "chunks_drifted", "statistics_refreshed")
    TOKENS_INDEXED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CLAIMED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_DRIFTED_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_REFRESHED_FIELD_NUMBER: _ClassVar[int]
    tokens_indexed: int
    tokens_claimed: int
    chunks_drifted: int
    statistics_refreshed: int
    def __init__(self, tokens_indexed: _Optional[int] = ..., tokens_claimed: _Optional[int] = ..., chunks_drifted: _Optional[int] = ..., statistics_refreshed: _Optional[int] = ...) -> None: ...

class CancelStep(_message.Message):
    __slots__ = ("cache_id", "step_id")
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    cache_id: int
    step_id: int
    def __init__(self, cache_id: _Optional[int] = ..., step_id: _Optional[int] = ...) -> None: ...

class StepCancelled(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ArmedStepDone(_message.Message):
    __slots__ = ("step_id", "error", "layers", "cache_id")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    error: _error_pb2.Error
    layers: _containers.RepeatedCompositeFieldContainer[LayerResult]
    cache_id: int
    def __init__(self, step_id: _Optional[int] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerResult, _Mapping]]] = ..., cache_id: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("at", "row_stride", "head_stride")
    AT_FIELD_NUMBER: _ClassVar[int]
    ROW_STRIDE_FIELD_NUMBER: _ClassVar[int]
    HEAD_STRIDE_FIELD_NUMBER: _ClassVar[int]
    at: _memory_pb2.Location
    row_stride: int
    head_stride: int
    def __init__(self, at: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., row_stride: _Optional[int] = ..., head_stride: _Optional[int] = ...) -> None: ...

class ListBuffer(_message.Message):
    __slots__ = ("lists", "capacity", "counts")
    LISTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    lists: _memory_pb2.Location
    capacity: int
    counts: _memory_pb2.Location
    def __init__(self, lists: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., capacity: _Optional[int] = ..., counts: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("cache_id", "step_id", "layer", "query_inline", "query_tensor", "output_tensor", "list_mode", "list_buffer", "p", "token_budget", "lists_only", "observation")
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    QUERY_INLINE_FIELD_NUMBER: _ClassVar[int]
    QUERY_TENSOR_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TENSOR_FIELD_NUMBER: _ClassVar[int]
    LIST_MODE_FIELD_NUMBER: _ClassVar[int]
    LIST_BUFFER_FIELD_NUMBER: _ClassVar[int]
    P_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    LISTS_ONLY_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    cache_id: int
    step_id: int
    layer: int
    query_inline: bytes
    query_tensor: Tensor
    output_tensor: Tensor
    list_mode: ListMode
    list_buffer: ListBuffer
    p: _containers.RepeatedScalarFieldContainer[float]
    token_budget: _containers.RepeatedScalarFieldContainer[int]
    lists_only: bool
    observation: Observation
    def __init__(self, cache_id: _Optional[int] = ..., step_id: _Optional[int] = ..., layer: _Optional[int] = ..., query_inline: _Optional[bytes] = ..., query_tensor: _Optional[_Union[Tensor, _Mapping]] = ..., output_tensor: _Optional[_Union[Tensor, _Mapping]] = ..., list_mode: _Optional[_Union[ListMode, str]] = ..., list_buffer: _Optional[_Union[ListBuffer, _Mapping]] = ..., p: _Optional[_Iterable[float]] = ..., token_budget: _Optional[_Iterable[int]] = ..., lists_only: bool = ..., observation: _Optional[_Union[Observation, _Mapping]] = ...) -> None: ...

class Observation(_message.Message):
    __slots__ = ("window", "window_queries_inline", "window_queries_at", "mass_tokens", "mass_inline", "mass_at")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WINDOW_QUERIES_INLINE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_QUERIES_AT_FIELD_NUMBER: _ClassVar[int]
    MASS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MASS_INLINE_FIELD_NUMBER: _ClassVar[int]
    MASS_AT_FIELD_NUMBER: _ClassVar[int]
    window: int
    window_queries_inline: bytes
    window_queries_at: _memory_pb2.Location
    mass_tokens: int
    mass_inline: bytes
    mass_at: _memory_pb2.Location
    def __init__(self, window: _Optional[int] = ..., window_queries_inline: _Optional[bytes] = ..., window_queries_at: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ..., mass_tokens: _Optional[int] = ..., mass_inline: _Optional[bytes] = ..., mass_at: _Optional[_Union[_memory_pb2.Location, _Mapping]] = ...) -> None: ...

class LayerResult(_message.Message):
    __slots__ = ("candidates", "kept", "paths", "reasons", "lists", "truncated", "output", "estimated_mass", "estimated_coverage", "audited", "true_mass", "output_error", "index", "timing", "cache_bytes_read", "shadow_bytes_read")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    LISTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_MASS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_COVERAGE_FIELD_NUMBER: _ClassVar[int]
    AUDITED_FIELD_NUMBER: _ClassVar[int]
    TRUE_MASS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_ERROR_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedScalarFieldContainer[int]
    kept: _containers.RepeatedScalarFieldContainer[int]
    paths: _containers.RepeatedScalarFieldContainer[Path]
    reasons: _containers.RepeatedScalarFieldContainer[PathReason]
    lists: _containers.RepeatedScalarFieldContainer[int]
    truncated: _containers.RepeatedScalarFieldContainer[int]
    output: bytes
    estimated_mass: _containers.RepeatedScalarFieldContainer[float]
    estimated_coverage: _containers.RepeatedScalarFieldContainer[float]
    audited: _containers.RepeatedScalarFieldContainer[int]
    true_mass: _containers.RepeatedScalarFieldContainer[float]
    output_error: _containers.RepeatedScalarFieldContainer[float]
    index: IndexStats
    timing: Timing
    cache_bytes_read: int
    shadow_bytes_read: int
    def __init__(self, candidates: _Optional[_Iterable[int]] = ..., kept: _Optional[_Iterable[int]] = ..., paths: _Optional[_Iterable[_Union[Path, str]]] = ..., reasons: _Optional[_Iterable[_Union[PathReason, str]]] = ..., lists: _Optional[_Iterable[int]] = ..., truncated: _Optional[_Iterable[int]] = ..., output: _Optional[bytes] = ..., estimated_mass: _Optional[_Iterable[float]] = ..., estimated_coverage: _Optional[_Iterable[float]] = ..., audited: _Optional[_Iterable[int]] = ..., true_mass: _Optional[_Iterable[float]] = ..., output_error: _Optional[_Iterable[float]] = ..., index: _Optional[_Union[IndexStats, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., cache_bytes_read: _Optional[int] = ..., shadow_bytes_read: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("wall_ns", "index_ns", "select_ns", "prune_ns", "attend_ns")
    WALL_NS_FIELD_NUMBER: _ClassVar[int]
    INDEX_NS_FIELD_NUMBER: _ClassVar[int]
    SELECT_NS_FIELD_NUMBER: _ClassVar[int]
    PRUNE_NS_FIELD_NUMBER: _ClassVar[int]
    ATTEND_NS_FIELD_NUMBER: _ClassVar[int]
    wall_ns: int
    index_ns: int
    select_ns: int
    prune_ns: int
    attend_ns: int
    def __init__(self, wall_ns: _Optional[int] = ..., index_ns: _Optional[int] = ..., select_ns: _Optional[int] = ..., prune_ns: _Optional[int] = ..., attend_ns: _Optional[int] = ...) -> None: ...
