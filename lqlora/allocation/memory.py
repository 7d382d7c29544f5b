"""Budgets in bytes from the memory of a device, less unquantized parts, key-value cache and margin."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from lqlora._annotations import annotated
from lqlora.errors import InvalidArgumentError
from lqlora.formats import float_bits

if TYPE_CHECKING:
    from lqlora._typing import FloatName

__all__ = ["cache_bytes", "memory_budget"]


@annotated
def cache_bytes(
    *,
    layers: int,
    kv_heads: int,
    head_size: int,
    length: int,
    batch: int = 1,
    dtype: FloatName = "float16",
) -> int:
    """Return the bytes of the key-value cache of a context.

    Each layer keeps a key and a value of every token: ``head_size`` numbers for each of ``kv_heads`` heads::

        2 * layers * kv_heads * head_size * length * batch * bytes of a number

    Parameters
    ----------
    layers : int
        Number of layers with attention over the whole context.
    kv_heads : int
        Number of key-value heads in a layer: fewer than query heads with grouped-query attention.
    head_size : int
        Length of a key.
    length : int
        Number of tokens of the context, including those to be generated.
    batch : int, default 1
        Number of sequences at a time.
    dtype : {"float16", "bfloat16", "float32"}
        Dtype of the cache.

    Returns
    -------
    int
        Number of bytes.

    Raises
    ------
    InvalidArgumentError
        If a number is negative or not an integer, or the dtype is unknown.

    Examples
    --------
    >>> cache_bytes(layers=32, kv_heads=8, head_size=128, length=8192) // 2**20
    1024
    """
    # The factor 2 counts a key and a value. Layers with a sliding window keep fewer tokens and need a separate call.
    total = 2 * float_bits(dtype) // 8
    for name, value in {
        "layers": layers,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "length": length,
        "batch": batch,
    }.items():
        total *= _count(name, value)
    return total


@annotated
def memory_budget(device_bytes: int, *, unquantized_bytes: int = 0, cache_bytes: int = 0, margin_bytes: int = 0) -> int:
    """Return the bytes that a device has left for quantized weights.

    It is ``device_bytes - unquantized_bytes - cache_bytes - margin_bytes``.

    Parameters
    ----------
    device_bytes : int
        Memory of the device: 8 GiB are ``8 * 2**30``.
    unquantized_bytes : int, default 0
        Parts that are not quantized: embeddings, norms, output head. Low-rank factors belong here if the budget does not
        count them: see ``count_factors`` of :func:`lqlora.allocate`.
    cache_bytes : int, default 0
        Key-value cache: see :func:`lqlora.cache_bytes`.
    margin_bytes : int, default 0
        Bytes that stay free for activations, the runtime and fragmentation. Measure it, or leave a tenth.

    Returns
    -------
    int
        The ``total_bytes`` of :func:`lqlora.allocate`.

    Raises
    ------
    InvalidArgumentError
        If a number is negative or not an integer, or nothing is left.

    Examples
    --------
    A model of 32 layers with a context of 8192 tokens on a device of 8 GiB:

    >>> cache = cache_bytes(layers=32, kv_heads=8, head_size=128, length=8192)
    >>> budget = memory_budget(8 * 2**30, unquantized_bytes=2 * 2**30, cache_bytes=cache, margin_bytes=2**29)
    >>> budget / 2**30
    4.5
    """
    left = _count("device_bytes", device_bytes)
    taken = {"unquantized_bytes": unquantized_bytes, "cache_bytes": cache_bytes, "margin_bytes": margin_bytes}
    left -= sum(_count(name, value) for name, value in taken.items())
    if left <= 0:
        raise InvalidArgumentError(
            f"device_bytes must be more than the {device_bytes - left} bytes that are not for quantized weights, got "
            f"{device_bytes}. Shorten the context, quantize more parts, or use a larger device."
        )
    return left


def _count(name: str, value: int) -> int:
    # operator.index takes the integers of every library and refuses floats, even whole ones such as 8e9.
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise InvalidArgumentError(f"{name} must be a whole number of at least 0, got {value!r}.")
    return number
