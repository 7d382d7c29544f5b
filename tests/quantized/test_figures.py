"""Errors on normal weights against published values and values that can be derived."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from lqlora import NF4, BlockFormat, dequantize, normal_float, quantize
from lqlora.codebooks import by_name

MILLION = 1 << 20


@functools.cache
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1024, MILLION // 1024)).astype(np.float32)


def mean_square(fmt: BlockFormat, **options: str) -> float:
    difference = dequantize(quantize(weights(), fmt, **options)).astype(np.float64) - weights()
    return float((difference**2).mean())


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.3165), (3, 0.0406), (4, 0.00846)])
def test_normal_floats_have_the_known_error_on_normal_weights(bits, expected):
    assert mean_square(BlockFormat(normal_float(bits), 64)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.113), (3, 0.0295), (4, 0.0070)])
def test_fitted_levels_and_scales_reach_the_error_they_promise(bits, limit):
    assert mean_square(BlockFormat(normal_float(bits), 64), fit="levels+scale") <= limit


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.17), (3, 0.035), (4, 0.0082)])
def test_fitted_scales_alone_lie_in_between(bits, limit):
    assert mean_square(BlockFormat(normal_float(bits), 64), fit="scale") <= limit


def test_nf4_has_the_mean_absolute_error_of_bitsandbytes():
    # bitsandbytes' own tests expect 0.072798 ± 0.000074 per matrix for blocks of 64.
    error = np.abs(dequantize(quantize(weights(), BlockFormat(NF4, 64))) - weights()).mean()
    assert error == pytest.approx(0.072798, abs=7 * 0.000074)


@pytest.mark.parametrize(
    ("better", "worse"), [("bof4-64", "nf4"), ("bof4s-64", "bof4-64"), ("nf4", "int4"), ("af4", "int4")]
)
def test_codebooks_rank_as_their_papers_have_it(better, worse):
    assert mean_square(BlockFormat(by_name(better), 64)) < mean_square(BlockFormat(by_name(worse), 64))


@pytest.mark.parametrize("scales", ["u8/256:float32", "u8/256:float16", "d8/256:float32", "l8/256:float32"])
def test_double_quantization_costs_less_than_a_hundredth(scales):
    plain = mean_square(BlockFormat(NF4, 64))
    assert mean_square(BlockFormat.parse(f"nf4/64:{scales}")) < 1.01 * plain
