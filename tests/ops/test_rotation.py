"""Randomized Hadamard rotations, against dense matrices."""

from __future__ import annotations

import functools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError
from lqlora.ops import rotate, rotate_rows, rotated_importance, rotated_moment
from tests.strategies import host, on

LENGTHS = (1, 2, 3, 6, 8, 9, 17, 30, 64, 105, 257, 576, 1028)


def hartley(p):
    """The matrix of a prime factor, entry by entry."""
    own = np.empty((p, p))
    for j in range(p):
        for k in range(p):
            own[j, k] = (math.cos(2 * math.pi * j * k / p) + math.sin(2 * math.pi * j * k / p)) / math.sqrt(p)
    return own


@functools.cache
def mixing(count):
    """The matrix H: the Kronecker product over the prime factors, the largest one first."""
    factors, rest = [], count
    for p in range(2, count + 1):
        while rest % p == 0:
            factors.append(p)
            rest //= p
    own = [hartley(p) if p <= 256 else np.eye(p) for p in factors[::-1]]
    return functools.reduce(np.kron, own, np.ones((1, 1)))


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("count", LENGTHS)
def test_a_rotation_is_the_product_with_signs_and_mixing(xp, count):
    x = normal(4, count)
    signs = np.array([sign(position, 5, count) for position in range(count)])
    found = host(rotate(on(xp, x), 5))
    np.testing.assert_allclose(found, (x * signs) @ mixing(count).T, atol=3e-6)
    assert found.dtype == np.float32


def sign(position, seed, count):
    """SplitMix64 of the position, in Python integers."""
    state = (seed * count + 1 + position) * 0x9E3779B97F4A7C15 % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift)) * factor % 2**64
    return -1.0 if (state ^ (state >> 31)) >> 63 else 1.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("count", LENGTHS)
def test_every_library_returns_the_bytes_of_numpy(xp, count, dtype):
    if dtype == np.float16 and "strict" in xp.__name__:
        pytest.skip("the library has no such dtype")
    x = normal(3, count, 2, dtype=dtype)
    for options in ({"axis": 1}, {"axis": -2, "inverse": True}):
        expected = rotate(x, 1, **options)
        found = host(rotate(on(xp, x), 1, **options))
        assert found.shape == x.shape
        assert found.dtype == expected.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert found.tobytes() == expected.tobytes()


@given(count=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), axis=st.sampled_from([0, 1, 2, -1, -2, -3]))
def test_the_inverse_undoes_it_along_every_axis(count, seed, axis):
    shape = [2, 3, 2]
    shape[axis] = count
    x = normal(*shape, seed=count, dtype=np.float64)
    turned = rotate(x, seed, axis=axis)
    np.testing.assert_allclose(rotate(turned, seed, axis=axis, inverse=True), x, atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=axis), np.linalg.norm(x, axis=axis), rtol=1e-12)


@pytest.mark.parametrize("count", LENGTHS)
def test_a_line_has_the_same_bits_alone(count):
    x = normal(5, count)
    whole = rotate(x, 3)
    assert all(rotate(row, 3).tobytes() == own.tobytes() for row, own in zip(x, whole, strict=True))
    assert rotate(np.asfortranarray(x), 3).tobytes() == whole.tobytes()
    assert rotate(x.T, 3, axis=0).T.tobytes() == whole.tobytes()
    own = x.copy()
    assert rotate(own, 3, out=own) is own
    assert own.tobytes() == whole.tobytes()


@pytest.mark.parametrize("count", [64, 576, 1536])
def test_one_large_entry_is_spread_over_all(count):
    spread = np.abs(rotate(np.eye(1, count, 7, dtype=np.float32), 0))
    odd = count // (count & -count)
    assert spread.max() * math.sqrt(count) < math.sqrt(2.0 ** (odd > 1) * 2.0 ** (odd > 3)) + 1e-5
    assert spread.min() > 0


def test_seeds_give_different_signs():
    x = normal(1, 256)
    turned = [rotate(x, seed)[0] for seed in (0, 1, 2**32, 2**63 - 1)]
    cosines = np.corrcoef(turned) - np.eye(4)
    assert np.abs(cosines).max() < 0.3


def test_empty_arrays_stay_empty(xp):
    for shape in ((0, 6), (4, 0), (0,)):
        x = on(xp, np.zeros(shape, dtype=np.float32))
        assert rotate(x, 0).shape == rotate_rows(x, 0).shape == rotated_importance(x).shape == shape


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_rows_are_rotated_alike(xp, count, lead):
    x = normal(*lead, count)
    for inverse in (False, True):
        expected = rotate(x, 9, inverse=inverse)
        np.testing.assert_allclose(host(rotate_rows(on(xp, x), 9, inverse=inverse)), expected, atol=1e-5)


def test_rows_keep_their_dtype_and_their_graph(torch):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2, 12, dtype=dtype, requires_grad=True)
        y = rotate_rows(x, 0)
        assert y.dtype == dtype
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("count", LENGTHS)
def test_importance_is_the_diagonal_of_the_rotated_quadratic_form(xp, count):
    weights = np.random.default_rng(0).random((3, count))
    expected = weights @ (mixing(count) ** 2).T
    np.testing.assert_allclose(host(rotated_importance(on(xp, weights))), expected, rtol=1e-12)
    np.testing.assert_allclose(host(rotated_importance(on(xp, weights.T), axis=0)), expected.T, rtol=1e-12)


def test_a_second_moment_is_that_of_rotated_vectors(xp):
    x = normal(40, 24, dtype=np.float64)
    found = host(rotated_moment(on(xp, x.T @ x), 4))
    np.testing.assert_allclose(found, rotate(x, 4).T @ rotate(x, 4), atol=1e-12)
    np.testing.assert_array_equal(found, found.T)


def test_sums_beyond_the_range_are_infinite():
    assert np.isinf(rotate(np.full(8, 3e38, dtype=np.float32), 0)).any()


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "a"])
def test_other_seeds_are_refused(seed):
    for run in (
        lambda: rotate(np.ones(4), seed),
        lambda: rotate_rows(np.ones(4), seed),
        lambda: rotated_moment(np.eye(4), seed),
    ):
        with pytest.raises(InvalidArgumentError, match="seed must be"):
            run()


def test_arrays_without_the_axis_are_refused(xp):
    x = on(xp, np.ones((2, 3), dtype=np.float32))
    for run in (
        lambda: rotate(x, 0, axis=2),
        lambda: rotate(on(xp, np.float32(1)), 0),
        lambda: rotate_rows(on(xp, np.float32(1)), 0),
        lambda: rotated_importance(x, axis=-3),
    ):
        with pytest.raises(InvalidArgumentError, match=r"axis must|dimensions"):
            run()
    with pytest.raises(InvalidArgumentError, match="gram must be square"):
        rotated_moment(x, 0)


def test_large_arrays_are_rotated_piece_by_piece(xp):
    for shape, axis in (((1500, 1000), -1), ((1500, 1000), 0), ((3, 700, 600), 1), ((2**21,), 0)):
        x = normal(*shape)
        whole = host(rotate(on(xp, x), 5, axis=axis))
        first = tuple(slice(None) if own == axis % len(shape) else slice(0, 1) for own in range(len(shape)))
        last = tuple(slice(None) if own == axis % len(shape) else slice(-1, None) for own in range(len(shape)))
        for part in (first, last):
            assert host(rotate(on(xp, np.ascontiguousarray(x[part])), 5, axis=axis)).tobytes() == whole[part].tobytes()


def test_the_workspace_is_small():
    x = normal(2048, 4096)
    rotate(x[:8], 0)
    tracemalloc.start()
    rotate(x, 0, out=x)
    rotate(x, 0, axis=0, out=x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6


def test_seeds_and_axes_may_be_integers_of_numpy():
    x = normal(3, 8)
    assert rotate(x, np.int64(3), axis=np.int8(1)).tobytes() == rotate(x, 3).tobytes()
    assert rotate_rows(x, np.uint32(3)).tobytes() == rotate_rows(x, 3).tobytes()


@pytest.mark.parametrize("out", [np.empty((3, 4), dtype=np.float32), np.empty((2, 4), dtype=np.float64)])
def test_another_result_is_refused(out):
    with pytest.raises(InvalidArgumentError, match="out must have shape"):
        rotate(normal(2, 4), 0, out=out)


def test_autocast_and_inference_mode_leave_rotations_alone(torch):
    x = torch.from_numpy(normal(4, 22))
    expected = rotate(x, 11)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rotate_rows(x, 11), expected, atol=1e-5, rtol=0)
    with torch.inference_mode():
        rotate_rows(x, 12)
        rotate(x, 12)
    y = x.clone().requires_grad_()
    rotate_rows(y, 12).square().sum().backward()
    torch.testing.assert_close(y.grad, 2 * x, atol=1e-4, rtol=0)
