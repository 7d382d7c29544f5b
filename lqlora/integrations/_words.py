"""Codes of rows in words of 32 bits, the lowest bits first, as GPTQ and compressed-tensors store them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora.errors import FormatError, LQLoRAError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["WORD", "host_tensor", "packed_words", "unpacked_words"]

#: Bits of a word.
WORD = 32


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
    try:
        return np.asarray(ops.convert(tensors[key], np))
    except LQLoRAError as error:
        raise FormatError(f"{key} cannot be read: {error}") from None


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
    single = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    flat = np.zeros((rows, -(-columns * bits // WORD) * WORD), np.uint8)
    flat[:, : columns * bits] = single.reshape(rows, -1)
    return np.packbits(flat, axis=1, bitorder="little").view("<i4").astype(np.int32)


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
    octets = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    flat = np.unpackbits(octets, axis=1, bitorder="little")
    if flat[:, columns * bits :].any():
        raise FormatError(f"{name} must have no bits beyond the last code.")
    single = flat[:, : columns * bits].reshape(len(words), columns, bits)
    found: npt.NDArray[np.uint8] = (single << np.arange(bits, dtype=np.uint8)).sum(2, dtype=np.uint8)
    return found
