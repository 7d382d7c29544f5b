from __future__ import annotations

import numpy as np
import pytest

from lqlora.errors import MixedArraysError
from lqlora.ops import low_rank_product, matmul_dense
from tests.strategies import host, on


@pytest.fixture
def factors(rng):
    shapes = {"x": (2, 3, 8), "weight": (5, 8), "lora_A": (4, 8), "lora_B": (5, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def dense(f, scaling):
    wide = {name: array.astype(np.float64) for name, array in f.items()}
    return wide["weight"] + scaling * wide["lora_B"] @ wide["lora_A"]


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.125])
def test_factors_act_like_the_dense_sum(xp, factors, scaling):
    y = matmul_dense(*(on(xp, factors[name]) for name in ("x", "weight", "lora_A", "lora_B")), scaling)
    np.testing.assert_allclose(host(y), factors["x"] @ dense(factors, scaling).T, rtol=1e-4, atol=1e-4)


def test_the_weight_alone(xp, factors):
    y = matmul_dense(on(xp, factors["x"]), on(xp, factors["weight"]))
    assert tuple(y.shape) == (2, 3, 5)
    np.testing.assert_allclose(host(y), factors["x"] @ factors["weight"].T, rtol=1e-4, atol=1e-5)


def test_one_row_without_a_batch(xp, factors):
    y = matmul_dense(on(xp, factors["x"][0, 0]), on(xp, factors["weight"]))
    assert tuple(y.shape) == (5,)
    np.testing.assert_allclose(host(y), factors["weight"] @ factors["x"][0, 0], rtol=1e-4, atol=1e-5)


def test_low_rank_product(xp, factors):
    product = low_rank_product(on(xp, factors["lora_B"]), on(xp, factors["lora_A"]), 0.5)
    np.testing.assert_allclose(host(product), 0.5 * factors["lora_B"] @ factors["lora_A"], rtol=1e-4, atol=1e-5)


def test_rank_zero_is_a_matrix_of_zeros(xp):
    empty_B, empty_A = on(xp, np.ones((3, 0), dtype=np.float32)), on(xp, np.ones((0, 4), dtype=np.float32))
    assert host(low_rank_product(empty_B, empty_A)).tolist() == np.zeros((3, 4)).tolist()


@pytest.mark.parametrize("position", ["x", "weight", "lora_A", "lora_B"])
def test_two_libraries_do_not_mix(factors, position, torch):
    mixed = factors | {position: torch.from_numpy(factors[position])}
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        matmul_dense(mixed["x"], mixed["weight"], mixed["lora_A"], mixed["lora_B"])


def test_without_a_scaling_the_product_of_the_factors_is_added(xp, factors):
    y = matmul_dense(*(on(xp, factors[name]) for name in ("x", "weight", "lora_A", "lora_B")))
    np.testing.assert_allclose(host(y), factors["x"] @ dense(factors, 1.0).T, rtol=1e-4, atol=1e-4)
    product = low_rank_product(on(xp, factors["lora_B"]), on(xp, factors["lora_A"]))
    np.testing.assert_allclose(host(product), factors["lora_B"] @ factors["lora_A"], rtol=1e-4, atol=1e-5)
