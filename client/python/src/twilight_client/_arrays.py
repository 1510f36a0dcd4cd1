"""What the SDK needs to know of a numpy array or a torch tensor; torch is not imported for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .errors import InvalidArgument
from .geometry import DType

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

    Array: TypeAlias = np.ndarray | torch.Tensor
else:
    Array: TypeAlias = Any

_NUMPY = {np.dtype("<f4"): DType.F32, np.dtype("<f2"): DType.F16}


def is_torch(x: Array) -> TypeIs[torch.Tensor]:
    """Tell whether x is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _torch_dtypes() -> dict[Any, DType]:
    import torch

    return {
        torch.float32: DType.F32,
        torch.float16: DType.F16,
        torch.bfloat16: DType.BF16,
        torch.float8_e4m3fn: DType.F8_E4M3,
    }


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's name of an element type."""
    return {ours: theirs for theirs, ours in _torch_dtypes().items()}[dtype]


def dtype_of(x: Array) -> DType:
    """Return the element type of an array."""
    known = _torch_dtypes() if is_torch(x) else _NUMPY
    try:
        return known[x.dtype]
    except KeyError:
        raise InvalidArgument(f"the dtype {x.dtype} is not served; use float32, float16, bfloat16 or e4m3") from None


def address(x: Array) -> int:
    """Return the address of the first element."""
    return x.data_ptr() if is_torch(x) else x.__array_interface__["data"][0]


def strides(x: Array) -> tuple[int, ...]:
    """Return the distances along each axis in bytes."""
    return tuple(s * x.element_size() for s in x.stride()) if is_torch(x) else tuple(x.strides)


def extent(x: Array) -> int:
    """Return the bytes from the first element to behind the last one."""
    item = x.element_size() if is_torch(x) else x.itemsize
    return item + sum((n - 1) * s for n, s in zip(x.shape, strides(x), strict=True))


def to_bytes(x: Array) -> bytes:
    """Return the elements, packed."""
    if is_torch(x):
        import torch

        return x.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return np.ascontiguousarray(x).tobytes()


def from_bytes(data: bytes, dtype: DType, shape: tuple[int, ...], like: Array) -> Array:
    """Return packed elements as an array of the same kind as ``like``."""
    if is_torch(like):
        import torch

        return torch.frombuffer(bytearray(data), dtype=torch_dtype(dtype)).view(shape).to(like.device)
    return np.frombuffer(data, dtype.numpy).reshape(shape)
