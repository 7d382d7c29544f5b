"""Properties of backends. Each property is a function whose docstring is the promise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import forced
from lqlora.errors import MixedArraysError, UnsupportedArrayError
from lqlora.quantized import dequantize as dequantized
from lqlora.quantized import quantize as quantized
from lqlora.testing._promises import Property, promises
from lqlora.testing._verdicts import RefusedError, ViolationError, named
from lqlora.testing.backends import _inputs as inputs
from lqlora.testing.backends._subject import BackendSubject, expect_bytes, operations, right
from lqlora.testing.quantizers._subject import on_host
from lqlora.testing.strategies import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.testing.backends._cases import Blocks, Product
    from lqlora.testing.backends._subject import Call

__all__ = ["REGISTRY"]

REGISTRY: dict[str, Property[BackendSubject]] = {}
_promise = promises(REGISTRY)

_THREADS = 4
_ROUNDS = 2


@_promise(inputs.ordinary)
def ordinary(subject: BackendSubject, case: Blocks) -> None:
    """Whole blocks of ordinary weights match the reference, byte for byte."""
    subject.expect_reference(case)


@_promise(inputs.all_dtypes)
def dtypes(subject: BackendSubject, case: Blocks) -> None:
    """Weights and results of every floating-point dtype that the library has match the reference."""
    subject.expect_reference(case)


@_promise(inputs.all_bits)
def bits(subject: BackendSubject, case: Blocks) -> None:
    """Codes of one to eight bits match the reference."""
    subject.expect_reference(case)


@_promise(inputs.block_sizes)
def block_sizes(subject: BackendSubject, case: Blocks) -> None:
    """Blocks of any size match the reference, from one weight to more weights than the array has."""
    subject.expect_reference(case)


@_promise(inputs.tails)
def tails(subject: BackendSubject, case: Blocks) -> None:
    """Arrays that end within a block or a byte match the reference."""
    subject.expect_reference(case)


@_promise(inputs.empty)
def empty(subject: BackendSubject, case: Blocks) -> None:
    """Arrays without entries match the reference."""
    subject.expect_reference(case)


@_promise(inputs.large)
def large(subject: BackendSubject, case: Blocks) -> None:
    """Arrays so large that they are cut into pieces match the reference."""
    subject.expect_reference(case)


@_promise(inputs.zero_points)
def zero_points(subject: BackendSubject, case: Blocks) -> None:
    """Blocks with zero points match the reference."""
    subject.expect_reference(case)


@_promise(inputs.any_levels)
def levels(subject: BackendSubject, case: Blocks) -> None:
    """Codebooks of any levels, and of fewer than ``2**bits``, match the reference."""
    subject.expect_reference(case)


@_promise(inputs.boundaries)
def boundaries(subject: BackendSubject, case: Blocks) -> None:
    """Weights on a boundary between two levels, or next to one, match the reference."""
    subject.expect_reference(case)


@_promise(inputs.special)
def special_values(subject: BackendSubject, case: Blocks) -> None:
    """Both zeros, subnormals and the largest numbers match the reference, as weights and as scales."""
    subject.expect_reference(case)


@_promise(inputs.unused_bits)
def unused_bits(subject: BackendSubject, case: Blocks) -> None:
    """Bits of the last byte that belong to no code change no result."""
    subject.expect_reference(case)


@_promise(inputs.midpoints)
def rounding(subject: BackendSubject, case: Blocks) -> None:
    """Results of 16 bits are rounded to float32 first, then to the nearest number, ties to even."""
    subject.expect_reference(case)


@_promise(inputs.non_finite)
def non_finite(subject: BackendSubject, case: Blocks) -> None:
    """NaN and infinity show in the statistics of their block, and in no other."""
    for name in subject.asked("block_absmax", "block_extremes"):
        subject.expect_right(name, case.arguments(name))


@_promise(inputs.combinations)
def combinations(subject: BackendSubject, case: Blocks) -> None:
    """Dtypes, bits, block sizes, tails, levels and hard values together match the reference."""
    subject.expect_reference(case)


@_promise(inputs.integers)
def exact_products(subject: BackendSubject, case: Product) -> None:
    """Products of small integers are exact, but for the sign of zero."""
    for name in subject.of(case):
        arguments = case.arguments(name)
        (expected,) = right(name, arguments)
        for call in subject.calls_of(name, arguments):
            found = on_host(call.run()[0])
            expect_bytes(call.name, _without_negative_zeros(found), _without_negative_zeros(expected))


def _without_negative_zeros(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.where(array == 0, np.zeros_like(array), array)


@_promise(inputs.products)
def products(subject: BackendSubject, case: Product) -> None:
    """Products are exact up to rounding in float32, and once to the dtype of the result."""
    (name,) = subject.asked("matmul_packed")
    truth, size = case.truth()
    step = float(np.finfo(np.float32).eps if case.dtype in ("float32", "float64") else 2.0**-7)
    # A sum of n rounded products has an error of at most about n + 1 times 2**-24 times the sum of their magnitudes
    # (`size`), in any order of additions. The bound is twice as large, plus a term for numbers that are rounded to the
    # dtype of the result.
    bound = (case.columns + 2) * 2.0**-23 * size + step * (size if case.dtype != "float64" else 0) + 1e-30
    for call in subject.calls_of(name, case.arguments(name)):
        error = np.abs(on_host(call.run()[0]).astype(np.float64) - truth)
        if (error > bound).any() or np.isnan(error).any():
            worst = np.unravel_index(int(np.argmax(error - bound)), error.shape)
            raise ViolationError(f"{call.name} has an error of {error[worst]:.3g} in an entry of {truth[worst]:.3g}")


@_promise(inputs.layouts)
def layout(subject: BackendSubject, case: Blocks, layout: str) -> None:
    """Arrays that are strided, unaligned or read-only give the bytes of contiguous ones."""
    for name in subject.of(case):
        if layout != "read-only" or "out" not in operations()[name].arguments.flat:
            subject.expect_right(name, case.arguments(name), lambda array: _laid_out(array, layout))


def _laid_out(array: Array, layout: str) -> Array:
    if layout == "unaligned":
        return _unaligned(array)
    if layout == "read-only":
        array.flags.writeable = False
        return array
    return lay_out(array, layout)


def _unaligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    memory = np.empty(array.nbytes + 1, dtype=np.uint8)
    moved = memory[1:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


@_promise(inputs.combinations)
def input_unchanged(subject: BackendSubject, case: Blocks) -> None:
    """No argument but ``out`` is changed."""
    for call in subject.calls(case):
        read = call.arrays()
        before = {name: on_host(call.arguments[i]).tobytes() for name, i in read.items()}
        call.run()
        changed = [name for name, i in read.items() if on_host(call.arguments[i]).tobytes() != before[name]]
        if changed:
            raise ViolationError(f"{call.name} changed {' and '.join(changed)}")


@_promise(inputs.all_bits)
def own_memory(subject: BackendSubject, case: Blocks) -> None:
    """A result has memory of its own: writing to it changes neither an argument nor a later result."""
    for name in subject.of(case):
        arguments = case.arguments(name)
        for first, second in zip(subject.calls_of(name, arguments), subject.calls_of(name, arguments), strict=True):
            before = {key: on_host(first.arguments[i]).tobytes() for key, i in first.arrays().items()}
            for result in first.run():
                _overwrite(first, result)
            shared = [key for key, i in first.arrays().items() if on_host(first.arguments[i]).tobytes() != before[key]]
            if shared:
                raise ViolationError(f"{first.name} returned memory of {' and '.join(shared)}")
            subject.expect(second, second.run(), right(name, arguments))


def _overwrite(call: Call, result: Array) -> None:
    try:
        result[...] = 1
    except (TypeError, ValueError, RuntimeError) as error:
        raise ViolationError(f"{call.name} returned an array that cannot be written: {named(error)}") from error


@_promise(inputs.combinations)
def deterministic(subject: BackendSubject, case: Blocks) -> None:
    """The same call returns the same bytes the second time."""
    for first, second in zip(subject.calls(case), subject.calls(case), strict=True):
        for before, after in zip(first.run(), second.run(), strict=True):
            expect_bytes(f"{first.name}, called again,", on_host(after), on_host(before))


@_promise(inputs.ordinary)
def threads(subject: BackendSubject, case: Blocks) -> None:
    """Calls in several threads at once do not disturb each other."""
    cases = [type(case)(case.seed + i, bits=4 + i, count=case.count + 64 * i) for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(subject.expect_reference, one) for one in cases * _ROUNDS]:
            done.result()


class _Foreign:
    """An array of a library that is not registered."""

    dtype, shape, ndim, size, device = np.dtype(np.float32), (1,), 1, 1, "cpu"

    def __array_namespace__(self, **_: object) -> object:
        return np


@_promise(inputs.ordinary)
def mixed_libraries(subject: BackendSubject, case: Blocks) -> None:
    """Arrays of two libraries in one call are refused."""
    for name in subject.asked("encode", "encode_packed", "decode", "bin_sums"):
        call = next(iter(subject.calls_of(name, case.arguments(name))))
        for argument, i in call.arrays(written=True).items():
            if i:
                foreign = _Foreign() if subject.library == "numpy" else np.array(on_host(call.arguments[i]))
                _expect_mixed_refused(name, argument, (*call.arguments[:i], foreign, *call.arguments[i + 1 :]))


def _expect_mixed_refused(name: str, argument: str, mixed: tuple[Any, ...]) -> None:
    operation = operations()[name]
    try:
        operation(*operation.arguments.unflatten(mixed))
    except (MixedArraysError, UnsupportedArrayError):
        return
    except Exception as error:
        raise RefusedError(f"{name} with {argument} of another library raised {named(error)}") from error
    chosen = operation.select(*operation.arguments.unflatten(mixed)).implementation
    raise ViolationError(f"{chosen} accepted {argument} of another library")


@_promise(inputs.tails)
def too_short(subject: BackendSubject, case: Blocks) -> None:
    """Arrays that are too short are refused where the reference refuses them."""
    for name in subject.of(case):
        arguments = case.arguments(name)
        call = next(iter(subject.calls_of(name, arguments)))
        for argument, i in call.arrays(written=True).items():
            short = (*arguments[:i], arguments[i][:-1], *arguments[i + 1 :])
            if _is_refused_by_reference(name, short):
                _expect_refused(subject, name, argument, short)


def _is_refused_by_reference(name: str, arguments: tuple[Any, ...]) -> bool:
    try:
        right(name, arguments)
    except (ValueError, IndexError):
        return True
    return False


def _expect_refused(subject: BackendSubject, name: str, argument: str, arguments: tuple[Any, ...]) -> None:
    for call in subject.calls_of(name, arguments):
        try:
            call.run()
        except RefusedError:
            continue
        raise ViolationError(f"{call.name} accepted {argument}, which is one entry too short")


@_promise(inputs.formatted)
def quantize(subject: BackendSubject, fmt: BlockFormat, w: npt.NDArray[Any]) -> None:
    """The arrays that quantize() stores have the bytes of the reference, in any format."""
    with forced("reference"):
        expected = quantized(w, fmt).to_arrays()
    found = _run("quantize", lambda: quantized(subject.put(w), fmt).to_arrays())
    for name, array in expected.items():
        expect_bytes(f"quantize() to {name!r}", on_host(found[name]), on_host(array))


@_promise(inputs.formatted)
def dequantize(subject: BackendSubject, fmt: BlockFormat, w: npt.NDArray[Any]) -> None:
    """The result of dequantize() has the bytes of the reference, in any format and dtype."""
    with forced("reference"):
        stored = quantized(w, fmt)
    moved = stored.to(subject.xp, subject.device)
    for dtype in [name for name in ("float32", "float16", "bfloat16") if name in subject.dtypes]:
        with forced("reference"), np.errstate(all="ignore"):
            expected = dequantized(stored, dtype=dtype)
        found = _run("dequantize", partial(dequantized, moved, dtype=dtype))
        expect_bytes(f"dequantize() to {dtype}", on_host(found), expected)


def _run(verb: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise RefusedError(f"{verb}() raised {named(error)}") from error
