"""``RoundingSample``: estimates of rounding errors in formats that differ only in their scales, from a sample of blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import InvalidArgumentError
from lqlora.quantized._fits import Choice, assemble, by_absmax, rounded_rows
from lqlora.quantized._layout import piece_size
from lqlora.quantized._rotation import as_rotated, rotated
from lqlora.quantized._source import Source
from lqlora.quantized._statistics import block_statistics

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.quantized.array import QuantizedArray

__all__ = ["Rounded", "RoundingSample"]

#: Weights of a sample. The ratio of two errors is then off by about 0.1 %, and by less for similar formats.
_SAMPLE = 1 << 19

#: One in this number of sampled blocks keeps the errors of its entries, to measure how similar two formats are.
_SOME = 8


class Rounded(NamedTuple):
    """Errors of a sample in one format.

    Parameters
    ----------
    squared_error : float
        Estimate of the weighted squared error of the whole array.
    errors : array of float64, shape (k,)
        Errors of some entries, times the square root of their importance. Distances of formats are computed from them.
    """

    squared_error: float
    errors: Array


class RoundingSample:
    """Sample of blocks spread evenly over an array. Scales are computed for the whole array, since they share offsets.

    Parameters
    ----------
    array : array of float32 or float64, any shape
        Array without NaN and infinity.
    like : BlockFormat
        Format with the codebook and the blocks of the formats to compare.
    weights : array that broadcasts to the shape of ``array``, optional
        Importance of each entry that is rounded, which is a rotated one in a rotated format: the factor of its squared error.
    name : str, optional
        Name of the array in messages.
    """

    def __init__(self, array: Array, like: BlockFormat, weights: Array | None = None, *, name: str = "array") -> None:
        xp = namespace(array)
        if like.rotation is not None:
            array = rotated(array, like.rotation, name)
        self._rotation, like = like.rotation, like.unrotated
        self._source = Source(array, None, like, name)
        self._statistic, self._low = block_statistics(self._source)
        layout, device = self._source.layout, device_of(array)
        every = max(1, layout.count // _SAMPLE)
        self._index = xp.arange(0, layout.blocks, every, dtype=xp.int64, device=device)
        own = xp.ones_like(array) if weights is None and not layout.is_even else weights
        # Importance is padded with zeros as the weights are, so the padding of short blocks adds no error.
        self._importance = None if own is None else _spread(xp.broadcast_to(own, array.shape), like, every)
        self._rows = _spread(array, like, every)

    def rounded(self, fmt: BlockFormat) -> Rounded:
        """Return the errors of the sample in a format, rounded to nearest under the absolute maxima of its blocks.

        Parameters
        ----------
        fmt : BlockFormat
            Format that differs from the one of the sample only in the format of its scales.

        Returns
        -------
        Rounded
            Errors under the scales as the format stores them.

        Raises
        ------
        InvalidArgumentError
            If the format has another codebook or other blocks.
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
        if self._importance is not None:
            some = some * xp.sqrt(xp.astype(self._importance[::_SOME, :], xp.float64))
        # The sample takes every n-th block, so the total is estimated by the error of the sample over its share of blocks.
        share = self._rows.shape[0] / max(1, self._source.layout.blocks)
        error = ops.sum_of_squares(lost, self._importance) / (share or 1.0)
        return Rounded(error, xp.reshape(some, (-1,)))

    def quantized(self, fmt: BlockFormat) -> QuantizedArray:
        """Quantize the whole array; the absolute maxima of its blocks are found once for all formats.

        Parameters
        ----------
        fmt : BlockFormat
            Format that differs from the one of the sample only in the format of its scales.

        Returns
        -------
        QuantizedArray
            The result of :func:`quantize`.
        """
        return as_rotated(assemble(*self._chosen(fmt)), fmt)

    def _chosen(self, fmt: BlockFormat) -> tuple[Source, Choice]:
        known = replace(self._source.fmt, rotation=self._rotation)
        if replace(fmt, scales=known.scales) != known:
            raise InvalidArgumentError(f"fmt must differ from {known} only in its scales, got {fmt}.")
        source = replace(self._source, fmt=fmt.unrotated)
        return source, by_absmax(source, self._statistic, self._low)


def _spread(array: Array, fmt: BlockFormat, every: int) -> Array:
    """Return every ``every``-th block, one per row."""
    xp, source = namespace(array), Source(array, None, fmt, "array")
    parts = [rows.entries[-blocks.start % every :: every, :] for blocks, rows in source.pieces(piece_size(array))]
    if not parts:
        shape = (0, source.layout.block_size)
        return xp.zeros(shape, dtype=array.dtype, device=device_of(array))
    return xp.concat(parts)
