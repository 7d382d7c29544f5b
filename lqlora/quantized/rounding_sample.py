"""What an array comes back as in formats that are alike, measured on some of its blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import InvalidArgumentError
from lqlora.quantized._fits import Choice, Source, assemble, by_absmax, rounded_rows
from lqlora.quantized._layout import piece_size
from lqlora.quantized.quantization import block_statistics

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.quantized.array import QuantizedArray

__all__ = ["Rounded", "RoundingSample"]

#: Weights of a sample. The ratio of two errors is off by about 0.1 % then, and less for formats that are alike.
_SAMPLE = 1 << 19

#: One block in so many of the sample serves to tell how alike two formats are.
_SOME = 8


class Rounded(NamedTuple):
    """A sample as a format rounds it.

    Parameters
    ----------
    squared_error : float
        Weighted sum of squares of what the whole array loses, as the sample has it.
    errors : array of float64, shape (k,)
        What is lost of some entries, times the root of their weights: to compare formats by.
    """

    squared_error: float
    errors: Array


class RoundingSample:
    """Blocks spread evenly over an array; scales are those of the whole array.

    Parameters
    ----------
    array : array of float32 or float64, any shape
        The array; finite.
    like : BlockFormat
        A format with the codebook and the blocks of those to be compared.
    weights : array that broadcasts to the shape of ``array``, optional
        What the squared error of each entry counts.
    name : str, optional
        What the array is, for errors.
    """

    def __init__(
        self, array: Array, like: BlockFormat, weights: Array | None = None, *, name: str = "the array"
    ) -> None:
        xp = namespace(array)
        self._source = Source(array, None, like, name)
        self._statistic, self._low = block_statistics(self._source)
        layout, device = self._source.layout, device_of(array)
        every = max(1, layout.count // _SAMPLE)
        self._index = xp.arange(0, layout.blocks, every, dtype=xp.int64, device=device)
        own = xp.ones_like(array) if weights is None and not layout.is_even else weights
        # What short blocks are padded with weighs nothing: zeros, as it is padded with.
        self._weights = None if own is None else _spread(xp.broadcast_to(own, array.shape), like, every)
        self._rows = _spread(array, like, every)

    def rounded(self, fmt: BlockFormat) -> Rounded:
        """Round the sample.

        Parameters
        ----------
        fmt : BlockFormat
            Differs from the one of the sample in the format of its scales only.

        Returns
        -------
        Rounded
            Error of the sample by nearest levels under the absolute maxima of its blocks, as the format stores them.

        Raises
        ------
        InvalidArgumentError
            If the format has another codebook, or other blocks.
        NonFiniteError
            If a scale is beyond the range of the dtype that stores it.
        """
        source, choice = self._chosen(fmt)
        xp, zeros = namespace(self._rows), choice.zero_points
        own = Choice(
            choice.stored,
            ops.pick(choice.decoded, self._index),
            None if zeros is None else ops.pick(zeros, self._index),
        )
        lost = self._rows - xp.astype(
            rounded_rows(source, own, None, slice(0, self._rows.shape[0]), self._rows), self._rows.dtype
        )
        some = xp.astype(lost[::_SOME, :], xp.float64)
        if self._weights is not None:
            some = some * xp.sqrt(xp.astype(self._weights[::_SOME, :], xp.float64))
        share = self._rows.shape[0] / max(1, self._source.layout.blocks)
        error = ops.sum_of_squares(lost, self._weights) / (share or 1.0)
        return Rounded(error, xp.reshape(some, (-1,)))

    def quantized(self, fmt: BlockFormat) -> QuantizedArray:
        """Quantize the whole array.

        Parameters
        ----------
        fmt : BlockFormat
            Differs from the one of the sample in the format of its scales only.

        Returns
        -------
        QuantizedArray
            What :func:`quantize` returns; the absolute maxima of the blocks are found once for all formats.
        """
        return assemble(*self._chosen(fmt))

    def _chosen(self, fmt: BlockFormat) -> tuple[Source, Choice]:
        if replace(fmt, scales=self._source.fmt.scales) != self._source.fmt:
            raise InvalidArgumentError(f"{fmt} differs from {self._source.fmt} in more than the format of its scales.")
        source = replace(self._source, fmt=fmt)
        return source, by_absmax(source, self._statistic, self._low)


def _spread(array: Array, fmt: BlockFormat, every: int) -> Array:
    """Return one in so many blocks of an array, as rows."""
    xp, source = namespace(array), Source(array, None, fmt, "the array")
    parts = [rows.entries[-blocks.start % every :: every, :] for blocks, rows in source.pieces(piece_size(array))]
    if not parts:
        shape = (0, source.layout.block_size)
        return xp.zeros(shape, dtype=array.dtype, device=device_of(array))
    return xp.concat(parts)
