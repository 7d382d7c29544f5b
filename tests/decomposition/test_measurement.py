"""``relative_error``: the same number as by hand in every norm, for arrays, quantized arrays and decompositions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import decompose, dequantize, quantize, relative_error
from lqlora.errors import InvalidArgumentError, NonFiniteError, UnsupportedArrayError
from lqlora.weighting import InputGram
from tests.decomposition.cases import FMT, SMALL, few, matrix, small_case
from tests.strategies import host, on
from tests.weighting.cases import KINDS

pytestmark = pytest.mark.slow_on_strict


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 99))
@few
def test_the_error_is_the_ratio_of_norms(xp, kind, seed):
    own = small_case(kind, seed)
    w = matrix(seed, *SMALL)
    q = quantize(on(xp, w), FMT)
    found = relative_error(on(xp, w), q, own.on(xp))
    dense = host(dequantize(q)).astype(np.float64)
    expected = math.sqrt(own.norm(w.astype(np.float64) - dense) / own.norm(w))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == relative_error(on(xp, w), dequantize(q), own.on(xp))


@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_the_error_of_a_decomposition_in_its_own_norm_is_the_one_it_has(xp, scaling):
    own = small_case("gram")
    w = on(xp, matrix(0, *SMALL))
    d = decompose(w, FMT, 3, weighting=own.on(xp), max_iter=4, scaling=scaling)
    assert relative_error(w, d, own.on(xp)) == pytest.approx(d.relative_error, rel=1e-4)


@pytest.mark.parametrize("exponent", [-130, -60, 0, 60, 120])
def test_the_error_has_no_unit(exponent):
    rng = np.random.default_rng(0)
    w = rng.uniform(0.5, 1, (8, 16)).astype(np.float32)
    other = (w * rng.uniform(0.9, 1.1, w.shape)).astype(np.float32)
    scale = np.float32(2.0) ** np.float32(exponent)
    expected = np.linalg.norm(w - other) / np.linalg.norm(w)
    assert relative_error(w * scale, other * scale) == pytest.approx(expected, rel=1e-4)


def test_a_matrix_of_zeros():
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(zeros, ones) == math.inf
    assert relative_error(ones, zeros) == 1.0
    assert relative_error(zeros[:0], zeros[:0]) == 0.0


def test_an_approximation_far_away():
    tiny, huge = np.full((2, 2), 1e-40, np.float32), np.full((2, 2), 3e38, np.float32)
    assert relative_error(tiny, huge) == pytest.approx(3e78, rel=1e-3)
    with pytest.raises(NonFiniteError, match="squared norm must be at most"):
        relative_error(tiny, huge.astype(np.float64) * 1e200)


@pytest.mark.parametrize(
    ("approximation", "options", "error", "sentence"),
    [
        (np.zeros((3, 2), np.float32), {}, InvalidArgumentError, r"shape of w, \(2, 3\), got \(3, 2\)"),
        (np.full((2, 3), np.nan, np.float32), {}, NonFiniteError, "approximation of layer"),
        (np.zeros((2, 3), np.int64), {}, UnsupportedArrayError, "approximation of w"),
        ([[0.0]], {}, UnsupportedArrayError, "approximation of w"),
        (np.zeros((2, 3)), {"weighting": np.eye(3)}, InvalidArgumentError, "weighting must be a norm"),
        (np.zeros((2, 3)), {"weighting": InputGram(np.eye(2))}, InvalidArgumentError, "gram must"),
    ],
)
def test_what_is_refused(approximation, options, error, sentence):
    name = {"name": "layer"} if "layer" in sentence else {}
    with pytest.raises(error, match=sentence):
        relative_error(np.ones((2, 3), np.float32), approximation, **options, **name)
