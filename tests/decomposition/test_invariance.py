"""Invariance of a decomposition to the run, threads, library, memory layout, order of rows, and scale of the matrix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lqlora import BlockFormat, decompose, quantize
from lqlora._parallel import map_matrices
from tests.decomposition.cases import COLUMNS, FMT, ROWS, SMALL, contents, matrix, small_case
from tests.strategies import FLUSHES, flushes, host, on, stored
from tests.weighting.cases import KINDS, case

pytestmark = pytest.mark.slow_on_strict


@pytest.mark.parametrize("init", ["svd", "quantize", "zero"])
def test_the_same_seed_gives_the_same_bytes(xp, init):
    first, again = (decompose(on(xp, matrix()), FMT, 4, init=init, max_iter=4, seed=7) for _ in range(2))
    assert stored(first.quantized) == stored(again.quantized)
    assert host(first.lora_A).tobytes() == host(again.lora_A).tobytes()
    assert host(first.lora_B).tobytes() == host(again.lora_B).tobytes()
    assert first.errors == again.errors


def test_another_seed_gives_another_sketch():
    noise = [decompose(matrix(), FMT, 4, init="zero", seed=seed).lora_A.tobytes() for seed in (1, 2)]
    assert noise[0] != noise[1]


def test_libraries_agree(xp):
    mine, numpys = (decompose(w, FMT, 4, max_iter=5, rtol=0.0) for w in (on(xp, matrix()), matrix()))
    assert stored(quantize(on(xp, matrix()), FMT)) == stored(quantize(matrix(), FMT))
    # Another BLAS rounds differently: a few codes change, and the iterates differ slightly.
    assert len(mine.errors) == len(numpys.errors)
    np.testing.assert_allclose(mine.errors, numpys.errors, rtol=0.02)


@pytest.mark.parametrize("size", [1e-36, 1e-10, 1e10, 1e30, 1e38])
def test_the_magnitude_of_the_weights_does_not_matter(xp, size):
    if flushes(xp) and size < 1e-30:
        pytest.skip(FLUSHES)
    power = 2.0 ** np.round(np.log2(size))
    d = decompose(on(xp, (matrix() * power).astype(np.float32)), FMT, 4, max_iter=3)
    assert d.relative_error == pytest.approx(decompose(matrix(), FMT, 4, max_iter=3).relative_error, rel=0.02)
    assert np.isfinite(host(d.lora_A)).all()
    assert np.isfinite(host(d.lora_B)).all()


@pytest.mark.parametrize("kind", ["uniform", "elementwise", "kronecker"])
def test_threads_give_the_same_bytes(kind):
    weighting = case(kind, 0, ROWS, COLUMNS, np.float32).on(np)

    def work(seed):
        return contents(decompose(matrix(seed), FMT, 4, weighting=weighting, max_iter=4, seed=seed))

    found = []
    for workers in (1, 2):
        with ThreadPoolExecutor(workers) as pool:
            found.append(map_matrices(work, range(4), pool))
    assert found[0] == found[1]
    assert len({arrays[1] for arrays in found[0]}) == 4


@pytest.mark.parametrize("fit", ["absmax", "scale"])
def test_a_transposed_view_gives_the_same_bytes_as_a_copy(xp, fit):
    w = matrix(0, *SMALL, np.float64)
    view = xp.matrix_transpose(on(xp, np.ascontiguousarray(w.T)))
    one, two = (decompose(array, FMT, 6, fit=fit, max_iter=3) for array in (view, on(xp, w)))
    assert stored(one.quantized)["codes"] == stored(two.quantized)["codes"]
    assert one.errors == pytest.approx(two.errors, rel=1e-6)
    np.testing.assert_allclose(host(one.reconstruct()), host(two.reconstruct()), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_rows_of_whole_blocks_permutes_the_result(kind):
    fmt = BlockFormat.parse("nf3/8@-1:float32")
    order = np.random.default_rng(0).permutation(SMALL[0])
    own, w = small_case(kind), matrix(0, *SMALL, np.float64)
    plain = decompose(w, fmt, 6, weighting=own.on(np), max_iter=3)
    moved = decompose(w[order], fmt, 6, weighting=own.permuted(order, np.arange(SMALL[1])).on(np), max_iter=3)
    assert moved.quantized.codes.tolist() == plain.quantized.codes[order].tolist()
    assert moved.errors == pytest.approx(plain.errors, rel=1e-6)
    np.testing.assert_allclose(moved.reconstruct(), plain.reconstruct()[order], atol=1e-5)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
@pytest.mark.parametrize("exponent", [-60, 1, 47])
def test_a_power_of_two_scales_everything(fast_xp, fit, exponent):
    w, factor = matrix(0, *SMALL, np.float64), 2.0**exponent
    plain, scaled = (decompose(on(fast_xp, array), FMT, 6, fit=fit, max_iter=2) for array in (w, w * factor))
    assert stored(scaled.quantized)["codes"] == stored(plain.quantized)["codes"]
    np.testing.assert_array_equal(host(scaled.quantized.scales), host(plain.quantized.scales) * np.float32(factor))
    assert scaled.errors == pytest.approx(plain.errors, rel=1e-6)
    np.testing.assert_allclose(host(scaled.reconstruct()) / factor, host(plain.reconstruct()), atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
@pytest.mark.parametrize("exponent", [-40, 40])
def test_the_unit_of_any_importance_does_not_matter(kind, exponent):
    own, w = small_case(kind), matrix(0, *SMALL, np.float64)
    plain, scaled = (
        decompose(w, FMT, 6, weighting=weights.on(np), fit="scale", max_iter=3)
        for weights in (own, own.scaled(2.0**exponent))
    )
    assert stored(scaled.quantized)["codes"] == stored(plain.quantized)["codes"]
    assert scaled.errors == pytest.approx(plain.errors, rel=1e-6)
