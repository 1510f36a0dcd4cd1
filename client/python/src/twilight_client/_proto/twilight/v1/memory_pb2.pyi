from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_F32: _ClassVar[DataType]
    DATA_TYPE_F16: _ClassVar[DataType]
    DATA_TYPE_BF16: _ClassVar[DataType]
    DATA_TYPE_F8_E4M3: _ClassVar[DataType]

class RegionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REGION_KIND_UNSPECIFIED: _ClassVar[RegionKind]
    REGION_KIND_SHARED_MEMORY: _ClassVar[RegionKind]
    REGION_KIND_CUDA_IPC: _ClassVar[RegionKind]
    REGION_KIND_CUDA_VMM: _ClassVar[RegionKind]
    REGION_KIND_CUDA_FABRIC: _ClassVar[RegionKind]

class Access(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACCESS_UNSPECIFIED: _ClassVar[Access]
    ACCESS_READ_ONLY: _ClassVar[Access]
    ACCESS_READ_WRITE: _ClassVar[Access]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_F32: DataType
DATA_TYPE_F16: DataType
DATA_TYPE_BF16: DataType
DATA_TYPE_F8_E4M3: DataType
REGION_KIND_UNSPECIFIED: RegionKind
REGION_KIND_SHARED_MEMORY: RegionKind
REGION_KIND_CUDA_IPC: RegionKind
REGION_KIND_CUDA_VMM: RegionKind
REGION_KIND_CUDA_FABRIC: RegionKind
ACCESS_UNSPECIFIED: Access
ACCESS_READ_ONLY: Access
ACCESS_READ_WRITE: Access

class RegisterRegion(_message.Message):
    __slots__ = ("region_id", "generation", "size", "access", "device", "shared_memory", "cuda_ipc", "cuda_vmm", "cuda_fabric", "probe")
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ACCESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_FIELD_NUMBER: _ClassVar[int]
    CUDA_VMM_FIELD_NUMBER: _ClassVar[int]
    CUDA_FABRIC_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    generation: int
    size: int
    access: Access
    device: str
    shared_memory: SharedMemory
    cuda_ipc: CudaIpc
    cuda_vmm: CudaVmm
    cuda_fabric: CudaFabric
    probe: DigestProbe
    def __init__(self, region_id: _Optional[int] = ..., generation: _Optional[int] = ..., size: _Optional[int] = ..., access: _Optional[_Union[Access, str]] = ..., device: _Optional[str] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., cuda_ipc: _Optional[_Union[CudaIpc, _Mapping]] = ..., cuda_vmm: _Optional[_Union[CudaVmm, _Mapping]] = ..., cuda_fabric: _Optional[_Union[CudaFabric, _Mapping]] = ..., probe: _Optional[_Union[DigestProbe, _Mapping]] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("fd_token", "offset")
    FD_TOKEN_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    fd_token: bytes
    offset: int
    def __init__(self, fd_token: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class CudaIpc(_message.Message):
    __slots__ = ("handle", "offset")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    offset: int
    def __init__(self, handle: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class CudaVmm(_message.Message):
    __slots__ = ("chunks", "offset")
    class Chunk(_message.Message):
        __slots__ = ("fd_token", "size")
        FD_TOKEN_FIELD_NUMBER: _ClassVar[int]
        SIZE_FIELD_NUMBER: _ClassVar[int]
        fd_token: bytes
        size: int
        def __init__(self, fd_token: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[CudaVmm.Chunk]
    offset: int
    def __init__(self, chunks: _Optional[_Iterable[_Union[CudaVmm.Chunk, _Mapping]]] = ..., offset: _Optional[int] = ...) -> None: ...

class CudaFabric(_message.Message):
    __slots__ = ("chunks", "offset")
    class Chunk(_message.Message):
        __slots__ = ("handle", "size")
        HANDLE_FIELD_NUMBER: _ClassVar[int]
        SIZE_FIELD_NUMBER: _ClassVar[int]
        handle: bytes
        size: int
        def __init__(self, handle: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[CudaFabric.Chunk]
    offset: int
    def __init__(self, chunks: _Optional[_Iterable[_Union[CudaFabric.Chunk, _Mapping]]] = ..., offset: _Optional[int] = ...) -> None: ...

class DigestProbe(_message.Message):
    __slots__ = ("offset", "length", "expected_sha256")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SHA256_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    expected_sha256: bytes
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ..., expected_sha256: _Optional[bytes] = ...) -> None: ...

class RegionRegistered(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    def __init__(self, sha256: _Optional[bytes] = ...) -> None: ...

class ReleaseRegion(_message.Message):
    __slots__ = ("region_id",)
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    def __init__(self, region_id: _Optional[int] = ...) -> None: ...

class RegionReleased(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Location(_message.Message):
    __slots__ = ("region_id", "generation", "offset")
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    generation: int
    offset: int
    def __init__(self, region_id: _Optional[int] = ..., generation: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Strides(_message.Message):
    __slots__ = ("page", "head", "token")
    PAGE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    page: int
    head: int
    token: int
    def __init__(self, page: _Optional[int] = ..., head: _Optional[int] = ..., token: _Optional[int] = ...) -> None: ...

class CacheLayer(_message.Message):
    __slots__ = ("layer", "k", "v", "k_scales", "v_scales")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    K_SCALES_FIELD_NUMBER: _ClassVar[int]
    V_SCALES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    k: Location
    v: Location
    k_scales: _containers.RepeatedScalarFieldContainer[float]
    v_scales: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., k: _Optional[_Union[Location, _Mapping]] = ..., v: _Optional[_Union[Location, _Mapping]] = ..., k_scales: _Optional[_Iterable[float]] = ..., v_scales: _Optional[_Iterable[float]] = ...) -> None: ...

class RegisterCache(_message.Message):
    __slots__ = ("cache_id", "dtype", "page_size", "num_pages", "k_strides", "v_strides", "null_page", "layers", "max_tokens", "size_only")
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    K_STRIDES_FIELD_NUMBER: _ClassVar[int]
    V_STRIDES_FIELD_NUMBER: _ClassVar[int]
    NULL_PAGE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SIZE_ONLY_FIELD_NUMBER: _ClassVar[int]
    cache_id: int
    dtype: DataType
    page_size: int
    num_pages: int
    k_strides: Strides
    v_strides: Strides
    null_page: int
    layers: _containers.RepeatedCompositeFieldContainer[CacheLayer]
    max_tokens: int
    size_only: bool
    def __init__(self, cache_id: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ..., page_size: _Optional[int] = ..., num_pages: _Optional[int] = ..., k_strides: _Optional[_Union[Strides, _Mapping]] = ..., v_strides: _Optional[_Union[Strides, _Mapping]] = ..., null_page: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[CacheLayer, _Mapping]]] = ..., max_tokens: _Optional[int] = ..., size_only: bool = ...) -> None: ...

class CacheRegistered(_message.Message):
    __slots__ = ("shadow_bytes", "shadow_bytes_per_token")
    SHADOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    shadow_bytes: int
    shadow_bytes_per_token: float
    def __init__(self, shadow_bytes: _Optional[int] = ..., shadow_bytes_per_token: _Optional[float] = ...) -> None: ...

class ReleaseCache(_message.Message):
    __slots__ = ("cache_id",)
    CACHE_ID_FIELD_NUMBER: _ClassVar[int]
    cache_id: int
    def __init__(self, cache_id: _Optional[int] = ...) -> None: ...

class CacheReleased(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
