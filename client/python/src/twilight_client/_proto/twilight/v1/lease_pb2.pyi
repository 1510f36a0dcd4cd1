from . import error_pb2 as _error_pb2
from . import memory_pb2 as _memory_pb2
from . import step_pb2 as _step_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseRequest(_message.Message):
    __slots__ = ("request_id", "register_region", "release_region", "register_cache", "release_cache", "step", "layer", "cancel_step")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTER_REGION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_REGION_FIELD_NUMBER: _ClassVar[int]
    REGISTER_CACHE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_CACHE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CANCEL_STEP_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    register_region: _memory_pb2.RegisterRegion
    release_region: _memory_pb2.ReleaseRegion
    register_cache: _memory_pb2.RegisterCache
    release_cache: _memory_pb2.ReleaseCache
    step: _step_pb2.Step
    layer: _step_pb2.Layer
    cancel_step: _step_pb2.CancelStep
    def __init__(self, request_id: _Optional[int] = ..., register_region: _Optional[_Union[_memory_pb2.RegisterRegion, _Mapping]] = ..., release_region: _Optional[_Union[_memory_pb2.ReleaseRegion, _Mapping]] = ..., register_cache: _Optional[_Union[_memory_pb2.RegisterCache, _Mapping]] = ..., release_cache: _Optional[_Union[_memory_pb2.ReleaseCache, _Mapping]] = ..., step: _Optional[_Union[_step_pb2.Step, _Mapping]] = ..., layer: _Optional[_Union[_step_pb2.Layer, _Mapping]] = ..., cancel_step: _Optional[_Union[_step_pb2.CancelStep, _Mapping]] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("request_id", "region_registered", "region_released", "cache_registered", "cache_released", "step_result", "layer_result", "step_cancelled", "error", "draining", "armed_step_done")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REGION_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    REGION_RELEASED_FIELD_NUMBER: _ClassVar[int]
    CACHE_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    CACHE_RELEASED_FIELD_NUMBER: _ClassVar[int]
    STEP_RESULT_FIELD_NUMBER: _ClassVar[int]
    LAYER_RESULT_FIELD_NUMBER: _ClassVar[int]
    STEP_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ARMED_STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    region_registered: _memory_pb2.RegionRegistered
    region_released: _memory_pb2.RegionReleased
    cache_registered: _memory_pb2.CacheRegistered
    cache_released: _memory_pb2.CacheReleased
    step_result: _step_pb2.StepResult
    layer_result: _step_pb2.LayerResult
    step_cancelled: _step_pb2.StepCancelled
    error: _error_pb2.Error
    draining: Draining
    armed_step_done: _step_pb2.ArmedStepDone
    def __init__(self, request_id: _Optional[int] = ..., region_registered: _Optional[_Union[_memory_pb2.RegionRegistered, _Mapping]] = ..., region_released: _Optional[_Union[_memory_pb2.RegionReleased, _Mapping]] = ..., cache_registered: _Optional[_Union[_memory_pb2.CacheRegistered, _Mapping]] = ..., cache_released: _Optional[_Union[_memory_pb2.CacheReleased, _Mapping]] = ..., step_result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., layer_result: _Optional[_Union[_step_pb2.LayerResult, _Mapping]] = ..., step_cancelled: _Optional[_Union[_step_pb2.StepCancelled, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., armed_step_done: _Optional[_Union[_step_pb2.ArmedStepDone, _Mapping]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("reason", "grace_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    grace_ms: int
    def __init__(self, reason: _Optional[str] = ..., grace_ms: _Optional[int] = ...) -> None: ...
