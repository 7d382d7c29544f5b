"""Result of a decomposition: the best iterate, its error, its factors as an adapter holds them, its exact size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import BlockFormat, decompose, dequantize, quantize
from lqlora.weighting import Elementwise
from tests.decomposition.cases import COLUMNS, FMT, ROWS, SMALL, contents, few, fisher, matrix, residual_of, small_case
from tests.strategies import host, on
from tests.weighting.cases import KINDS, case

pytestmark = pytest.mark.slow_on_strict


@given(seed=st.integers(0, 99), rank=st.integers(1, 8), init=st.sampled_from(["svd", "quantize"]))
@few
def test_the_best_iterate_is_returned(xp, seed, rank, init):
    d = decompose(on(xp, matrix(seed)), FMT, rank, init=init, max_iter=8)
    assert d.relative_error == d.errors[d.best] <= (1 + 1e-5) * min(d.errors)  # only the best error is measured
    assert (d.rank, tuple(d.lora_A.shape), tuple(d.lora_B.shape)) == (rank, (rank, COLUMNS), (ROWS, rank))


@given(seed=st.integers(0, 99), rank=st.integers(0, 8), scaling=st.sampled_from([1.0, 2.0, 0.3]))
@few
def test_the_recorded_error_is_that_of_the_reconstruction(xp, seed, rank, scaling):
    w = matrix(seed)
    d = decompose(on(xp, w), FMT, rank, max_iter=5, scaling=scaling)
    residual = w - host(d.reconstruct()).astype(np.float64)
    assert d.relative_error == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(w.astype(float)), rel=1e-5)
    assert d.squared_error == pytest.approx(np.linalg.norm(residual) ** 2, rel=1e-5)


def test_factors_have_the_same_norm_component_by_component(xp):
    d = decompose(on(xp, matrix()), FMT, 4, weighting=Elementwise(on(xp, fisher())), max_iter=3)
    np.testing.assert_allclose(
        np.linalg.norm(host(d.lora_A), axis=1), np.linalg.norm(host(d.lora_B), axis=0), rtol=1e-4
    )


@pytest.mark.parametrize("scaling", [0.25, 2.0, 16.0])
def test_the_scaling_does_not_change_what_is_approximated(xp, scaling):
    w = on(xp, matrix())
    plain, scaled = decompose(w, FMT, 4, max_iter=4), decompose(w, FMT, 4, max_iter=4, scaling=scaling)
    assert scaled.scaling == scaling
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-2)
    by_hand = host(dequantize(scaled.quantized)) + scaling * host(scaled.lora_B) @ host(scaled.lora_A)
    np.testing.assert_allclose(host(scaled.reconstruct()), by_hand, atol=1e-6)
    assert np.linalg.norm(by_hand - host(w)) / np.linalg.norm(host(w)) == pytest.approx(scaled.relative_error, rel=1e-4)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_dtypes_are_accepted(dtype):
    d = decompose(matrix().astype(dtype), FMT, 4, max_iter=3)
    assert d.lora_A.dtype == d.lora_B.dtype == np.float32
    assert d.relative_error == pytest.approx(decompose(matrix(), FMT, 4, max_iter=3).relative_error, rel=0.02)


def test_double_quantization_works(xp):
    d = decompose(on(xp, matrix()), BlockFormat.parse("nf3/16:u8/8:float32"), 4, max_iter=3)
    assert d.relative_error < d.errors[0]


def test_the_matrix_is_not_changed(xp):
    w = on(xp, matrix())
    decompose(w, FMT, 4, max_iter=2)
    assert host(w).tobytes() == matrix().tobytes()


def test_torch_parameters_are_decomposed_without_a_graph(torch):
    d = decompose(torch.nn.Parameter(torch.from_numpy(matrix())), FMT, 4, max_iter=2)
    assert not d.lora_A.requires_grad
    assert not d.lora_B.requires_grad


@pytest.mark.sampled(14)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"factor_format": BlockFormat.parse("nf8/16:float32")}], ids=["plain", "nf8"])
def test_the_recorded_error_is_that_of_the_returned_pair_in_every_norm(xp, kind, options):
    own, w = case(kind, 0, ROWS, COLUMNS, np.float32), matrix()
    d = decompose(on(xp, w), FMT, 4, weighting=own.on(xp), max_iter=4, scaling=0.5, **options)
    left = own.norm(residual_of(w, d))
    assert d.squared_error == pytest.approx(left, rel=1e-3)
    assert d.relative_error == d.errors[d.best] == pytest.approx((left / own.norm(w)) ** 0.5, rel=1e-3)
    np.testing.assert_allclose(host(d.reconstruct()), w - residual_of(w, d), atol=1e-6)


@given(alpha=st.floats(0.1, 512), rank=st.integers(1, 16), root=st.booleans())
@few
def test_the_factors_are_those_of_an_adapter_of_any_alpha(alpha, rank, root):
    # PEFT multiplies by alpha / r, and with rsLoRA by alpha / sqrt(r).
    scaling = alpha / (rank**0.5 if root else rank)
    w = matrix(0, *SMALL)
    d = decompose(w, FMT, rank, max_iter=3, scaling=scaling)
    assert d.scaling == scaling
    assert np.linalg.norm(residual_of(w, d)) / np.linalg.norm(w) == pytest.approx(d.relative_error, rel=1e-4, abs=1e-6)
    plain = decompose(w, FMT, rank, max_iter=3)
    assert d.relative_error == pytest.approx(plain.relative_error, rel=1e-6, abs=1e-7)  # full rank leaves rounding
    np.testing.assert_allclose(scaling**0.5 * d.lora_A, plain.lora_A, atol=1e-5)
    np.testing.assert_allclose(scaling**0.5 * d.lora_B, plain.lora_B, atol=1e-5)


# --- storage


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), rank=st.integers(0, 25))
@few
def test_storage_is_counted_exactly(xp, rows, columns, rank):
    fmt, factor_format = BlockFormat.parse("nf3/16:u8/4:float32"), BlockFormat.parse("nf8/32:float32")
    w = on(xp, matrix(0, rows, columns))
    plain = decompose(w, fmt, rank, clip_rank=True, max_iter=1)
    assert plain.storage_bits == fmt.storage_bits((rows, columns)) + 32 * rank * (rows + columns)
    packed = decompose(w, fmt, rank, clip_rank=True, max_iter=1, factor_format=factor_format)
    expected = sum(factor_format.storage_bits(shape) for shape in ((rank, columns), (rows, rank)))
    assert packed.storage_bits == fmt.storage_bits((rows, columns)) + expected


def test_quantized_factors_decode_to_the_factors(xp):
    d = decompose(on(xp, matrix()), FMT, 4, max_iter=3, factor_format=BlockFormat.parse("nf4/16:float32"))
    assert [factor.shape for factor in d.factors] == [(4, COLUMNS), (ROWS, 4)]
    assert {str(factor.format) for factor in d.factors} == {"nf4/16:float32"}
    for factor, dense in zip(d.factors, (d.lora_A, d.lora_B), strict=True):
        assert host(dequantize(factor)).tobytes() == host(dense).tobytes()
    assert decompose(on(xp, matrix()), FMT, 4, max_iter=1).factors is None


@pytest.mark.parametrize("kind", ["uniform", "gram", "elementwise"])
def test_the_matrix_makes_up_for_errors_of_quantized_factors(kind):
    own, w, coarse = small_case(kind), matrix(0, *SMALL, np.float64), BlockFormat.parse("nf3/16:float32")
    options = {"weighting": own.on(np), "max_iter": 3}
    plain = decompose(w, FMT, 6, **options)
    packed = decompose(w, FMT, 6, factor_format=coarse, **options)
    left, right = (dequantize(quantize(factor, coarse)).astype(np.float64) for factor in (plain.lora_B, plain.lora_A))
    by_hand = own.norm(w - dequantize(plain.quantized) - left @ right)
    assert packed.squared_error <= by_hand * (1 + 1e-6)
    assert packed.squared_error > plain.squared_error


@pytest.mark.parametrize("init", ["svd", "quantize", "zero"])
def test_factors_may_be_quantized_whatever_the_start(xp, init):
    d = decompose(on(xp, matrix()), FMT, 4, init=init, max_iter=2, factor_format=BlockFormat.parse("nf8/16:float32"))
    assert np.linalg.norm(residual_of(matrix(), d)) / np.linalg.norm(matrix()) == pytest.approx(
        d.relative_error, rel=1e-4
    )
    assert host(d.lora_B).any() == (init != "zero")


# --- ranks above that of the matrix


@pytest.mark.parametrize("init", ["svd", "quantize"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_ranks_beyond_the_matrix_are_padded_with_zeros(xp, init, shape):
    w = matrix(0, *shape)
    d = decompose(on(xp, w), FMT, 8, init=init, clip_rank=True, max_iter=2, scaling=2.0)
    full = decompose(on(xp, w), FMT, 5, init=init, max_iter=2, scaling=2.0)
    assert (d.rank, tuple(d.lora_A.shape), tuple(d.lora_B.shape)) == (8, (8, shape[1]), (shape[0], 8))
    assert host(d.lora_A)[:5].tobytes() == host(full.lora_A).tobytes()
    assert host(d.lora_B)[:, :5].tobytes() == host(full.lora_B).tobytes()
    assert not host(d.lora_A)[5:].any()
    assert not host(d.lora_B)[:, 5:].any()
    assert d.errors == full.errors


def test_a_rank_within_the_matrix_is_not_padded(xp):
    plain, clipped = (decompose(on(xp, matrix()), FMT, 4, max_iter=2, clip_rank=clip) for clip in (False, True))
    assert contents(plain) == contents(clipped)


def test_fresh_factors_have_the_rank_that_was_asked_for(xp):
    d = decompose(on(xp, matrix(0, 5, 9)), FMT, 8, init="zero", clip_rank=True)
    assert (tuple(d.lora_A.shape), tuple(d.lora_B.shape)) == ((8, 9), (5, 8))
    assert np.abs(host(d.lora_A)).min(axis=1).all()
