"""Products of few rows with a weight and its factors in one compiled call: their sums, and what the call does not take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.backends.cpu import compiled, loading
from tests.requirements import require_module, require_or_skip

torch = require_module("torch")
from lqlora.backends.cpu.linear import planned_linear  # noqa: E402 - needs torch

TAKEN = (
    "nf4/64:float32", "nf4/64:u8/256:float32", "nf3/64:d8/256:float32", "nf2/32:u8/64:float32", "int8/64:float32",
    "nf4+fit/64:float32", "nf3+fit/16:u8/7:float32", "nf4/24:float32",
)  # fmt: skip
LEFT = (
    "affine4/64:float32",
    "nf4/64:u8/256:bfloat16",
    "nf4/64:float16",
    "nf4/64:u8/256:u8/16:float32",
    "nf4/16@0:float32",
)
EPS = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def _compiled():
    require_or_skip("native", loading.status()[0])


def weight(text, rows=48, columns=64, rank=5, seed=0):
    """A quantized matrix, its stored tensors, and factors."""
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(*shape, generator=generator) for shape in ((rows, columns), (rank, columns), (rows, rank)))
    fmt = lq.BlockFormat.parse(text)
    q = lq.quantize(w, fmt, fit="levels+scale" if "+fit" in text else "absmax")
    return q, list(q.to_arrays().values()), a, b


def rows_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@given(
    text=st.sampled_from(TAKEN),
    rows=st.integers(1, 70),
    groups=st.sampled_from([1, 3, 4, 8, 12, 33, 260]),
    rank=st.integers(0, 20),
    lead=st.sampled_from([(), (1,), (2, 1), (3, 2), (8,)]),
    dtype=st.sampled_from(list(EPS)),
    factor_dtype=st.sampled_from(list(EPS)),
    scaling=st.sampled_from([1.0, 0.25, -3.0]),
)
def test_sums_are_those_of_the_dense_weight(text, rows, groups, rank, lead, dtype, factor_dtype, scaling):
    q, stored, a, b = weight(text, rows, 8 * groups, rank)
    a, b, x = a.to(factor_dtype), b.to(factor_dtype), rows_of(*lead, 8 * groups, dtype=dtype)
    found = planned_linear(q.format, q.shape)(x, stored, a, b, scaling)
    assert (found.dtype, found.shape) == (dtype, (*lead, rows))
    dense = lq.dequantize(q).double()
    size = x.double().abs() @ (dense.abs() + abs(scaling) * b.double().abs() @ a.double().abs()).T
    exact = x.double() @ (dense + scaling * b.double() @ a.double()).T
    assert bool(((found.double() - exact).abs() <= EPS[dtype] * exact.abs() + 2.0**-20 * size).all())


@pytest.mark.parametrize("text", TAKEN)
def test_bytes_are_the_same_on_every_instruction_set_and_in_any_company(text):
    q, stored, a, b = weight(text, 33, 192, 19)
    x, linear = rows_of(compiled.FEW_ROWS, 192), planned_linear(q.format, q.shape)
    found = {}
    for name in loading.instruction_sets():
        with loading.using(name):
            found[name] = linear(x, stored, a, b, 0.5)
            assert torch.equal(linear(x[1:2], stored, a, b, 0.5), found[name][1:2])
    assert all(torch.equal(own, found["baseline"]) for own in found.values())


def test_without_factors_it_is_the_product_to_the_bit():
    q, stored, a, b = weight("nf4/64:u8/256:float32", rank=0)
    x = rows_of(3, 64)
    assert torch.equal(planned_linear(q.format, q.shape)(x, stored, a, b, 1.0), lq.matmul(x, q))


def test_two_threads_add_in_the_same_order(monkeypatch):
    q, stored, a, b = weight("nf4/64:u8/256:float32", 1100, 512)
    x, linear = rows_of(2, 512), planned_linear(q.format, q.shape)
    alone = linear(x, stored, a, b, 1.0)
    lq.backends.set_num_threads(2)
    try:
        assert torch.equal(linear(x, stored, a, b, 1.0), alone)
    finally:
        lq.backends.set_num_threads(None)


@pytest.mark.parametrize("text", LEFT)
def test_other_formats_are_left_to_the_operations(text):
    fmt = lq.BlockFormat.parse(text)
    assert planned_linear(fmt, (48, 64)) is None


@pytest.mark.parametrize("shape", [(4, 12), (0, 64), (4, 0)])
def test_other_shapes_are_left_to_the_operations(shape):
    assert planned_linear(lq.BlockFormat.parse("nf4/4:float32"), shape) is None


def freed(tensor):
    """Take the memory of a tensor away, as ``fully_shard`` does."""
    tensor.untyped_storage().resize_(tensor.nbytes // 2)
    return tensor


def other_rows():
    x = rows_of(2, 64)
    return {
        "strided": rows_of(64, 2).T,
        "sparse": x.to_sparse(),
        "without memory": freed(x.clone()),
        "negated": torch._neg_view(x),
        "double": x.double(),
        "many": rows_of(compiled.FEW_ROWS + 1, 64),
        "none": x[:0],
        "meta": x.to("meta"),
    }


@pytest.mark.parametrize("kind", list(other_rows()))
def test_other_rows_are_left_to_the_operations(kind):
    q, stored, a, b = weight("nf4/64:float32")
    assert planned_linear(q.format, q.shape)(other_rows()[kind], stored, a, b, 1.0) is None


@pytest.mark.parametrize("position", range(4), ids=["codes", "scales", "lora_A", "lora_B"])
def test_weights_and_factors_that_are_strided_or_negated_are_left_to_the_operations(position):
    q, stored, a, b = weight("nf4/64:float32")
    given = [*stored, a, b]
    given[position] = given[position].repeat_interleave(2, -1)[..., ::2]
    linear, x = planned_linear(q.format, q.shape), rows_of(2, 64)
    assert linear(x, given[:2], *given[2:], 1.0) is None
    if position:
        given[position] = torch._neg_view(given[position].contiguous())
        assert linear(x, given[:2], *given[2:], 1.0) is None


@pytest.mark.parametrize("position", range(4), ids=["codes", "scales", "lora_A", "lora_B"])
def test_weights_and_factors_without_memory_are_left_to_the_operations(position):
    q, stored, a, b = weight("nf4/64:float32")
    given = [*stored, a, b]
    given[position] = freed(given[position].clone())
    assert planned_linear(q.format, q.shape)(rows_of(2, 64), given[:2], *given[2:], 1.0) is None


def test_factors_of_two_dtypes_are_left_to_the_operations():
    q, stored, a, b = weight("nf4/64:float32")
    assert planned_linear(q.format, q.shape)(rows_of(2, 64), stored, a, b.half(), 1.0) is None
    assert planned_linear(q.format, q.shape)(rows_of(2, 64), stored, a.double(), b.double(), 1.0) is None


@pytest.mark.parametrize(
    "choice", [{"implementation": "reference"}, {"implementation": "numpy"}, {"without": "native"}]
)
def test_forced_passes_it_over(choice):
    q, stored, a, b = weight("nf4/64:float32")
    linear, x = planned_linear(q.format, q.shape), rows_of(2, 64)
    with lq.forced(**choice):
        assert linear(x, stored, a, b, 1.0) is None
    assert linear(x, stored, a, b, 1.0) is not None


def test_a_layer_of_few_rows_takes_it():
    q, stored, a, b = weight("nf4/64:u8/256:float32")
    layer, x = lq.nn.LQLinear(q, a, b, 0.5), rows_of(2, 3, 64)
    expected = planned_linear(q.format, q.shape)(x, stored, a, b, 0.5)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_the_low_rank_part_is_scaled_last():
    q, stored, a, b = weight("nf4/64:float32", rank=1)
    linear, x = planned_linear(q.format, q.shape), torch.ones(1, 64)
    assert linear(x, stored, 0 * a + 1e20, 0 * b + 1e-30, 1e18).isfinite().all()


def test_numbers_that_overflow_and_nan_stay_in_their_rows():
    q, stored, a, b = weight("nf4/64:float32")
    x = rows_of(3, 64)
    x[1, 5] = np.nan
    found = planned_linear(q.format, q.shape)(x, stored, a, b, 1.0)
    assert found[1].isnan().all()
    assert found[::2].isfinite().all()
    wide = planned_linear(q.format, q.shape)(torch.full((1, 64), 6e4, dtype=torch.float16), stored, a, 100 * b, 1.0)
    assert wide.isinf().any()
