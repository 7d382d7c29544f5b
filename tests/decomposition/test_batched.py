from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lqlora import BlockFormat, decompose, decompose_stack
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting import InputGram
from tests.strategies import host, on, stored

pytestmark = pytest.mark.slow_on_strict

FMT = BlockFormat.parse("nf3/16:u8/8:float32")


def experts(shape=(2, 3), rows=24, columns=32, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, rows, columns)).astype(np.float32)


@pytest.mark.parametrize("fit", ["absmax", "levels+scale"])
def test_a_stack_is_decomposed_as_its_matrices_are(xp, fit):
    w = experts((1, 2))
    found = decompose_stack(on(xp, w), FMT, 4, fit=fit, max_iter=3, scaling=2.0)
    for index, part in enumerate(found.parts):
        place = np.unravel_index(index, (1, 2))
        alone = decompose(on(xp, w[place]), FMT, 4, fit=fit, max_iter=3, scaling=2.0)
        assert stored(part.quantized) == stored(alone.quantized) == stored(found.quantized[place[0]][place[1]])
        np.testing.assert_array_equal(host(found.lora_A)[place], host(alone.lora_A))
        np.testing.assert_array_equal(host(found.lora_B)[place], host(alone.lora_B))
        np.testing.assert_allclose(host(found.reconstruct())[place], host(alone.reconstruct()), atol=1e-6)
    assert found.storage_bits == sum(part.storage_bits for part in found.parts)
    assert found.storage_bits == 8 * found.quantized.nbytes + 32 * 2 * 4 * (24 + 32)


def test_a_stack_has_one_weighting_or_one_for_each_matrix():
    w = experts((3,))
    grams = [InputGram(x.T @ x) for x in experts((3,), 64, seed=1)]
    found = decompose_stack(w, FMT, 4, weighting=grams, max_iter=2)
    alone = [decompose(w[i], FMT, 4, weighting=grams[i], max_iter=2).relative_error for i in range(3)]
    assert [part.relative_error for part in found.parts] == alone
    shared = decompose_stack(w, FMT, 4, weighting=grams[0], max_iter=2)
    assert shared.parts[0].relative_error == alone[0]
    with pytest.raises(InvalidArgumentError, match=r"^weighting .*3 matrices.*got 2"):
        decompose_stack(w, FMT, 4, weighting=grams[:2])


def test_a_stack_is_the_same_with_any_number_of_threads():
    w = experts((5,))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(3) as three:
        found = [decompose_stack(w, FMT, 4, max_iter=3, executor=pool) for pool in (one, three)]
    assert stored(found[0].quantized) == stored(found[1].quantized)
    assert found[0].lora_B.tobytes() == found[1].lora_B.tobytes()


@pytest.mark.parametrize("shape", [(4,), (0, 4, 4)])
def test_a_stack_without_matrices_is_refused(shape):
    with pytest.raises(InvalidArgumentError, match=r"^w .*got shape"):
        decompose_stack(np.ones(shape, dtype=np.float32), FMT, 1)


def test_the_matrix_that_is_not_finite_is_named():
    w = experts((3,))
    w[1, 2, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"^w\[1\]"):
        decompose_stack(w, FMT, 2)
