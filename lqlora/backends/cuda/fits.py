"""Calls of the CUDA kernels for fits: searches for ratios, and sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora._dispatch import dtype_name
from lqlora.backends.cuda.operations import Kernels, lanes_for
from lqlora.ops.sums import unit_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["LONGEST_SEARCH", "Fits"]

_TYPES = {"float32": "float", "float64": "double"}

#: Threads of a block, which may share one row, and entries of a row that a thread holds in registers: TEAM and SLOTS of
#: halving.cuh. 512 threads leave 64 registers to each thread if two blocks run at once, which eight entries with their
#: weights and the search fit into. Longer rows would be read from memory again for every ratio.
_TEAM, _SLOTS = 512, 8
LONGEST_SEARCH = _TEAM * _SLOTS

#: Terms that one pass adds to one, four halvings at once, for rows that are longer than a block can hold.
_HALVED = 16

#: Terms of a thread that adds to bins. With more terms per thread there are fewer blocks of threads, and each block
#: adds its sums to global memory once.
_TERMS = 16


class Fits(Kernels):
    """Calls of the kernels that fits of scales and levels need, in addition to those of :class:`Kernels`."""

    def row_sums(self, rows: Array) -> Array:
        """Halve long rows in passes over memory, then in registers."""
        (count, length), name = rows.shape, dtype_name(rows)
        while count and length > LONGEST_SEARCH:
            left = -(-length // _HALVED)
            shorter = self._memory.empty(count * left, name, rows)
            sizes = (np.int64(count), np.int64(length), np.int64(left), np.float64(1 / left))
            self._run("sums", f"halve_rows<{_TYPES[name]}>", count * left, (rows, shorter, *sizes))
            rows, length = shorter, left
        sums = self._memory.empty(count, name, rows)
        if count:
            lanes = lanes_for(length, _SLOTS, _TEAM)
            arguments = (rows, sums, np.int64(count), np.int32(length), np.int32(lanes))
            self._run("sums", f"row_sums<{_TYPES[name]}>", count * lanes, arguments, _TEAM)
        return sums

    def best_ratios(
        self,
        rows: Array,
        weights: Array | None,
        levels: npt.NDArray[np.float32],
        boundaries: npt.NDArray[np.float32],
        zeros: Array | None,
        grid: Sequence[float],
        refinements: int,
    ) -> Array:
        """Try all ratios while a row is in registers."""
        count, length = rows.shape
        best = self._memory.empty(count, "float32", rows)
        if count:
            bits = max(1, (len(levels) - 1).bit_length())
            lanes = lanes_for(length, _SLOTS, _TEAM)
            tried = np.asarray(grid, dtype=np.float32)
            tables = ((boundaries, 2**bits - 1, np.inf), (levels, 2**bits, 0.0), (tried, len(tried), 0.0))
            sizes = (np.int64(count), np.int32(length), np.int32(lanes))
            given = (rows, *_or(weights, rows), *_or(zeros, rows), *tables, np.int32(len(tried)), np.int32(refinements))
            self._run("search", f"best_ratios<{bits}>", count * lanes, (*given, best, *sizes), _TEAM)
        return best

    def bin_sums(self, terms: Array, bins: Array, count: int) -> Array:
        """Find the largest term, then add the terms as integers."""
        entries = terms.shape[0]
        given = (terms, bins, np.int64(entries))
        found = self._exact_sums(("bin_maximum<double>", "bin_sums<double>"), given, entries, count, 1)
        return ops.bin_sums.reference(terms, bins, count) if found is None else found

    def level_sums(
        self,
        rows: Array,
        weights: Array | None,
        importance: Array,
        ratios: Array,
        codes: Array,
        sets: Array,
        size: int,
        count: int,
    ) -> tuple[Array, Array]:
        """Find the largest terms of both sums, then add the terms as integers."""
        entries, columns, bins = rows.shape[0] * rows.shape[1], rows.shape[1], count * size
        sizes = (np.int64(size), np.int64(entries), np.int64(columns), np.float64(1 / columns))
        given = (rows, rows if weights is None else weights, importance, ratios, codes, sets, *sizes)
        weighted = str(weights is not None).lower()
        names = (f"level_maxima<{weighted}>", f"level_sums<{weighted}>")
        found = self._exact_sums(names, given, entries, bins, 2)
        if found is None:
            return ops.level_sums.reference(rows, weights, importance, ratios, codes, sets, size, count)
        return found[:bins], found[bins:]

    def _exact_sums(
        self, names: tuple[str, str], given: tuple[Any, ...], entries: int, bins: int, kinds: int
    ) -> Array | None:
        """Return the sums of one or two kinds of terms in all bins, or None if a term is not finite.

        The terms are rounded to integers, as :mod:`lqlora.ops.sums` describes: atomic additions may come in any order.
        """
        like, work = given[0], -(-entries // _TERMS)
        largest = self._memory.zeros(kinds, "int64", like)
        self._run("sums", names[0], work, (*given, largest))
        # The maxima are the bits of float64. Reading them waits for the device once: the host derives the units, so
        # that they are the units of the reference to the bit.
        magnitudes = np.array(largest.tolist(), dtype=np.int64).view(np.float64).tolist()
        if not np.isfinite(magnitudes).all():
            return None
        units = [np.float64(unit_of(magnitude, entries) if magnitude else 1.0) for magnitude in magnitudes]
        totals = self._memory.zeros(kinds * bins, "int64", like)
        found = self._memory.empty(kinds * bins, "float64", like)
        self._run("sums", names[1], work, (*given, *(1 / unit for unit in units), np.int64(bins), totals))
        own = (totals, units[0], units[-1], np.int64(bins), found, np.int64(kinds * bins))
        self._run("sums", "in_units<double>", kinds * bins, own)
        return found


def _or(array: Array | None, other: Array) -> tuple[Array, np.int32]:
    """Return an array to pass for an optional one, and a flag that says whether the kernel may read it."""
    return (other, np.int32(0)) if array is None else (array, np.int32(1))
