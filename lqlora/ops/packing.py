r"""Packing of codes into dense bytes, and unpacking.

The packed bytes are one stream of bits, least significant bit first: code ``i`` of ``bits`` bits fills the bits
``[i * bits, (i + 1) * bits)`` of the stream, and bit ``k`` of the stream is bit ``k % 8`` of byte ``k // 8``. For three
bits, eight codes ``a`` … ``h`` fill three bytes, each drawn with its most significant bit first::

    byte    0               1               2
    bit     7 6 5 4 3 2 1 0 7 6 5 4 3 2 1 0 7 6 5 4 3 2 1 0
    code    c c b b b a a a f e e e d d d c h h h g g g f f

For four bits the first code of a pair is in the low half of the byte. Unused bits of the last byte are zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lqlora._dispatch import device_of, namespace, op
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["pack_codes", "packed_size", "unpack_codes"]


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that hold ``count`` codes of ``bits`` bits.

    Parameters
    ----------
    count : int
        Number of codes.
    bits : int
        Bits per code, 1 to 8.

    Returns
    -------
    int
        ``ceil(count * bits / 8)``.

    Examples
    --------
    >>> packed_size(9, 3)
    4
    """
    return -(-count * bits // 8)


def _period(bits: int) -> tuple[int, int]:
    """Return the number of codes, and of bytes, after which the pattern repeats: ``lcm(bits, 8)`` bits in both."""
    if not 1 <= bits <= 8:
        raise InvalidArgumentError(f"bits must be between 1 and 8, got {bits!r}.")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


@op(examples=lambda problem: (problem.codes, problem.bits))
def pack_codes(codes: Array, bits: int) -> Array:
    """Pack codes into dense bytes, in the layout drawn in :mod:`lqlora.ops.packing`.

    Parameters
    ----------
    codes : array of uint8, shape (n,)
        Codes below ``2**bits``. This is not checked: larger codes would change the bits of their neighbors.
    bits : int
        Bits per code, 1 to 8.

    Returns
    -------
    array of uint8, shape (ceil(n * bits / 8),)
        Packed codes.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> pack_codes(np.array([1, 2, 3], dtype=np.uint8), 4).tolist()
    [33, 3]
    """
    xp = namespace(codes)
    group, width = _period(bits)
    count = codes.shape[0]
    device = device_of(codes)
    if count % group:
        # Zeros complete the last group; the slice at the end drops the bytes that hold nothing else.
        codes = xp.concat([codes, xp.zeros((-count % group,), dtype=xp.uint8, device=device)])
    # After lcm(bits, 8) bits the shifts repeat, so each row holds one such group. The loop has at most eight steps, and
    # each step handles one position of all groups. A code of at most 8 bits begins at bit i * bits of the group and
    # reaches into the next byte if shift + bits > 8, but never beyond.
    columns = xp.reshape(codes, (-1, group))
    packed = xp.zeros((columns.shape[0], width), dtype=xp.uint8, device=device)
    for i in range(group):
        byte, shift = divmod(i * bits, 8)
        packed[:, byte] |= columns[:, i] << shift  # uint8 drops the bits of the next byte
        if shift + bits > 8:
            packed[:, byte + 1] |= columns[:, i] >> (8 - shift)
    return xp.reshape(packed, (-1,))[: packed_size(count, bits)]


@op(examples=lambda problem: (problem.packed, problem.bits, problem.count))
def unpack_codes(packed: Array, bits: int, count: int) -> Array:
    """Return the codes that :func:`pack_codes` packed.

    Parameters
    ----------
    packed : array of uint8, shape (ceil(count * bits / 8),)
        Packed codes.
    bits : int
        Bits per code, 1 to 8.
    count : int
        Number of codes.

    Returns
    -------
    array of uint8, shape (count,)
        The codes.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is out of range, or ``packed`` has too few or too many bytes for ``count`` codes.

    Examples
    --------
    >>> import numpy as np
    >>> unpack_codes(np.array([33, 3], dtype=np.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    xp = namespace(packed)
    group, width = _period(bits)
    if packed.shape[0] != packed_size(count, bits):
        needed = packed_size(count, bits)
        raise InvalidArgumentError(
            f"packed must have {needed} bytes, since {count} codes of {bits} bits are {needed} bytes, got {packed.shape[0]}."
        )
    device = device_of(packed)
    if packed.shape[0] % width:
        packed = xp.concat([packed, xp.zeros((-packed.shape[0] % width,), dtype=xp.uint8, device=device)])
    columns = xp.reshape(packed, (-1, width))
    codes = xp.empty((columns.shape[0], group), dtype=xp.uint8, device=device)
    for i in range(group):
        byte, shift = divmod(i * bits, 8)
        code = columns[:, byte] >> shift
        if shift + bits > 8:
            code |= columns[:, byte + 1] << (8 - shift)
        # The high bits belong to the codes that follow in the stream.
        codes[:, i] = code & (2**bits - 1)
    return xp.reshape(codes, (-1,))[:count]
