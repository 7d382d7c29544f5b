"""Limiting cases of a decomposition: rank zero, full rank, matrices of zeros, empty matrices."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import BlockFormat, decompose, dequantize, quantize
from tests.decomposition.cases import COLUMNS, FMT, ROWS, matrix
from tests.strategies import host, on, stored
from tests.weighting.cases import KINDS, case


@pytest.mark.parametrize("init", ["svd", "quantize", "zero"])
def test_rank_zero_is_quantization(xp, init):
    d = decompose(on(xp, matrix()), FMT, 0, init=init)
    assert stored(d.quantized) == stored(quantize(on(xp, matrix()), FMT))
    assert (d.stop_reason, len(d.errors), d.rank) == ("rank_zero", 1, 0)
    assert (tuple(d.lora_A.shape), tuple(d.lora_B.shape)) == ((0, COLUMNS), (ROWS, 0))
    np.testing.assert_array_equal(host(d.reconstruct()), host(dequantize(d.quantized)))


def test_init_zero_leaves_the_product_at_zero(xp):
    d = decompose(on(xp, matrix()), FMT, 4, init="zero")
    assert not host(d.lora_B).any()
    assert (np.abs(host(d.lora_A)) <= COLUMNS**-0.5).all()
    assert host(d.lora_A).any()
    np.testing.assert_array_equal(host(d.reconstruct()), host(dequantize(quantize(on(xp, matrix()), FMT))))


@pytest.mark.parametrize("init", ["svd", "quantize", "zero"])
def test_a_matrix_of_zeros_is_exact(xp, init):
    d = decompose(on(xp, np.zeros((ROWS, COLUMNS), dtype=np.float32)), FMT, 4, init=init)
    assert d.relative_error == d.squared_error == 0.0
    assert not host(d.reconstruct()).any()
    assert np.isfinite(host(d.lora_A)).all()


def test_a_matrix_of_low_rank_is_almost_exact(xp):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((ROWS, 4)) @ rng.standard_normal((4, COLUMNS))).astype(np.float32)
    assert decompose(on(xp, w), FMT, 4).relative_error < 1e-5


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_are_decomposed_into_nothing(xp, shape):
    d = decompose(on(xp, np.zeros(shape, dtype=np.float32)), FMT, 0)
    assert tuple(d.reconstruct().shape) == shape
    assert d.relative_error == 0.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 100)])
def test_full_rank_of_small_matrices(xp, shape):
    w = matrix(rows=shape[0], columns=shape[1])
    d = decompose(on(xp, w), FMT, min(shape), max_iter=3)
    assert d.relative_error < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_vectors_are_decomposed_in_every_norm(kind, shape):
    w = matrix(0, *shape)
    for rank in (0, 1):
        d = decompose(w, FMT, rank, weighting=case(kind, 0, *shape, np.float32).on(np), max_iter=2)
        assert np.isfinite(d.reconstruct()).all()
        assert d.relative_error < (1e-5 if rank else 0.5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_may_be_padded_and_packed(xp, shape):
    d = decompose(
        on(xp, np.zeros(shape, dtype=np.float32)),
        FMT,
        3,
        clip_rank=True,
        factor_format=BlockFormat.parse("nf4/16:float32"),
    )
    assert (tuple(d.lora_A.shape), tuple(d.lora_B.shape)) == ((3, shape[1]), (shape[0], 3))
    assert tuple(d.reconstruct().shape) == shape
