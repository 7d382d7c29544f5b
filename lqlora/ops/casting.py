"""Conversions of dtypes and between libraries: widening for arithmetic, rounding for storage, copies bit for bit."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from lqlora._dispatch import FLOATS, STORABLE, array_library, dtype_name, fitting, namespace, plain_array
from lqlora._messages import given
from lqlora.errors import UnsupportedArrayError

if TYPE_CHECKING:
    from lqlora._typing import Array, Namespace

__all__ = [
    "convert",
    "native_dtype",
    "require_float",
    "storage_cast",
    "stored_bytes",
    "widen",
]

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def widen(array: Array, what: str = "array") -> Array:
    """Convert floating-point input to the dtype of the arithmetic: float32, or float64 for float64.

    Parameters
    ----------
    array : array of float16, bfloat16, float32 or float64
        Array to convert.
    what : str
        Name of the array, which errors begin with.

    Returns
    -------
    array of float32 or float64, same shape
        float64 stays float64; everything narrower becomes float32, exactly. A torch tensor is detached from its graph.

    Raises
    ------
    UnsupportedArrayError
        If the dtype is not one of the four.

    Examples
    --------
    >>> import numpy as np
    >>> widen(np.ones(2, dtype=np.float16)).dtype
    dtype('float32')
    """
    require_float(array, what)
    array = array.detach() if array_library(array) == "torch" else array
    if dtype_name(array) in _FLOATS[:2]:
        return array
    xp = namespace(array)
    # float16 has 11 significant bits and bfloat16 has 8. Both have an exponent range within that of float32 with its 24
    # bits, so the conversion is exact, subnormals included.
    return xp.astype(array, xp.float32)


def require_float(array: Array, what: str) -> None:
    """Raise unless an array has one of the four floating-point dtypes that lqlora computes with.

    Parameters
    ----------
    array : array
        Any array.
    what : str
        Name of the array, which errors begin with.

    Raises
    ------
    UnsupportedArrayError
        If the dtype is not float16, bfloat16, float32 or float64, or the value is not an array that is computed with.

    Examples
    --------
    >>> import numpy as np
    >>> require_float(np.ones(2), "array")
    """
    namespace(array, dtypes=FLOATS, what=what)


def storage_cast(array: Array, dtype: str) -> Array:
    """Round an array to the dtype it is stored in, to nearest with ties to even.

    Parameters
    ----------
    array : array of float32 or float64
        Values.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        Storage dtype. NumPy's bfloat16 is the one of ``ml_dtypes``.

    Returns
    -------
    array of that dtype, same shape
        The array itself if it has that dtype. Values beyond the range of ``dtype`` become infinite; callers check that.

    Raises
    ------
    UnsupportedArrayError
        If the array's library has no such dtype.

    Examples
    --------
    >>> import numpy as np
    >>> storage_cast(np.array([1 / 3]), "bfloat16").astype(float).tolist()
    [0.333984375]
    """
    xp = namespace(array)
    # Overflow and underflow are results here, not faults: callers check the stored scales, where they can name the
    # array and advise a wider dtype.
    with np.errstate(over="ignore", under="ignore"):
        return xp.astype(array, native_dtype(array, dtype), copy=False)


def native_dtype(array: Array, dtype: str) -> Any:
    """Return the dtype object of a floating-point dtype in an array's library.

    Parameters
    ----------
    array : array
        Any array of the library.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        Name of the dtype.

    Returns
    -------
    dtype
        The bfloat16 of NumPy and CuPy is the one of ``ml_dtypes``.

    Raises
    ------
    UnsupportedArrayError
        If the library has no such dtype.

    Examples
    --------
    >>> import numpy as np
    >>> native_dtype(np.zeros(1), "bfloat16").itemsize
    2
    """
    xp = namespace(array)
    if not isinstance(dtype, str) or dtype not in _FLOATS:
        raise UnsupportedArrayError(f"dtype must be one of {', '.join(_FLOATS)}, got {given(dtype)}.")
    if dtype in _FLOATS[:2]:
        return getattr(xp, dtype)
    library = array_library(array)
    if library in ("numpy", "cupy"):
        return np.dtype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    if library == "array-api" or not hasattr(xp, dtype):
        owner = type(array).__module__.partition(".")[0]
        raise UnsupportedArrayError(f"dtype {dtype} does not exist in {owner}: choose a format with float32 scales.")
    return getattr(xp, dtype)


@fitting
def stored_bytes(array: Array) -> int:
    """Return the bytes that the entries of an array take.

    Parameters
    ----------
    array : array
        Array of uint8 or a floating-point dtype.

    Returns
    -------
    int
        Size times bytes per entry.

    Examples
    --------
    >>> import numpy as np
    >>> stored_bytes(np.zeros((2, 3), dtype=np.float16))
    12
    """
    namespace(array, dtypes=STORABLE)
    itemsize = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype_name(array)]
    return int(prod(array.shape)) * itemsize


@fitting
def convert(array: Array, xp: Namespace, device: object = None) -> Array:
    """Copy an array to another library or device, bit for bit.

    Every copy of that kind in lqlora is made here.

    Parameters
    ----------
    array : array
        Any array. A torch tensor is detached, and a lazily negated or conjugated one is resolved.
    xp : module
        Target namespace, such as ``numpy`` or ``torch``.
    device : object, optional
        Target device, as an object or string of that library. By default an array of that library stays on its device. An array of
        another library goes to the host for torch, and to the default device of other libraries.

    Returns
    -------
    array
        The same shape, dtype and bits. Memory is shared where both libraries allow it.

    Raises
    ------
    UnsupportedArrayError
        If the target has no such dtype.

    Examples
    --------
    >>> import numpy as np
    >>> convert(np.arange(3), np).tolist()
    [0, 1, 2]
    """
    array = plain_array(array, "array", STORABLE)
    if xp is np and device is None:
        return _on_host(array)
    is_here = type(array) is np.ndarray
    if not is_here and _plain_name(namespace(array, dtypes=STORABLE)) == _plain_name(xp):
        return _moved(array, device)
    host = array if is_here else _on_host(array)
    # torch and NumPy share no bfloat16 dtype: NumPy's is an extension of ml_dtypes. Its bits cross as uint16 and are
    # reinterpreted there. A detour over float32 would keep the values, but perhaps not the bits of a NaN.
    is_bfloat16 = host.dtype == ml_dtypes.bfloat16
    if xp.__name__.rpartition(".")[2] == "torch":
        import torch  # noqa: PLC0415 - the caller passed torch, or a wrapper of it, so it is imported already

        if not (host.flags.c_contiguous and host.flags.writeable):
            # torch takes no negative strides, and warns of read-only memory.
            host = np.require(host, requirements=("C", "W"))
        bits = torch.from_numpy(host.view(np.uint16) if is_bfloat16 else host)
        tensor = bits.view(torch.bfloat16) if is_bfloat16 else bits
        return tensor if device is None else tensor.to(device)  # type: ignore[call-overload]
    line = host.reshape(1) if not host.ndim else host  # CuPy fills arrays without axes, where -0.0 would become 0.0
    try:
        there = xp.asarray(line) if device is None else xp.asarray(line, device=device)
        return there if line is host else xp.reshape(there, ())
    except TypeError as error:
        raise UnsupportedArrayError(f"array of {host.dtype} cannot be converted to {xp.__name__}: {error}.") from error


def _plain_name(xp: Namespace) -> str:
    """Return the name of a namespace without the prefix of array-api-compat."""
    return str(xp.__name__.removeprefix("array_api_compat."))


def _moved(array: Array, device: object) -> Array:
    """Return an array on another device of its library, never copied by way of the host."""
    if array_library(array) != "torch":
        return array if device is None else namespace(array).asarray(array, device=device)
    tensor = array.detach()
    return (tensor if device is None else tensor.to(device)).contiguous()


def _on_host(array: Array) -> Any:
    """Return an array as a NumPy array; its bfloat16 is the one of ``ml_dtypes``."""
    library = array_library(array)
    if library == "numpy":
        return array
    if library != "torch":
        return array.get() if library == "cupy" else np.asarray(array)
    tensor = array.detach().cpu().contiguous()
    if dtype_name(array) != "bfloat16":
        return tensor.numpy()
    import torch  # noqa: PLC0415 - a torch tensor exists, so it is imported already

    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
