"""Quantizer step of a decomposition: nearest rounding, fits, error feedback, and callables."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import BlockFormat, decompose, dequantize, gptq, quantize
from lqlora.errors import InvalidArgumentError, MixedArraysError
from tests.decomposition.cases import FMT, SMALL, contents, matrix, residual_of, small_case
from tests.strategies import host, on, stored

pytestmark = pytest.mark.slow_on_strict


def test_a_callable_receives_its_result_for_the_iterate_continued_from(xp):
    calls = []

    def step(target, previous):
        assert previous is None or any(previous is q for _, q in calls)
        calls.append((host(target), quantize(target, FMT)))
        return calls[-1][1]

    w = matrix(0, *SMALL, np.float64)
    d = decompose(on(xp, w), FMT, 6, quantizer=step, max_iter=4)
    assert len(calls) == len(d.errors) - 1  # entry 1 reuses the first quantization
    np.testing.assert_array_equal(calls[0][0], w)
    assert contents(d) == contents(decompose(on(xp, w), FMT, 6, max_iter=4))


def test_a_callable_may_use_another_format():
    fmt = BlockFormat.parse("nf4/8:float32")
    d = decompose(matrix(), FMT, 4, quantizer=lambda target, _: quantize(target, fmt), max_iter=3)
    assert d.quantized.format == fmt
    assert contents(d) == contents(decompose(matrix(), fmt, 4, max_iter=3))


def test_a_worse_quantizer_never_replaces_a_better_result():
    # Only the first call quantizes well, that of the two safeguards.
    calls = []

    def decaying(target, previous):
        calls.append(target)
        return quantize(target if len(calls) == 1 else 0 * target, FMT)

    d = decompose(matrix(0, *SMALL), FMT, 2, quantizer=decaying, max_iter=6)
    one = decompose(matrix(0, *SMALL), FMT, 2, init="quantize", max_iter=1)
    assert d.best == 1
    assert d.relative_error == pytest.approx(one.relative_error, rel=1e-6)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
@pytest.mark.parametrize("text", ["nf2/16:float32", "nf3/16:u8/8:float32", "bof4s-64/8@-1:float32"])
def test_every_fit_and_format_lowers_the_error(xp, fit, text):
    w = matrix(0, *SMALL)
    d = decompose(on(xp, w), BlockFormat.parse(text), 4, fit=fit, max_iter=4)
    assert d.relative_error < d.errors[0]
    assert np.linalg.norm(residual_of(w, d)) ** 2 == pytest.approx(d.squared_error, rel=1e-4)
    assert d.quantized.format.levels == ("matrix" if fit == "levels+scale" else "codebook")


@pytest.mark.parametrize("kind", ["uniform", "elementwise", "gram"])
def test_better_fits_end_lower(kind):
    errors = [
        np.mean(
            [
                decompose(
                    matrix(seed, *SMALL), BlockFormat.parse("nf2/16:float32"), 2, weighting=small_case(kind).on(np),
                    fit=fit, max_iter=6,
                ).relative_error
                for seed in range(3)
            ]
        )
        for fit in ("absmax", "scale", "levels+scale")
    ]  # fmt: skip
    assert errors[0] > errors[1]
    assert errors[0] > errors[2]


@pytest.mark.parametrize("kind", ["gram", "kronecker"])
def test_error_feedback_ends_lower_in_the_norm_of_its_gram(xp, kind):
    own, w = small_case(kind), matrix(0, *SMALL)
    near, fed = (
        decompose(on(xp, w), FMT, 2, weighting=own.on(xp), quantizer=quantizer, max_iter=3)
        for quantizer in ("nearest", "gptq")
    )
    assert fed.relative_error < near.relative_error
    assert own.norm(residual_of(w, fed)) == pytest.approx(fed.squared_error, rel=1e-3)


@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
def test_the_first_entry_of_error_feedback_is_that_of_gptq(fit):
    own, w = small_case("gram"), matrix(0, *SMALL, np.float64)
    d = decompose(w, FMT, 0, weighting=own.on(np), quantizer="gptq", fit=fit)
    expected = gptq(w, FMT, own.weights[0], fit=fit)
    assert stored(d.quantized) == stored(expected)
    assert d.squared_error == pytest.approx(own.norm(w - dequantize(expected)), rel=1e-9)


def test_error_feedback_needs_a_gram():
    for kind in ("uniform", "row-column", "elementwise"):
        with pytest.raises(InvalidArgumentError, match=r"^quantizer='gptq' .*InputGram"):
            decompose(matrix(0, *SMALL), FMT, 2, weighting=small_case(kind).on(np), quantizer="gptq")


@pytest.mark.parametrize(
    "bad", [lambda w, _: w, lambda *_: None, lambda w, _: (w, w)], ids=["an array", "nothing", "two arrays"]
)
def test_other_results_of_a_quantizer_are_refused(bad):
    with pytest.raises(InvalidArgumentError, match=r"^quantizer .*\(24, 16\), got"):
        decompose(matrix(0, *SMALL), FMT, 2, quantizer=bad)


def test_a_quantized_array_of_another_shape_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"^quantizer .*\(24, 16\), got"):
        decompose(matrix(0, *SMALL), FMT, 2, quantizer=lambda w, _: quantize(w[:-1], FMT))


def test_a_quantized_array_of_another_library_is_refused(torch):
    with pytest.raises(MixedArraysError):
        decompose(torch.ones(SMALL), FMT, 2, quantizer=lambda w, _: quantize(w.numpy(), FMT))
