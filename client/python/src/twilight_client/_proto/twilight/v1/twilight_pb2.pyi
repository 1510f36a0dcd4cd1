from . import lease_pb2 as _lease_pb2
from . import memory_pb2 as _memory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ("shadow",)
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    shadow: ShadowQuery
    def __init__(self, shadow: _Optional[_Union[ShadowQuery, _Mapping]] = ...) -> None: ...

class ShadowQuery(_message.Message):
    __slots__ = ("geometry", "config_json")
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    geometry: Geometry
    config_json: str
    def __init__(self, geometry: _Optional[_Union[Geometry, _Mapping]] = ..., config_json: _Optional[str] = ...) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("version", "protocol_version_min", "protocol_version_max", "devices")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_MAX_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol_version_min: int
    protocol_version_max: int
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, version: _Optional[str] = ..., protocol_version_min: _Optional[int] = ..., protocol_version_max: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("id", "backend", "name", "shadow_bytes_total", "shadow_bytes_free", "cache_dtypes", "query_dtypes", "head_sizes", "max_head_size", "max_group_size", "selectors", "estimators", "pruners", "compressors", "kernels", "region_kinds", "armed_steps", "device_batches", "shadow_bytes_per_token", "shadow_refusal", "unusable", "mps")
    ID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    CACHE_DTYPES_FIELD_NUMBER: _ClassVar[int]
    QUERY_DTYPES_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZES_FIELD_NUMBER: _ClassVar[int]
    MAX_HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    SELECTORS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATORS_FIELD_NUMBER: _ClassVar[int]
    PRUNERS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSORS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    REGION_KINDS_FIELD_NUMBER: _ClassVar[int]
    ARMED_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BATCHES_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SHADOW_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    UNUSABLE_FIELD_NUMBER: _ClassVar[int]
    MPS_FIELD_NUMBER: _ClassVar[int]
    id: str
    backend: str
    name: str
    shadow_bytes_total: int
    shadow_bytes_free: int
    cache_dtypes: _containers.RepeatedScalarFieldContainer[_memory_pb2.DataType]
    query_dtypes: _containers.RepeatedScalarFieldContainer[_memory_pb2.DataType]
    head_sizes: _containers.RepeatedScalarFieldContainer[int]
    max_head_size: int
    max_group_size: int
    selectors: _containers.RepeatedScalarFieldContainer[str]
    estimators: _containers.RepeatedScalarFieldContainer[str]
    pruners: _containers.RepeatedScalarFieldContainer[str]
    compressors: _containers.RepeatedScalarFieldContainer[str]
    kernels: _containers.RepeatedScalarFieldContainer[str]
    region_kinds: _containers.RepeatedScalarFieldContainer[_memory_pb2.RegionKind]
    armed_steps: bool
    device_batches: bool
    shadow_bytes_per_token: float
    shadow_refusal: str
    unusable: str
    mps: bool
    def __init__(self, id: _Optional[str] = ..., backend: _Optional[str] = ..., name: _Optional[str] = ..., shadow_bytes_total: _Optional[int] = ..., shadow_bytes_free: _Optional[int] = ..., cache_dtypes: _Optional[_Iterable[_Union[_memory_pb2.DataType, str]]] = ..., query_dtypes: _Optional[_Iterable[_Union[_memory_pb2.DataType, str]]] = ..., head_sizes: _Optional[_Iterable[int]] = ..., max_head_size: _Optional[int] = ..., max_group_size: _Optional[int] = ..., selectors: _Optional[_Iterable[str]] = ..., estimators: _Optional[_Iterable[str]] = ..., pruners: _Optional[_Iterable[str]] = ..., compressors: _Optional[_Iterable[str]] = ..., kernels: _Optional[_Iterable[str]] = ..., region_kinds: _Optional[_Iterable[_Union[_memory_pb2.RegionKind, str]]] = ..., armed_steps: bool = ..., device_batches: bool = ..., shadow_bytes_per_token: _Optional[float] = ..., shadow_refusal: _Optional[str] = ..., unusable: _Optional[str] = ..., mps: bool = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("num_layers", "query_heads", "kv_heads", "k_dim", "v_dim", "softmax_scale", "logit_softcap", "sinks", "query_dtype", "query_scale", "output_dtype")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    K_DIM_FIELD_NUMBER: _ClassVar[int]
    V_DIM_FIELD_NUMBER: _ClassVar[int]
    SOFTMAX_SCALE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    QUERY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUERY_SCALE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    query_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    softmax_scale: float
    logit_softcap: float
    sinks: _containers.RepeatedScalarFieldContainer[float]
    query_dtype: _memory_pb2.DataType
    query_scale: float
    output_dtype: _memory_pb2.DataType
    def __init__(self, num_layers: _Optional[int] = ..., query_heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., k_dim: _Optional[int] = ..., v_dim: _Optional[int] = ..., softmax_scale: _Optional[float] = ..., logit_softcap: _Optional[float] = ..., sinks: _Optional[_Iterable[float]] = ..., query_dtype: _Optional[_Union[_memory_pb2.DataType, str]] = ..., query_scale: _Optional[float] = ..., output_dtype: _Optional[_Union[_memory_pb2.DataType, str]] = ...) -> None: ...

class OpenLeaseRequest(_message.Message):
    __slots__ = ("protocol_version", "engine_id", "engine_name", "device", "geometry", "config_json")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    engine_id: bytes
    engine_name: str
    device: str
    geometry: Geometry
    config_json: str
    def __init__(self, protocol_version: _Optional[int] = ..., engine_id: _Optional[bytes] = ..., engine_name: _Optional[str] = ..., device: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., config_json: _Optional[str] = ...) -> None: ...

class OpenLeaseResponse(_message.Message):
    __slots__ = ("protocol_version", "endpoint", "token", "fd_endpoint", "device", "config_json", "limits", "open_timeout_ms", "instance_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FD_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    OPEN_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    endpoint: str
    token: bytes
    fd_endpoint: str
    device: Device
    config_json: str
    limits: Limits
    open_timeout_ms: int
    instance_id: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., endpoint: _Optional[str] = ..., token: _Optional[bytes] = ..., fd_endpoint: _Optional[str] = ..., device: _Optional[_Union[Device, _Mapping]] = ..., config_json: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., open_timeout_ms: _Optional[int] = ..., instance_id: _Optional[bytes] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_regions", "max_caches", "max_batch", "max_sequence_tokens", "max_shadow_bytes")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REGIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_CACHES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SHADOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_regions: int
    max_caches: int
    max_batch: int
    max_sequence_tokens: int
    max_shadow_bytes: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_regions: _Optional[int] = ..., max_caches: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ..., max_shadow_bytes: _Optional[int] = ...) -> None: ...
