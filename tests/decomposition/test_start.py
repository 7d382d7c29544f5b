"""Decomposition from a given low-rank part (``start=``)."""

from __future__ import annotations

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.decomposition.cases import FMT, SMALL, contents, matrix, small_case
from tests.strategies import host

RANK = 3


@pytest.mark.parametrize("kind", ["uniform", "row-column", "elementwise", "gram"])
def test_a_precomputed_low_rank_step_gives_the_same_bytes(kind):
    norm = small_case(kind).on(np)
    w = matrix(0, *SMALL, dtype=np.float64)
    start = norm.low_rank(w, RANK, seed=5)
    options = {"weighting": norm, "seed": 5, "max_iter": 4}
    assert contents(lq.decompose(w, FMT, RANK, start=start, **options)) == contents(
        lq.decompose(w, FMT, RANK, **options)
    )


def test_factors_of_a_similar_format_save_iterations_and_keep_the_promises(xp):
    w = matrix(1, 96, 80)
    array = xp.asarray(w)
    similar = lq.decompose(array, lq.BlockFormat.parse("nf3/16:u8/16:float32"), RANK)
    alone = lq.decompose(array, FMT, RANK, max_iter=1)
    found = lq.decompose(array, FMT, RANK, max_iter=1, start=(similar.lora_B, similar.lora_A))
    assert found.squared_error < alone.squared_error
    assert found.relative_error <= min(found.errors)
    rest = w - host(lq.dequantize(found.quantized)) - host(found.lora_B) @ host(found.lora_A)
    np.testing.assert_allclose((rest.astype(np.float64) ** 2).sum(), found.squared_error, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_a_start_may_have_another_rank(rank):
    w = matrix(2)
    start = (np.zeros((w.shape[0], rank), dtype=np.float32), np.zeros((rank, w.shape[1]), dtype=np.float64))
    zero = lq.decompose(w, FMT, RANK, max_iter=3, start=start)
    assert contents(zero)[2:] == contents(lq.decompose(w, FMT, RANK, max_iter=3, init_rank=0))[2:]


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ((np.zeros((40, 2)),), {}),
        (np.zeros((40, 2)), {}),
        ((np.zeros((40, 2)), np.zeros((3, 32))), {}),
        ((np.zeros((32, 2)), np.zeros((2, 40))), {}),
        ((np.zeros(40), np.zeros(32)), {}),
        ((np.zeros((40, 2)), np.zeros((2, 32))), {"init": "quantize"}),
        ((np.zeros((40, 2)), np.zeros((2, 32))), {"init": "zero"}),
    ],
)
def test_invalid_starts_are_refused(start, options):
    with pytest.raises(InvalidArgumentError, match="start"):
        lq.decompose(matrix(), FMT, RANK, start=start, **options)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="lora_A"):
        lq.decompose(matrix(), FMT, RANK, start=(np.zeros((40, 2)), np.full((2, 32), np.nan)))
