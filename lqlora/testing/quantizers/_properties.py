"""Properties of quantizers. The docstring of each check is its statement in reports."""

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
    """The result has the shape of the input."""
    found = subject.round_trip(w).shape
    if found != w.shape:
        raise ViolationError(f"shape {w.shape} gave shape {found}")


@_promise(_inputs.ordinary)
def finite(subject: Subject, w: Weights) -> None:
    """Finite weights give finite results."""
    _expect_finite(subject.flat(w), w)


@_promise(_inputs.ordinary)
def input_unchanged(subject: Subject, w: Weights) -> None:
    """The quantizer does not modify its input."""
    taken = subject.adapted(w.copy())
    subject.run(taken)
    after = on_host(taken)
    if after.tobytes() != w.tobytes():
        i = int(np.flatnonzero(after != w)[0])
        raise ViolationError(f"weight {w[i]} at index {i} of the input is {after[i]} after the call")


@_promise(_inputs.ordinary)
def deterministic(subject: Subject, w: Weights) -> None:
    """Quantizing the same input twice gives the same result."""
    _expect_same(subject.flat(w), subject.flat(w), w, "in the second run")


@_promise(_inputs.zeros)
def zeros(subject: Subject, w: Weights) -> None:
    """An array of zeros gives zeros."""
    _expect_same(subject.flat(w), np.zeros(w.size), w)


@_promise(_inputs.with_zero_block, "block_size")
def zero_block(subject: Subject, w: Weights) -> None:
    """A block of zeros among other blocks gives zeros."""
    # Its scale is zero, and 0 / 0 is NaN. Results of other blocks are masked: error_bound is about those.
    out = subject.flat(w)
    _expect_same(np.where(subject.absmax(w) == 0, out, 0.0), np.zeros(w.size), w)


@_promise(_inputs.strided)
def layout(subject: Subject, w: Weights, layout: str) -> None:
    """Strides do not matter: only the logical order of the weights does."""
    out = as_row(subject.run(subject.adapted(lay_out(w, layout))), w.size)
    _expect_same(out, subject.flat(w), w, "in a contiguous copy")


@_promise(_inputs.with_power)
def power_of_two_scaling(subject: Subject, w: Weights, power: int) -> None:
    """Scaling the weights by a power of two scales the result by the same power."""
    # A power of two changes no digit of a float, so the comparison is exact. It finds an epsilon that is added to scales,
    # and a scale that is stored with too narrow an exponent.
    # The power is clipped so that every scaled block stays within the range that the quantizer supports.
    absmax = subject.absmax(w)
    lowest = int(np.ceil(np.log2(subject.smallest / absmax.min())))
    highest = int(np.floor(np.log2(subject.largest / absmax.max())))
    power = int(np.clip(power, lowest, max(lowest, highest)))
    out = subject.flat(np.ldexp(w, power).astype(np.float32))
    _expect_same(out / 2.0**power, subject.flat(w), w, f"if 2**{power} is neither multiplied in nor divided out")


@_promise(_inputs.ordinary)
def sign_kept(subject: Subject, w: Weights) -> None:
    """No weight changes its sign."""
    # If zero is a level, it is nearer to a weight than any level of the other sign. Without a level of zero a small weight
    # may be nearest to a level of the other sign, which is not a fault.
    if subject.levels is not None and not (subject.levels == 0).any():
        raise NotApplicableError("the levels have no zero")
    out = subject.flat(w)
    wrong = np.flatnonzero(np.sign(out) * np.sign(w) < 0)
    if wrong.size:
        raise ViolationError(f"weight {w[wrong[0]]} at index {wrong[0]} gave {out[wrong[0]]}")


@_promise(_inputs.ordinary, "symmetric")
def sign_symmetry(subject: Subject, w: Weights) -> None:
    """Negating the weights negates the result."""
    _expect_same(-subject.flat(-w), subject.flat(w), w, "if the weights are not negated")


@_promise(_inputs.with_replacement, "block_size", "independent_blocks")
def locality(subject: Subject, w: Weights, block: int, replacement: Weights) -> None:
    """The result of a block does not depend on other blocks."""
    places = subject.blocks(w.size)
    place = places[block % len(places)]
    other = w.copy()
    other[place] = replacement
    outside = np.ones(w.size, dtype=bool)
    outside[place] = False
    _expect_same(subject.flat(w)[outside], subject.flat(other)[outside], w[outside], f"if block {block} is replaced")


@_promise(_inputs.with_tail, "block_size")
def ragged_tail(subject: Subject, w: Weights) -> None:
    """A short last block gives the same result as if it were padded with copies of its first weight."""
    # Copies of a weight change neither absmax nor extremes. Zeros would change the extremes of affine formats.
    start = subject.blocks(w.size)[-1].start
    filled = np.append(w, np.full(start + (subject.block_size or 1) - w.size, w[start]))
    _expect_same(subject.flat(w), subject.flat(filled)[: w.size], w, "in a padded block")


@_promise(_inputs.of_odd_size)
def odd_size(subject: Subject, w: Weights) -> None:
    """An odd number of weights gives the same result as with one more copy of the last weight."""
    # Two codes of four bits share a byte: with an odd number the last half byte is the one that gets lost. The copy does
    # not change an absmax, because it either joins the block of its original or, in a block of its own, is its absmax.
    _expect_same(subject.flat(w), subject.flat(np.append(w, w[-1]))[: w.size], w, "with one more weight")


@_promise(_inputs.single)
def one_element(subject: Subject, w: Weights) -> None:
    """A single weight gives the same result as among copies of itself."""
    _expect_same(subject.flat(w), subject.flat(np.repeat(w, subject.unit))[:1], w, "among copies of itself")


@_promise(_inputs.single)
def zero_dimensional(subject: Subject, w: Weights) -> None:
    """A zero-dimensional array keeps its shape and gives the same result as an array of one weight."""
    out = subject.round_trip(w.reshape(()))
    if out.shape != ():
        raise ViolationError(f"shape () gave shape {out.shape}")
    _expect_same(out.reshape(1), subject.flat(w), w, "in one dimension")


@_promise(_inputs.empty)
def empty(subject: Subject, w: Weights) -> None:
    """An empty array keeps its shape."""
    found = subject.round_trip(w).shape
    if found != w.shape:
        raise ViolationError(f"shape {w.shape} gave shape {found}")


@_promise(_inputs.ordinary, "block_size", "levels")
def error_bound(subject: Subject, w: Weights) -> None:
    """No error exceeds half the widest gap between levels times the absmax of the block."""
    _expect_near(subject.flat(w), w, subject.allowed_error(w))


# The scale of a block is not visible outside, so the check searches for it. If results are levels times a scale s,
# the largest result is s * l for some level l, so s is one of at most n quotients (and the absmax, which is the usual
# scale). Levels of the other sign count only where scales may be negative. For a candidate s every result must be a level times s, and no farther from its weight than the
# nearest of these, up to rounding.
@_promise(_inputs.ordinary, "block_size", "levels")
def nearest_level(subject: Subject, w: Weights) -> None:
    """Each block has a scale for which every result is the level nearest to its weight."""
    out = subject.flat(w)
    for number, place in enumerate(subject.blocks(w.size)):
        weights, results = w[place].astype(np.float64), out[place]
        if not any(_all_nearest(subject, weights, results, scale) for scale in _scales(subject, weights, results)):
            raise ViolationError(f"block {number} has no such scale: it gave {_short(results)}")


def _scales(subject: Subject, weights: Wide, results: Wide) -> list[float]:
    """Return candidates of the scale: the absmax, and each scale that makes the largest result a level.

    A quantized scale may also be zero.
    """
    anchor = results[np.argmax(np.abs(results))]
    is_possible = np.sign(subject.normalized) == np.sign(anchor)
    levels = subject.normalized[is_possible | subject.has_signed_scales]
    least = [] if subject.independent_blocks else [0.0]
    return [float(np.abs(weights).max()), *(anchor / levels[levels != 0]).tolist(), *least]


def _all_nearest(subject: Subject, weights: Wide, results: Wide, scale: float) -> bool:
    table = np.sort(subject.normalized * scale)
    # Level times scale is rounded to float32, and so is a scale found as a quotient: each errs by at most 2**-24 of its
    # size. 2**-20 leaves room for sixteen such roundings.
    slack = max(subject.tolerance, 2.0**-20) * max(abs(scale), float(np.abs(weights).max()))
    is_level = _distance(results, table) <= slack
    return bool((is_level & (np.abs(results - weights) <= _distance(weights, table) + slack)).all())


def _distance(values: Wide, table: Wide) -> Wide:
    """Return the distance of each value from the nearest entry of a sorted table."""
    above = np.clip(np.searchsorted(table, values), 1, table.size - 1)
    return np.asarray(np.minimum(np.abs(values - table[above - 1]), np.abs(values - table[above])))


@_promise(_inputs.repeated, "block_size")
def equal_weights(subject: Subject, w: Weights) -> None:
    """Equal weights of a block give equal results, also midway between two levels."""
    out = subject.flat(w)
    for place in subject.blocks(w.size):
        _, first, member = np.unique(w[place], return_index=True, return_inverse=True)
        _expect_same(out[place], out[place][first[member]], w[place], "elsewhere in its block")


@_promise(_inputs.tied, "block_size", "levels", "ties_to")
def tie_direction(subject: Subject, w: Weights) -> None:
    """A weight midway between two levels goes to the one that ``ties_to`` names."""
    # The result need not be exactly a level, for example with rounded scales: the nearer one of the two counts.
    levels, absmax, out = subject.normalized, subject.absmax(w), subject.flat(w)
    below = np.clip(np.searchsorted(levels, w / absmax) - 1, 0, levels.size - 2)
    lower, upper = levels[below] * absmax, levels[below + 1] * absmax
    nearer_to_lower = np.abs(out - lower) < np.abs(out - upper)
    wrong = np.flatnonzero((w != absmax) & (nearer_to_lower == (subject.ties_to == "upper")))
    if wrong.size:
        i = int(wrong[0])
        raise ViolationError(
            f"weight {w[i]} at index {i}, midway between {lower[i]:.7g} and {upper[i]:.7g}, gave {out[i]}"
        )


@_promise(_inputs.ordinary, "independent_blocks")
def idempotence(subject: Subject, w: Weights) -> None:
    """Quantizing a result again does not change it."""
    # With the absmax as scale the largest weight is a level, so the second scale equals the first.
    once = subject.round_trip(w).astype(np.float32)
    _expect_near(subject.flat(once), once, subject.tolerance * subject.absmax(once))


@_promise(_inputs.with_non_finite)
def non_finite_refused(subject: Subject, w: Weights, index: int, value: float) -> None:
    """NaN and infinity raise an exception."""
    try:
        subject.round_trip(_with(w, index, value))
    except RefusedError:
        return
    raise ViolationError(f"{value} at index {index % w.size} was accepted")


@_promise(_inputs.with_non_finite, "block_size")
def non_finite_contained(subject: Subject, w: Weights, index: int, value: float) -> None:
    """NaN and infinity raise, or leave other blocks finite and, if blocks are independent, unchanged."""
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


# 2**-149 to the largest subnormal number, and 2**127 to the largest float32. No quantizer need be accurate there: a scale
# may underflow to zero, which decodes each weight to zero, with the weight itself as error. NaN, infinity or a
# larger error shows that a scale or its inverse overflowed.
@_promise(_inputs.between(1.401298464324817e-45, 1.1754942106924411e-38))
def subnormal(subject: Subject, w: Weights) -> None:
    """Subnormal weights give finite results, with errors of at most the largest of them."""
    _expect_near(subject.flat(w), w, np.full(w.shape, np.abs(w).max(), dtype=np.float64))


@_promise(_inputs.between(1.7014118346046923e38, 3.4028234663852886e38))
def huge(subject: Subject, w: Weights) -> None:
    """The largest float32 weights give finite results, with errors of at most the largest of them."""
    _expect_near(subject.flat(w), w, np.full(w.shape, np.abs(w).max(), dtype=np.float64))


@_promise(_inputs.in_dtype(np.float16, 2.0**-8, 2.0**14))
def float16(subject: Subject, w: npt.NDArray[np.float16]) -> None:
    """Weights in float16 are accepted and meet the error bound, up to rounding to float16."""
    _expect_accepted(subject, w)


@_promise(_inputs.in_dtype(ml_dtypes.bfloat16, 2.0**-20, 2.0**20))
def bfloat16(subject: Subject, w: npt.NDArray[Any]) -> None:
    """Weights in bfloat16 are accepted and meet the error bound, up to rounding to bfloat16."""
    _expect_accepted(subject, w)


@_promise(_inputs.in_dtype(np.float64, 2.0**-20, 2.0**20))
def float64(subject: Subject, w: npt.NDArray[np.float64]) -> None:
    """Weights in float64 are accepted and meet the error bound, up to rounding to float32."""
    _expect_accepted(subject, w)


@_promise(_inputs.integers)
def integers_refused(subject: Subject, w: npt.NDArray[np.int32]) -> None:
    """An array of integers raises an exception."""
    try:
        subject.round_trip(w)
    except RefusedError:
        return
    raise ViolationError("int32 was accepted")


def _expect_accepted(subject: Subject, w: npt.NDArray[Any]) -> None:
    try:
        subject.adapted(w)
    except AdapterError:
        raise NotApplicableError(f"adapt() refuses {w.dtype}") from None
    # Weights and scale are rounded to the dtype, a quantizer may compute in it, and float64 may be taken as float32.
    rounding = 4 * max(float(ml_dtypes.finfo(w.dtype).eps), 2.0**-23)  # type: ignore[no-untyped-call]
    _expect_near(subject.flat(w), w, subject.allowed_error(w, rounding))


def _expect_finite(out: Wide, w: npt.NDArray[Any], where: str = "") -> None:
    wrong = np.flatnonzero(~np.isfinite(out))
    if wrong.size:
        raise ViolationError(f"weight {w[wrong[0]]} gave {out[wrong[0]]} {where}".rstrip())


def _expect_same(actual: Wide, expected: Wide, w: npt.NDArray[Any], otherwise: str = "") -> None:
    """Raise unless two results are equal; zeros of both signs are equal, and so is any NaN to any other."""
    wrong = np.flatnonzero(~((actual == expected) | (np.isnan(actual) & np.isnan(expected))))
    if wrong.size:
        i = int(wrong[0])
        weight = w.reshape(-1)[i]
        compared = f", but {expected[i]} {otherwise}" if otherwise else f" instead of {expected[i]}"
        raise ViolationError(f"weight {weight} at index {i} gave {actual[i]}{compared}")


def _expect_near(out: Wide, w: npt.NDArray[Any], allowed: Wide) -> None:
    wide = w.astype(np.float64).reshape(-1)
    error = np.nan_to_num(np.abs(out - wide), nan=np.inf)
    if (error > allowed).any():
        i = int(np.argmax(np.where(error > allowed, error, -1.0)))
        gave = f"weight {wide[i]:.7g} at index {i} gave {out[i]:.7g}"
        raise ViolationError(f"{gave}: the error {error[i]:.3g} exceeds the allowed {allowed[i]:.3g}")


def _short(values: Wide) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:8])
    return f"[{shown}{', …' if values.size > 8 else ''}]"
