"""Budgets from the memory of a device."""

from __future__ import annotations

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import FormatError, InvalidArgumentError

# Llama 3 8B: 32 layers, 8 heads of keys and values, of 128 numbers each.
LLAMA = {"layers": 32, "kv_heads": 8, "head_size": 128}


def test_a_cache_is_as_large_as_its_arrays():
    keys = np.zeros((2, 3, 5, 4, 7), dtype=np.float16)  # batch, layers, tokens, heads, numbers
    sizes = {"layers": 3, "kv_heads": 4, "head_size": 7, "length": 5, "batch": 2}
    assert lq.cache_bytes(**sizes) == 2 * keys.nbytes
    assert lq.cache_bytes(**sizes, dtype="bfloat16") == 2 * keys.nbytes
    assert lq.cache_bytes(**sizes, dtype="float32") == 4 * keys.nbytes


def test_the_cache_of_a_known_model_is_as_published():
    # 128 KiB a token in 16 bits
    assert lq.cache_bytes(**LLAMA, length=1) == 128 * 1024


def test_a_budget_is_what_is_left():
    cache = lq.cache_bytes(**LLAMA, length=8192)
    budget = lq.memory_budget(8 * 2**30, unquantized_bytes=3, cache_bytes=cache, margin_bytes=5)
    assert budget + 3 + cache + 5 == 8 * 2**30
    assert lq.memory_budget(np.int64(7)) == 7


def test_a_plan_fits_into_it(table):
    budget = lq.memory_budget(2000, unquantized_bytes=500, cache_bytes=400, margin_bytes=100)
    assert lq.allocate(table, total_bytes=budget).nbytes <= 1000


def test_a_device_that_is_too_small_is_told_by_how_much():
    with pytest.raises(InvalidArgumentError, match=r"device_bytes .*1000 .*100"):
        lq.memory_budget(100, cache_bytes=1000)
    with pytest.raises(InvalidArgumentError, match=r"device_bytes .*100 .*100"):
        lq.memory_budget(100, margin_bytes=100)


@pytest.mark.parametrize(
    "options",
    [{"unquantized_bytes": -1}, {"cache_bytes": 1.5}, {"margin_bytes": "1 GiB"}, {"device_bytes": -1}],
    ids=str,
)
def test_what_is_no_number_of_bytes_is_refused(options):
    with pytest.raises(InvalidArgumentError, match=f"^{next(iter(options))} "):
        lq.memory_budget(**{"device_bytes": 100, **options})


@pytest.mark.parametrize("name", [*LLAMA, "length", "batch"])
def test_what_is_no_size_of_a_cache_is_refused(name):
    with pytest.raises(InvalidArgumentError, match=f"^{name} "):
        lq.cache_bytes(**{**LLAMA, "length": 8, "batch": 1, name: -1})


def test_an_unknown_dtype_is_refused():
    with pytest.raises(FormatError, match="int8"):
        lq.cache_bytes(**LLAMA, length=1, dtype="int8")
