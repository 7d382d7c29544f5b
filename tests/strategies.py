"""What the strategies of lqlora.testing do not know of: the way into and out of array libraries."""

from __future__ import annotations

from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np

#: Storage dtypes of scales by library: the array API standard has none below float32.
SCALE_DTYPES = {"array_api_strict": ("float32",)}


def scale_dtypes(xp: Any) -> tuple[str, ...]:
    return SCALE_DTYPES.get(xp.__name__, ("float32", "float16", "bfloat16"))


#: Why CuPy is given other numbers in some tests. The kernels of lqlora do not flush, and are tested with all numbers.
FLUSHES = (
    "CuPy compiles its own arithmetic so that subnormal float32 become zero: see the documentation of cupy.nextafter."
)


def flushes(xp: Any) -> bool:
    """Tell whether the arithmetic of a library makes zeros of subnormal numbers."""
    return "cupy" in xp.__name__


def normal_numbers(xp: Any, array: np.ndarray) -> np.ndarray:
    """Return the numbers of a test; where subnormal ones are flushed, those whose quotients and squares are none."""
    if not flushes(xp):
        return array
    return np.where(np.abs(array) < 1e-5, array.dtype.type(0), np.clip(array, -1e5, 1e5))


def on(xp: Any, array: np.ndarray) -> Any:
    """Copy a NumPy array to another library, without help from the library under test."""
    if array.dtype == ml_dtypes.bfloat16 and "torch" in xp.__name__:
        return on(xp, array.view(np.uint16)).view(xp.bfloat16)
    if "torch" in xp.__name__:
        return xp.asarray(np.array(array, order="C"))
    # CuPy fills arrays without axes, and a zero that it fills with has no sign.
    return xp.asarray(array, copy=True) if array.ndim else xp.reshape(xp.asarray(array[None], copy=True), ())


def on_device(array: Any) -> bool:
    """Tell whether an array is in the memory of a CUDA device, without help from the library under test."""
    return array_api_compat.is_cupy_array(array) or (array_api_compat.is_torch_array(array) and array.is_cuda)


def host(array: Any) -> np.ndarray:
    """Copy an array of any library to NumPy; bfloat16 becomes that of ml_dtypes."""
    if array_api_compat.is_torch_array(array):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            return host(array.contiguous().view(dtype=_torch_uint16(array))).view(ml_dtypes.bfloat16)
        return array.numpy().copy()
    if array_api_compat.is_cupy_array(array):
        return array.get()
    return np.array(array)


def _torch_uint16(array: Any) -> Any:
    return array_api_compat.array_namespace(array).uint16


def stored(q: Any) -> dict[str, bytes]:
    """Bytes of every stored array: equal on all libraries, or the library is wrong."""
    return {name: host(array).tobytes() for name, array in q.to_arrays().items()}
