"""Codes of rows in words of 32 bits, the lowest bits first, as GPTQ and compressed-tensors store them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora.errors import FormatError, LQLoRAError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["WORD", "host_tensor", "on_host", "packed_words", "unpacked_words"]

#: Bits of a word.
WORD = 32

#: Codes that are taken apart into bits together.
_PIECE = 2**20


def host_tensor(tensors: Mapping[str, Array], key: str) -> npt.NDArray[Any]:
    """Return a tensor of a state dict as a NumPy array.

    Parameters
    ----------
    tensors : mapping of str to array
        Tensors of any library.
    key : str
        Name of one of them.

    Returns
    -------
    ndarray
        The same values.

    Raises
    ------
    FormatError
        If there is no such tensor, or it cannot be read.
    """
    if tensors.get(key) is None:
        raise FormatError(f"tensors must hold {key}.")
    return on_host(tensors[key], key)


def on_host(array: Array, name: str) -> npt.NDArray[Any]:
    """Return an array of any library as a NumPy array.

    Parameters
    ----------
    array : array
        The array.
    name : str
        Its name, for errors.

    Returns
    -------
    ndarray
        The same values.

    Raises
    ------
    FormatError
        If it cannot be read.
    """
    try:
        return np.asarray(ops.convert(array, np))
    except LQLoRAError as error:
        raise FormatError(f"{name} cannot be read: {error}") from None


def packed_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Pack the codes of each row into words.

    Parameters
    ----------
    codes : ndarray of uint8, shape (rows, columns)
        Codes.
    bits : int
        Bits of a code, 1 to 8.

    Returns
    -------
    ndarray of int32, shape (rows, ceil(columns * bits / 32))
        Words. Bits beyond the last code of a row are 0.
    """
    rows, columns = codes.shape
    found = np.empty((rows, -(-columns * bits // WORD)), np.int32)
    for piece in _pieces(rows, columns):
        own = codes[piece]
        flat = np.zeros((len(own), found.shape[1] * WORD), np.uint8)
        for bit in range(bits):
            flat[:, bit : columns * bits : bits] = (own >> np.uint8(bit)) & np.uint8(1)
        found[piece] = np.packbits(flat, axis=1, bitorder="little").view("<i4")
    return found


def unpacked_words(words: npt.NDArray[np.int32], bits: int, columns: int, name: str) -> npt.NDArray[np.uint8]:
    """Return the codes of each row.

    Parameters
    ----------
    words : ndarray of int32, shape (rows, ceil(columns * bits / 32))
        Words.
    bits : int
        Bits of a code, 1 to 8.
    columns : int
        Codes of a row.
    name : str
        Name of the tensor, for errors.

    Returns
    -------
    ndarray of uint8, shape (rows, columns)
        Codes.

    Raises
    ------
    FormatError
        If a bit beyond the last code of a row is set.
    """
    found = np.zeros((len(words), columns), np.uint8)
    for piece in _pieces(len(words), columns):
        octets = np.ascontiguousarray(words[piece].astype("<i4")).view(np.uint8)
        flat = np.unpackbits(octets, axis=1, bitorder="little")
        if flat[:, columns * bits :].any():
            raise FormatError(f"{name} must have no bits beyond the last code.")
        for bit in range(bits):
            found[piece] |= flat[:, bit : columns * bits : bits] << np.uint8(bit)
    return found


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Yield pieces of the rows, so that a byte for each bit takes little memory."""
    step = max(1, _PIECE // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, first + step)
