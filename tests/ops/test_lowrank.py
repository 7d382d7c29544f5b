from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError
from lqlora.ops import exact_svd, low_rank_product, subspace_svd
from tests.strategies import host, on


def decaying(rows, columns, seed=0, power=1.0):
    """Singular values 1, 1/2, 1/3, … to a power, in random directions."""
    rng = np.random.default_rng(seed)
    small = min(rows, columns)
    left, _ = np.linalg.qr(rng.standard_normal((rows, small)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, small)))
    return (left * np.arange(1, small + 1) ** -power) @ right.T


def product(svd):
    return host(svd.left) @ host(svd.right)


def error(matrix, svd):
    return np.linalg.norm(matrix - product(svd))


def optimum(matrix, rank):
    """Eckart and Young: the norm of the singular values left out."""
    return np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:])


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_the_exact_decomposition_reaches_the_bound_of_eckart_and_young(xp, rows, columns, data):
    rank = data.draw(st.integers(0, min(rows, columns)))
    matrix = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((rows, columns))
    svd = exact_svd(on(xp, matrix), rank)
    assert error(matrix, svd) == pytest.approx(optimum(matrix, rank), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("decompose", [exact_svd, subspace_svd])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_left_is_orthonormal_right_orthogonal_and_values_are_sorted(xp, decompose, shape):
    svd = decompose(on(xp, decaying(*shape)), 6)
    np.testing.assert_allclose(host(svd.left).T @ host(svd.left), np.eye(6), atol=1e-10)
    np.testing.assert_allclose(host(svd.right) @ host(svd.right).T, np.diag(host(svd.values) ** 2), atol=1e-10)
    assert (np.diff(host(svd.values)) <= 0).all()
    assert (host(svd.values) >= 0).all()


@pytest.mark.parametrize("shape", [(80, 50), (50, 80)])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_subspace_iteration_is_close_to_exact(xp, shape, power):
    matrix = decaying(*shape, power=power)
    assert error(matrix, subspace_svd(on(xp, matrix), 8)) <= 1.01 * optimum(matrix, 8)


def test_more_power_iterations_come_closer():
    matrix = decaying(200, 150, power=0.25)
    errors = [error(matrix, subspace_svd(matrix, 8, power_iterations=count)) for count in (0, 1, 4)]
    assert errors[0] > errors[1] > errors[2] >= optimum(matrix, 8)


def test_a_warm_start_needs_one_pass(xp):
    matrix = decaying(80, 60, power=0.5)
    nearby = matrix + 1e-3 * decaying(80, 60, seed=1)
    basis = subspace_svd(on(xp, matrix), 8).basis
    assert basis.shape[0] == 60
    warm = error(nearby, subspace_svd(on(xp, nearby), 8, start=basis))
    cold = error(nearby, subspace_svd(on(xp, nearby), 8, power_iterations=0))
    assert warm < cold
    assert warm <= 1.02 * optimum(nearby, 8)


def test_from_a_start_there_are_no_power_iterations_unless_asked_for():
    # Left vectors are combinations of matrix @ start: any further pass over the matrix would turn them.
    matrix, start = decaying(80, 60, power=0.25), np.random.default_rng(1).standard_normal((60, 18))
    reached, _ = np.linalg.qr(matrix @ start)
    svd = subspace_svd(matrix, 8, start=start)
    np.testing.assert_allclose(reached @ (reached.T @ svd.left), svd.left, atol=1e-12)
    more = subspace_svd(matrix, 8, start=start, power_iterations=2)
    assert error(matrix, more) < error(matrix, svd)


def test_the_exact_decomposition_of_a_tall_matrix_makes_no_square_one():
    matrix = decaying(3000, 2)
    tracemalloc.start()
    try:
        exact_svd(matrix, 1)
        exact_svd(matrix.T, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * matrix.nbytes


def test_a_small_matrix_is_decomposed_exactly(xp):
    # The sketch would be as wide as the matrix: nothing is saved by it.
    matrix = decaying(40, 16, power=0.1)
    assert error(matrix, subspace_svd(on(xp, matrix), 6)) == pytest.approx(optimum(matrix, 6), rel=1e-12)


def test_a_matrix_of_low_rank_is_found_exactly(xp):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((70, 5)) @ rng.standard_normal((5, 60))
    svd = subspace_svd(on(xp, matrix), 5)
    assert error(matrix, svd) <= 1e-12 * np.linalg.norm(matrix)


def test_a_matrix_of_zeros_gives_finite_factors(xp):
    svd = subspace_svd(on(xp, np.zeros((60, 50), dtype=np.float32)), 4)
    assert host(svd.values).tolist() == [0.0] * 4
    assert np.isfinite(host(svd.left)).all()
    assert np.isfinite(host(svd.right)).all()


def test_the_seed_decides(xp):
    matrix = on(xp, decaying(60, 50, power=0.2))
    first, again, other = (host(subspace_svd(matrix, 4, seed=seed).left) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept(xp, dtype):
    svd = subspace_svd(on(xp, decaying(40, 30).astype(dtype)), 4)
    assert {host(part).dtype for part in svd} == {np.dtype(dtype)}


def test_libraries_agree(xp):
    matrix = decaying(80, 50)
    np.testing.assert_allclose(product(subspace_svd(on(xp, matrix), 8)), product(subspace_svd(matrix, 8)), atol=1e-8)


@pytest.mark.parametrize("decompose", [exact_svd, subspace_svd])
def test_rank_zero_is_nothing(xp, decompose):
    svd = decompose(on(xp, decaying(30, 20)), 0)
    assert [tuple(part.shape) for part in svd] == [(30, 0), (0, 20), (0,), (20, 0)]
    assert host(low_rank_product(svd.left, svd.right)).tolist() == np.zeros((30, 20)).tolist()


@pytest.mark.parametrize("decompose", [exact_svd, subspace_svd])
@pytest.mark.parametrize("rank", [-1, 21])
def test_rank_out_of_range_is_refused(xp, decompose, rank):
    with pytest.raises(InvalidArgumentError, match=rf"^rank.* 20.*got {rank}"):
        decompose(on(xp, decaying(30, 20)), rank)
