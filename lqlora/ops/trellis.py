r"""Trellis-coded quantization under given scales: the best sequence of codes, and the values of codes.

The codes of a sequence form a stream of bits, ``K`` for each weight. The *state* of a weight is the window of the last
``L`` bits of the stream, with the newest bits highest, and the value of a weight is the level of its state:

.. math:: s_t = \lfloor s_{t-1} / 2^K \rfloor + 2^{L-K} c_t , \qquad \hat x_t = \text{scale} \cdot \text{levels}[s_t] .

So neighbors share bits, and ``2**L`` levels are within reach of ``K`` bits a weight. The stream is *tail-biting*: the
window of the first weights continues in the last ones, as if the sequence were a circle. No state is stored, and any
weight can be decoded by itself.

A sequence is a block, cut into pieces of :data:`SEQUENCE` weights if it is longer. Each has one scale.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lqlora._dispatch import FLOATS, device_of, dtype_name, fitting, namespace, op, require_writable
from lqlora.errors import InvalidArgumentError
from lqlora.ops.casting import storage_cast, widen
from lqlora.ops.coding import normalize
from lqlora.ops.packing import pack_codes, packed_size, unpack_codes
from lqlora.ops.tables import pick, table_beside

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._dispatch.examples import BlocksProblem
    from lqlora._typing import Array

__all__ = ["SEQUENCE", "PackedTrellis", "decode_trellis", "encode_trellis", "trellis_codes", "trellis_values"]

#: Most weights of a sequence. The memory of a search is proportional to it, and longer ones gain nothing.
SEQUENCE = 256

#: Weights on either side of the seam that the state at the seam is chosen by. Decisions agree long before: a state forgets
#: all earlier codes after L / K weights, at most 16.
_CONTEXT = 32

#: Normalized weights beyond this magnitude count as this. Levels are below 5, and squares stay far from overflow.
_FARTHEST = 1024.0

#: Sums of errors, one for each state and sequence, that are held at a time.
_SUMS = 1 << 20


class _Group(NamedTuple):
    """Sequences of one length: the first weight and the block of each."""

    size: int
    starts: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64]


@functools.lru_cache(maxsize=256)
def _groups(count: int, block_size: int, length: int) -> tuple[tuple[_Group, ...], npt.NDArray[np.int64] | None]:
    """Return the sequences of an array by length, and the place of each weight among them if that is not its own."""
    # Lines of `length` weights are cut into blocks, and blocks into sequences. There are at most three lengths: whole
    # sequences, the rest of a long block, and the rest of a line.
    block_size = min(block_size, max(1, length))  # any Python integer
    firsts = np.arange(0, length, block_size)
    cuts = [np.arange(first, min(first + block_size, length), SEQUENCE) for first in firsts.tolist()]
    within = np.concatenate(cuts) if cuts else np.zeros(0, dtype=np.int64)
    block = np.repeat(np.arange(len(cuts)), [len(own) for own in cuts])
    ends = np.minimum(within + SEQUENCE, np.minimum((block + 1) * block_size, length))
    lines = np.arange(count // length if length else 0)
    starts = (lines[:, None] * length + within).reshape(-1)
    blocks = (lines[:, None] * len(cuts) + block).reshape(-1)
    sizes = np.tile(ends - within, len(lines))
    found = tuple(
        _Group(int(size), starts[sizes == size].astype(np.int64), blocks[sizes == size].astype(np.int64))
        for size in np.unique(sizes)[::-1]
    )
    if len(found) <= 1:
        return found, None
    order = np.concatenate([(own.starts[:, None] + np.arange(own.size)).reshape(-1) for own in found])
    return found, np.argsort(order)


def _rows_of(flat: Array, group: _Group, *, alone: bool) -> Array:
    """Return the sequences of a group as rows."""
    xp = namespace(flat)
    if alone:
        return xp.reshape(flat, (-1, group.size))
    index = (group.starts[:, None] + np.arange(group.size)).reshape(-1)
    return xp.reshape(pick(flat, xp.asarray(index, device=device_of(flat))), (-1, group.size))


def _joined(parts: list[Array], places: npt.NDArray[np.int64] | None) -> Array:
    """Return the rows of all groups as one flat array in the order of the weights."""
    xp = namespace(*parts)
    flat = [xp.reshape(part, (-1,)) for part in parts]
    if places is None:
        return flat[0]
    return pick(xp.concat(flat), xp.asarray(places, device=device_of(flat[0])))


def _is_even(groups: tuple[_Group, ...]) -> bool:
    """Return whether the sequences follow each other as rows."""
    return len(groups) == 1


class PackedTrellis(NamedTuple):
    """Weights in trellis codes: packed codes, decoded scales, and the levels of the states.

    Parameters
    ----------
    packed : array of uint8, shape (ceil(n * bits / 8),)
        Packed codes.
    scales : array of float32, shape (blocks,)
        Decoded scales, one a block; each line has ``ceil(length / block_size)`` blocks.
    levels : ndarray of float32, shape (2**L,)
        Level of each state of ``L`` bits.
    bits : int
        Bits per code, ``K``.
    block_size : int
        Weights per scale.
    length : int
        Weights of a line. Each line begins a new block.
    """

    packed: Array
    scales: Array
    levels: npt.NDArray[np.float32]
    bits: int
    block_size: int
    length: int

    def fits(self, count: int) -> bool:
        """Return whether the arrays hold as much as a number of weights takes: see :meth:`require_fit`.

        Parameters
        ----------
        count : int
            Number of weights.

        Returns
        -------
        bool
            False where :meth:`require_fit` raises.
        """
        try:
            self.require_fit(count)
        except InvalidArgumentError:
            return False
        return True

    def require_fit(self, count: int) -> None:
        """Raise unless the arrays hold as much as a number of weights takes.

        Parameters
        ----------
        count : int
            Number of weights.

        Raises
        ------
        InvalidArgumentError
            If the numbers of bytes or scales differ, the levels are not a power of two, or lines do not divide the weights.
        """
        packed, scales, bits = self.packed, self.scales, self.bits
        _require_trellis(self.levels, bits)
        blocks = _blocks(count, self.block_size, self.length)
        if packed.shape != (packed_size(count, bits),) or scales.shape != (blocks,):
            raise InvalidArgumentError(
                f"stored must hold {count} codes of {bits} bits and {blocks} scales, got packed and scales of shapes "
                f"{tuple(packed.shape)} and {tuple(scales.shape)}."
            )

    def table(self) -> npt.NDArray[np.float32]:
        """Return the levels in the dtype and byte order that kernels and look-ups take.

        Returns
        -------
        ndarray of float32, shape (2**L,)
            The levels.
        """
        return np.ascontiguousarray(self.levels, dtype=np.float32)


def _require_trellis(levels: npt.NDArray[np.float32], bits: int) -> None:
    states = levels.shape[0] if levels.ndim == 1 else 0
    if not 1 <= bits <= 8 or states < 4**bits or states > 2**16 or states & (states - 1):
        raise InvalidArgumentError(
            f"levels must be those of 2**L states, with L from twice the bits to 16, got {states} for {bits} bits."
        )


def _blocks(count: int, block_size: int, length: int) -> int:
    if block_size < 1 or length < 0 or (count % length if length else count):
        raise InvalidArgumentError(
            f"block_size must be at least 1 and length must divide the {count} weights, got {block_size} and {length}."
        )
    return count // length * -(-length // block_size) if length else 0


def _trellis(problem: BlocksProblem) -> tuple[npt.NDArray[np.float32], int]:
    """Return levels and bits of a small trellis."""
    bits = min(problem.bits, 3)
    levels = np.random.default_rng(problem.seed).standard_normal(4**bits << problem.seed % 3)
    return levels.astype(np.float32), bits


def _encoding(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return example arguments of the search."""
    scales = problem.scales.astype(problem.wide.dtype)
    importance = np.random.default_rng(problem.seed).random(problem.count).astype(np.float32)
    weights = importance if problem.seed % 2 else None
    return problem.weights, scales, weights, *_trellis(problem), problem.block_size, problem.count


def _decoding(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return example arguments of decoding."""
    levels, bits = _trellis(problem)
    packed = np.random.default_rng(problem.seed).integers(0, 256, packed_size(problem.count, bits)).astype(np.uint8)
    stored = PackedTrellis(packed, problem.scales, levels, bits, problem.block_size, problem.count)
    return stored, problem.target()


@op(examples=_encoding)
def encode_trellis(
    flat: Array,
    scales: Array,
    importance: Array | None,
    levels: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    length: int,
) -> Array:
    """Return the packed codes of the sequences of least squared error under given scales.

    Parameters
    ----------
    flat : array of float16, bfloat16, float32 or float64, shape (n,)
        Weights.
    scales : array of float32, or float64 for float64, shape (blocks,)
        Decoded scales. A block whose scale is zero is encoded as zeros.
    importance : array of float32, shape (n,), or None
        Factor of each squared error, not negative.
    levels : ndarray of float32, shape (2**L,)
        Level of each state.
    bits : int
        Bits per code.
    block_size : int
        Weights per scale.
    length : int
        Weights of a line; it divides ``n``. Each line begins a new block.

    Returns
    -------
    array of uint8, shape (ceil(n * bits / 8),)
        Packed codes.

    Raises
    ------
    InvalidArgumentError
        If the numbers of scales or levels do not fit.

    Notes
    -----
    The Viterbi algorithm finds the best path through ``2**L`` states in about ``2**L`` steps a weight. The state in which
    the circle is closed is taken from the best open path around the seam, and the second search starts and ends there. Of a
    sequence of at most ``L`` bits that state would leave no choice, so all its codes are tried.

    References
    ----------
    QTIP, arXiv 2406.11235, sections 3.1 and 3.2 (bit-shift trellis) and algorithm 4 (tail-biting).

    Examples
    --------
    >>> import numpy as np
    >>> levels = np.array([-1.5, -0.5, 0.5, 1.5], dtype=np.float32)
    >>> encode_trellis(np.array([1.5, 1.5, -1.5]), np.array([1.0]), None, levels, 1, 64, 3).tolist()
    [3]
    """
    xp = namespace(flat, scales, importance, dtypes=FLOATS)
    _require_trellis(levels, bits)
    count = flat.shape[0]
    blocks = _blocks(count, block_size, length)
    if scales.shape != (blocks,) or (importance is not None and importance.shape != flat.shape):
        raise InvalidArgumentError(
            f"scales must have shape ({blocks},), and importance that of flat, got {tuple(scales.shape)} and "
            f"{None if importance is None else tuple(importance.shape)}."
        )
    groups, places = _groups(count, block_size, length)
    if not groups:
        return xp.zeros((0,), dtype=xp.uint8, device=device_of(flat))
    wide, found = widen(flat, "flat"), []
    for group in groups:
        alone = _is_even(groups)
        own = pick(scales, xp.asarray(group.blocks, device=device_of(scales)))
        rows = normalize(_rows_of(wide, group, alone=alone), own)
        weights = None if importance is None else _rows_of(importance, group, alone=alone)
        found.append(trellis_codes(rows, weights, levels, bits))
    return pack_codes(_joined(found, places), bits)


@op(examples=_decoding, record=("stored", PackedTrellis))
def decode_trellis(stored: PackedTrellis, out: Array) -> Array:
    """Write the decoded weights: the level of each state times the scale of its block.

    Parameters
    ----------
    stored : PackedTrellis
        Packed codes, scales and levels.
    out : array of float32, float16 or bfloat16, shape (n,)
        Array that is written.

    Returns
    -------
    array, shape (n,)
        ``out``. Products are rounded to float32, and then to its dtype.

    Raises
    ------
    InvalidArgumentError
        If the arrays do not hold ``n`` weights, or ``out`` cannot be written to.

    References
    ----------
    QTIP, arXiv 2406.11235, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> levels = np.array([-1.5, -0.5, 0.5, 1.5], dtype=np.float32)
    >>> packed, scales = np.array([3], dtype=np.uint8), np.ones(1, dtype=np.float32)
    >>> decode_trellis(PackedTrellis(packed, scales, levels, 1, 64, 3), np.empty(3, dtype=np.float32)).tolist()
    [0.5, 1.5, -0.5]
    """
    packed, scales, _, bits, block_size, length = stored
    xp, count = namespace(packed, scales, out), math.prod(out.shape)
    stored.require_fit(count)
    require_writable(out, "out")
    levels = stored.table()
    groups, places = _groups(count, block_size, length)
    if not groups:
        return out
    codes, found = unpack_codes(packed, bits, count), []
    for group in groups:
        values = trellis_values(_rows_of(codes, group, alone=_is_even(groups)), levels, bits)
        found.append(values * pick(scales, xp.asarray(group.blocks, device=device_of(scales)))[:, None])
    values = _joined(found, places)
    out[...] = values if dtype_name(out) == "float32" else storage_cast(values, dtype_name(out))
    return out


@fitting
def trellis_values(codes: Array, levels: npt.NDArray[np.float32], bits: int) -> Array:
    """Return the levels of tail-biting sequences of codes.

    Parameters
    ----------
    codes : array of uint8, shape (m, n)
        One sequence a row.
    levels : ndarray of float32, shape (2**L,)
        Level of each state.
    bits : int
        Bits per code.

    Returns
    -------
    array of float32, shape (m, n)
        Level of the state of each weight.

    Examples
    --------
    >>> import numpy as np
    >>> trellis_values(np.array([[1, 1, 0]], dtype=np.uint8), np.arange(4, dtype=np.float32), 1).tolist()
    [[2.0, 3.0, 1.0]]
    """
    xp = namespace(codes)
    wide, state_bits = xp.astype(codes, xp.int64), len(levels).bit_length() - 1
    # The code i weights ago lies at bit L - K (i + 1) of the state. Of the oldest one the low bits may have left the window.
    states = xp.zeros_like(wide)
    for back in range(-(-state_bits // bits)):
        shift = state_bits - bits * (back + 1)
        own = xp.roll(wide, back, axis=1)
        states = states + (own * 2**shift if shift >= 0 else own // 2**-shift)
    return xp.reshape(pick(table_beside(levels, codes), xp.reshape(states, (-1,))), codes.shape)


@fitting
def trellis_codes(rows: Array, importance: Array | None, levels: npt.NDArray[np.float32], bits: int) -> Array:
    """Return the tail-biting sequences of codes of least squared error.

    Parameters
    ----------
    rows : array of float32 or float64, shape (m, n)
        One sequence of normalized weights a row.
    importance : array of float32 or float64, shape (m, n), or None
        Factor of each squared error.
    levels : ndarray of float32, shape (2**L,)
        Level of each state.
    bits : int
        Bits per code.

    Returns
    -------
    array of uint8, shape (m, n)
        Codes.

    Notes
    -----
    Sums of squared errors are float32, added from the first weight to the last, and the first of equal sums wins. All
    implementations compute them in this order, so they return the same bytes.

    Examples
    --------
    >>> import numpy as np
    >>> levels = np.array([-1.5, -0.5, 0.5, 1.5], dtype=np.float32)
    >>> trellis_codes(np.array([[1.5, 1.5, -1.5, -1.5]]), None, levels, 1).tolist()
    [[1, 1, 0, 0]]
    """
    xp = namespace(rows, importance)
    targets = xp.astype(xp.clip(rows, -_FARTHEST, _FARTHEST), xp.float32)
    weights = None if importance is None else xp.astype(importance, xp.float32)
    count, step = rows.shape[1], max(1, _SUMS // len(levels))
    search = _enumerate if count * bits <= len(levels).bit_length() - 1 else _close
    found = [
        search(
            targets[i : min(i + step, rows.shape[0]), :],
            None if weights is None else weights[i : min(i + step, rows.shape[0]), :],
            levels,
            bits,
        )
        for i in range(0, rows.shape[0], step)
    ]
    if not found:
        return xp.zeros(rows.shape, dtype=xp.uint8, device=device_of(rows))
    return found[0] if len(found) == 1 else xp.concat(found)


def _errors(targets: Array, importance: Array | None, values: Array) -> Array:
    """Return the weighted squared errors of some values."""
    gaps = targets - values
    squares = gaps * gaps
    return squares if importance is None else importance * squares


def _enumerate(targets: Array, importance: Array | None, levels: npt.NDArray[np.float32], bits: int) -> Array:
    """Return the best codes of sequences of as many bits as a state or fewer: try all."""
    xp, count = namespace(targets), targets.shape[1]
    numbers = np.arange(2 ** (bits * count))[:, None]
    choices = xp.asarray(
        (numbers >> (bits * np.arange(count)) & (2**bits - 1)).astype(np.uint8), device=device_of(targets)
    )
    values = trellis_values(choices, levels, bits)
    total = None
    for at in range(count):
        own = None if importance is None else importance[:, at : at + 1]
        errors = _errors(targets[:, at : at + 1], own, values[:, at][None, :])
        total = errors if total is None else total + errors
    return xp.reshape(pick(choices, _first_minimum(total), axis=0), targets.shape)


def _first_minimum(sums: Array) -> Array:
    """Return the position of the smallest entry of each row; the first one if several are equal."""
    xp = namespace(sums)
    positions = xp.arange(sums.shape[1], dtype=xp.int64, device=device_of(sums))[None, :]
    smallest = sums == xp.min(sums, axis=1, keepdims=True)
    return xp.min(xp.where(smallest, positions, xp.full_like(positions, sums.shape[1])), axis=1)


def _close(targets: Array, importance: Array | None, levels: npt.NDArray[np.float32], bits: int) -> Array:
    """Return the codes of the best path from the state at the seam back to itself."""
    xp, count, table = namespace(targets), targets.shape[1], table_beside(levels, targets)
    # A short circle is walked around more than once.
    around = xp.asarray(np.arange(-_CONTEXT, _CONTEXT) % count, device=device_of(targets))
    seam = [None if own is None else pick(own, around, axis=1) for own in (targets, importance)]
    _, survivors = _best_path(seam[0], seam[1], table, bits, None)
    start = survivors[_CONTEXT - 1]
    return _best_path(targets, importance, table, bits, start)[0]


def _best_path(
    targets: Array, importance: Array | None, table: Array, bits: int, start: Array | None
) -> tuple[Array, list[Array]]:
    """Return the codes of the path of least error, and after each weight the bits of its state that stay.

    A path begins and ends with the bits of ``start``, or is free at both ends.
    """
    # Of a state s, the bits s // 2^K stay in the next one. Let best[p] be the least error of all paths after which the bits p
    # stay. The next state s holds p = s mod 2^(L - K) and the new code above it, so that
    #     best'[q] = min over the K lowest bits j of  best[s mod 2^(L - K)] + error of levels[s] ,   s = 2^K q + j .
    xp, (rows, count) = namespace(targets), targets.shape
    width, kept = 2**bits, table.shape[0] // 2**bits
    device = device_of(targets)
    best = xp.zeros((rows, kept), dtype=xp.float32, device=device)
    if start is not None:
        places = xp.arange(kept, dtype=xp.int64, device=device)[None, :]
        best = xp.where(places == start[:, None], best, xp.full_like(best, math.inf))
    back: list[Array] = []
    for at in range(count):
        own = None if importance is None else importance[:, at : at + 1]
        errors = _errors(targets[:, at : at + 1], own, table[None, :])
        sums = xp.reshape(best[:, None, :] + xp.reshape(errors, (rows, width, kept)), (rows, kept, width))
        best, lowest = sums[:, :, 0], xp.zeros((rows, kept), dtype=xp.uint8, device=device)
        for bit in range(1, width):
            other = sums[:, :, bit]
            wins = other < best
            best = xp.where(wins, other, best)
            lowest = xp.where(wins, xp.full_like(lowest, bit), lowest)
        back.append(lowest)
    after = _first_minimum(best) if start is None else start
    codes: list[Array] = []
    survivors = [after]
    for lowest in reversed(back):
        state = after * width + xp.astype(xp.take_along_axis(lowest, after[:, None], axis=1)[:, 0], xp.int64)
        codes.append(xp.astype(state // kept, xp.uint8))
        after = state % kept
        survivors.append(after)
    return xp.stack(codes[::-1], axis=1), survivors[-2::-1]
