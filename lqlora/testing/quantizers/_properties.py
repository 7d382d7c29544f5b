"""The properties: each a function whose docstring is the promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from lqlora.testing._promises import Property, promises
from lqlora.testing._verdicts import AdapterError, NotApplicableError, RefusedError, ViolationError
from lqlora.testing.quantizers import _inputs
from lqlora.testing.quantizers._subject import as_row, on_host
from lqlora.testing.strategies import lay_out

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.testing.quantizers._inputs import Weights
    from lqlora.testing.quantizers._subject import Subject, Wide

__all__ = ["REGISTRY"]


REGISTRY: dict[str, Property[Subject]] = {}
_promise = promises(REGISTRY)


@_promise(_inputs.shaped)
def shape(subject: Subject, w: Weights) -> None:
    """What comes back has the shape of the input."""
    found = subject.round_trip(w).shape
    if found != w.shape:
        raise ViolationError(f"shape {w.shape} became {found}")


@_promise(_inputs.ordinary)
def finite(subject: Subject, w: Weights) -> None:
    """Finite weights come back finite."""
    _expect_finite(subject.flat(w), w)


@_promise(_inputs.ordinary)
def input_unchanged(subject: Subject, w: Weights) -> None:
    """The input is not written to."""
    taken = subject.adapted(w.copy())
    subject.run(taken)
    after = on_host(taken)
    if after.tobytes() != w.tobytes():
        i = int(np.flatnonzero(after != w)[0])
        raise ViolationError(f"weight {w[i]} at index {i} of the input is {after[i]} afterwards")


@_promise(_inputs.ordinary)
def deterministic(subject: Subject, w: Weights) -> None:
    """The same input comes back the same the second time."""
    _expect_same(subject.flat(w), subject.flat(w), w, "the second time")


@_promise(_inputs.zeros)
def zeros(subject: Subject, w: Weights) -> None:
    """An array of zeros comes back as zeros."""
    _expect_same(subject.flat(w), np.zeros(w.size), w, "if it were right")


@_promise(_inputs.with_zero_block, "block_size")
def zero_block(subject: Subject, w: Weights) -> None:
    """A block of zeros beside other blocks comes back as zeros."""
    out = subject.flat(w)
    _expect_same(np.where(subject.absmax(w) == 0, out, 0.0), np.zeros(w.size), w, "if it were right")


@_promise(_inputs.strided)
def layout(subject: Subject, w: Weights, layout: str) -> None:
    """Strides change nothing: only the logical order of the weights counts."""
    out = as_row(subject.run(subject.adapted(lay_out(w, layout))), w.size)
    _expect_same(out, subject.flat(w), w, "from a contiguous copy")


@_promise(_inputs.with_power)
def power_of_two_scaling(subject: Subject, w: Weights, power: int) -> None:
    """Weights times a power of two come back times that power."""
    absmax = subject.absmax(w)
    lowest = int(np.ceil(np.log2(subject.smallest / absmax.min())))
    highest = int(np.floor(np.log2(subject.largest / absmax.max())))
    power = int(np.clip(power, lowest, max(lowest, highest)))
    out = subject.flat(np.ldexp(w, power).astype(np.float32))
    _expect_same(out / 2.0**power, subject.flat(w), w, f"without a factor of 2**{power} that was divided out here")


@_promise(_inputs.ordinary)
def sign_kept(subject: Subject, w: Weights) -> None:
    """No weight comes back with the opposite sign."""
    if subject.levels is not None and not (subject.levels == 0).any():
        raise NotApplicableError("the levels have no zero")
    out = subject.flat(w)
    wrong = np.flatnonzero(np.sign(out) * np.sign(w) < 0)
    if wrong.size:
        raise ViolationError(f"weight {w[wrong[0]]} at index {wrong[0]} came back as {out[wrong[0]]}")


@_promise(_inputs.ordinary, "symmetric")
def sign_symmetry(subject: Subject, w: Weights) -> None:
    """Weights with the signs turned come back with the signs turned."""
    _expect_same(-subject.flat(-w), subject.flat(w), w, "if all signs are turned before and back after")


@_promise(_inputs.with_replacement, "block_size", "independent_blocks")
def locality(subject: Subject, w: Weights, block: int, replacement: Weights) -> None:
    """What a block comes back as does not depend on other blocks."""
    places = subject.blocks(w.size)
    place = places[block % len(places)]
    other = w.copy()
    other[place] = replacement
    outside = np.ones(w.size, dtype=bool)
    outside[place] = False
    _expect_same(subject.flat(w)[outside], subject.flat(other)[outside], w[outside], f"with another block {block}")


@_promise(_inputs.with_tail, "block_size")
def ragged_tail(subject: Subject, w: Weights) -> None:
    """A last block that is not full comes back as if it were filled up with copies of its first weight."""
    start = subject.blocks(w.size)[-1].start
    filled = np.append(w, np.full(start + (subject.block_size or 1) - w.size, w[start]))
    _expect_same(subject.flat(w), subject.flat(filled)[: w.size], w, "in a block that is filled up")


@_promise(_inputs.of_odd_size)
def odd_size(subject: Subject, w: Weights) -> None:
    """An odd number of weights comes back as with one more copy of the last weight."""
    _expect_same(subject.flat(w), subject.flat(np.append(w, w[-1]))[: w.size], w, "with one more weight")


@_promise(_inputs.single)
def one_element(subject: Subject, w: Weights) -> None:
    """A single weight comes back as it does among copies of itself."""
    _expect_same(subject.flat(w), subject.flat(np.repeat(w, subject.unit))[:1], w, "among copies of itself")


@_promise(_inputs.single)
def zero_dimensional(subject: Subject, w: Weights) -> None:
    """An array of no dimensions comes back as one, with the value that an array of one weight has."""
    out = subject.round_trip(w.reshape(()))
    if out.shape != ():
        raise ViolationError(f"shape () became {out.shape}")
    _expect_same(out.reshape(1), subject.flat(w), w, "in one dimension")


@_promise(_inputs.empty)
def empty(subject: Subject, w: Weights) -> None:
    """An array without weights comes back in its shape."""
    found = subject.round_trip(w).shape
    if found != w.shape:
        raise ViolationError(f"shape {w.shape} became {found}")


@_promise(_inputs.ordinary, "block_size", "levels")
def error_bound(subject: Subject, w: Weights) -> None:
    """No error is beyond half the widest gap between levels, times the largest weight of the block."""
    _expect_near(subject.flat(w), w, subject.allowed_error(w))


@_promise(_inputs.ordinary, "block_size", "levels")
def nearest_level(subject: Subject, w: Weights) -> None:
    """In each block some scale makes every result the level nearest to its weight."""
    out = subject.flat(w)
    for number, place in enumerate(subject.blocks(w.size)):
        weights, results = w[place].astype(np.float64), out[place]
        if not any(_all_nearest(subject, weights, results, scale) for scale in _scales(subject, weights, results)):
            raise ViolationError(f"no scale does that for block {number}, which came back as {_short(results)}")


def _scales(subject: Subject, weights: Wide, results: Wide) -> list[float]:
    """Return what the scale may be: the one of the definition, or one that makes the largest result a level.

    A scale that is quantized itself may be zero.
    """
    anchor = results[np.argmax(np.abs(results))]
    levels = subject.normalized[np.sign(subject.normalized) == np.sign(anchor)]
    least = [] if subject.independent_blocks else [0.0]
    return [float(np.abs(weights).max()), *(anchor / levels[levels != 0]).tolist(), *least]


def _all_nearest(subject: Subject, weights: Wide, results: Wide, scale: float) -> bool:
    table = subject.normalized * scale
    slack = max(subject.tolerance, 2.0**-20) * max(scale, float(np.abs(weights).max()))
    is_level = _distance(results, table) <= slack
    return bool((is_level & (np.abs(results - weights) <= _distance(weights, table) + slack)).all())


def _distance(values: Wide, table: Wide) -> Wide:
    """Return the distance of each value from the nearest entry of a sorted table."""
    above = np.clip(np.searchsorted(table, values), 1, table.size - 1)
    return np.asarray(np.minimum(np.abs(values - table[above - 1]), np.abs(values - table[above])))


@_promise(_inputs.repeated, "block_size")
def equal_weights(subject: Subject, w: Weights) -> None:
    """Equal weights of a block come back equal, also those midway between two levels."""
    out = subject.flat(w)
    for place in subject.blocks(w.size):
        _, first, member = np.unique(w[place], return_index=True, return_inverse=True)
        _expect_same(out[place], out[place][first[member]], w[place], "elsewhere in its block")


@_promise(_inputs.tied, "block_size", "levels", "ties_to")
def tie_direction(subject: Subject, w: Weights) -> None:
    """A weight midway between two levels goes to the level that was asked for, the lower or the upper."""
    levels, absmax, out = subject.normalized, subject.absmax(w), subject.flat(w)
    below = np.clip(np.searchsorted(levels, w / absmax) - 1, 0, levels.size - 2)
    lower, upper = levels[below] * absmax, levels[below + 1] * absmax
    nearer_to_lower = np.abs(out - lower) < np.abs(out - upper)
    wrong = np.flatnonzero((w != absmax) & (nearer_to_lower == (subject.ties_to == "upper")))
    if wrong.size:
        i = int(wrong[0])
        raise ViolationError(f"weight {w[i]} at index {i}, between {lower[i]:.7g} and {upper[i]:.7g}, became {out[i]}")


@_promise(_inputs.ordinary, "independent_blocks")
def idempotence(subject: Subject, w: Weights) -> None:
    """What came back comes back unchanged when it is quantized again."""
    once = subject.round_trip(w).astype(np.float32)
    _expect_near(subject.flat(once), once, subject.tolerance * subject.absmax(once))


@_promise(_inputs.with_non_finite)
def non_finite_refused(subject: Subject, w: Weights, index: int, value: float) -> None:
    """NaN and infinity are refused by an exception."""
    try:
        subject.round_trip(_with(w, index, value))
    except RefusedError:
        return
    raise ViolationError(f"{value} at index {index % w.size} was accepted")


@_promise(_inputs.with_non_finite, "block_size")
def non_finite_contained(subject: Subject, w: Weights, index: int, value: float) -> None:
    """NaN and infinity are refused, or leave other blocks finite, and unchanged if blocks are independent."""
    try:
        out = subject.flat(_with(w, index, value))
    except RefusedError:
        return
    outside = np.ones(w.size, dtype=bool)
    outside[next(place for place in subject.blocks(w.size) if place.stop > index % w.size)] = False
    where = f"with {value} at index {index % w.size} of another block"
    _expect_finite(out[outside], w[outside], where)
    if subject.independent_blocks:
        _expect_same(subject.flat(w)[outside], out[outside], w[outside], where)


def _with(w: Weights, index: int, value: float) -> Weights:
    changed = w.copy()
    changed[index % w.size] = value
    return changed


@_promise(_inputs.between(1.401298464324817e-45, 1.1754942106924411e-38))
def subnormal(subject: Subject, w: Weights) -> None:
    """Subnormal weights come back finite, off by no more than the largest of them."""
    _expect_near(subject.flat(w), w, np.full(w.shape, np.abs(w).max(), dtype=np.float64))


@_promise(_inputs.between(1.7014118346046923e38, 3.4028234663852886e38))
def huge(subject: Subject, w: Weights) -> None:
    """The largest weights of float32 come back finite, off by no more than the largest of them."""
    _expect_near(subject.flat(w), w, np.full(w.shape, np.abs(w).max(), dtype=np.float64))


@_promise(_inputs.in_dtype(np.float16, 2.0**-8, 2.0**14))
def float16(subject: Subject, w: npt.NDArray[np.float16]) -> None:
    """Weights of float16 are accepted and keep the error bound, up to rounding to float16."""
    _expect_accepted(subject, w)


@_promise(_inputs.in_dtype(ml_dtypes.bfloat16, 2.0**-20, 2.0**20))
def bfloat16(subject: Subject, w: npt.NDArray[Any]) -> None:
    """Weights of bfloat16 are accepted and keep the error bound, up to rounding to bfloat16."""
    _expect_accepted(subject, w)


@_promise(_inputs.in_dtype(np.float64, 2.0**-20, 2.0**20))
def float64(subject: Subject, w: npt.NDArray[np.float64]) -> None:
    """Weights of float64 are accepted and keep the error bound, up to rounding to float32."""
    _expect_accepted(subject, w)


@_promise(_inputs.integers)
def integers_refused(subject: Subject, w: npt.NDArray[np.int32]) -> None:
    """An array of integers is refused by an exception."""
    try:
        subject.round_trip(w)
    except RefusedError:
        return
    raise ViolationError("int32 was accepted")


def _expect_accepted(subject: Subject, w: npt.NDArray[Any]) -> None:
    try:
        subject.adapted(w)
    except AdapterError:
        raise NotApplicableError(f"adapt() takes no {w.dtype}") from None
    rounding = 4 * max(float(ml_dtypes.finfo(w.dtype).eps), 2.0**-23)  # type: ignore[no-untyped-call]
    _expect_near(subject.flat(w), w, subject.allowed_error(w, rounding))


def _expect_finite(out: Wide, w: npt.NDArray[Any], where: str = "") -> None:
    wrong = np.flatnonzero(~np.isfinite(out))
    if wrong.size:
        raise ViolationError(f"weight {w[wrong[0]]} came back as {out[wrong[0]]} {where}".rstrip())


def _expect_same(actual: Wide, expected: Wide, w: npt.NDArray[Any], otherwise: str) -> None:
    """Compare every bit but those of the sign of zero and of NaN."""
    wrong = np.flatnonzero(~((actual == expected) | (np.isnan(actual) & np.isnan(expected))))
    if wrong.size:
        i = int(wrong[0])
        weight = w.reshape(-1)[i]
        raise ViolationError(f"weight {weight} at index {i} came back as {actual[i]}, and as {expected[i]} {otherwise}")


def _expect_near(out: Wide, w: npt.NDArray[Any], allowed: Wide) -> None:
    wide = w.astype(np.float64).reshape(-1)
    error = np.nan_to_num(np.abs(out - wide), nan=np.inf)
    if (error > allowed).any():
        i = int(np.argmax(np.where(error > allowed, error, -1.0)))
        came = f"weight {wide[i]:.7g} at index {i} came back as {out[i]:.7g}"
        raise ViolationError(f"{came}, an error of {error[i]:.3g} where {allowed[i]:.3g} is allowed")


def _short(values: Wide) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:8])
    return f"[{shown}{', …' if values.size > 8 else ''}]"
