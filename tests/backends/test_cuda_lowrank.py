"""The CUDA kernels that add a low-rank part: exact where the reference is, emulated and on a device."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora.backends.cuda import registration as taken
from tests.backends.kernels import KERNELS
from tests.backends.test_cuda import FLOATS, NARROW, apart, draw_schedule, put, same, seeds

TYPES = {"float": "float32", "Float16": "float16", "BFloat16": "bfloat16"}
pairs = st.sampled_from([(own, factor) for own in NARROW for factor in {own, "float32"}])


def integers(rng, shape, dtype):
    """Return integers, most of them zero, so that every dtype represents the sums of products."""
    return (rng.integers(-1, 2, shape) * (rng.random(shape) < 0.15)).astype(FLOATS[dtype])


def case(rng, pair, sizes):
    """Return NumPy arguments: a result so far, rows of inputs, factors and a scaling."""
    (own, factor), (inputs, rank, columns, rows) = pair, sizes
    shapes = ((inputs, rows), own), ((inputs, columns), own), ((rank, columns), factor), ((rows, rank), factor)
    return *(integers(rng, shape, dtype) for shape, dtype in shapes), 0.5


def check(cupy, arguments, start=0):
    arrays, scaling = arguments[:4], arguments[4]
    there = [apart(cupy, array.reshape(-1), start).reshape(array.shape) for array in arrays]
    assert ops.add_low_rank.select(*there, scaling).implementation == "cuda.add_low_rank"
    same(ops.add_low_rank(*there, scaling), ops.add_low_rank.reference(*arguments))
    assert [array.get().tobytes() for array in there] == [array.tobytes() for array in arrays]


@pytest.mark.usefixtures("few_blocks")
@given(
    data=st.data(),
    pair=pairs,
    sizes=st.tuples(st.integers(1, 16), st.integers(1, 40), st.integers(1, 300), st.integers(1, 50)),
    seed=seeds,
    start=st.integers(0, 8),
)
def test_integers_are_multiplied_exactly(emulated, data, pair, sizes, seed, start):
    draw_schedule(data, emulated)
    check(emulated, case(np.random.default_rng(seed), pair, sizes), start)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS["lowrank"])
def test_every_kernel_multiplies_integers_exactly(cupy, kernel):
    own, factor, most = kernel.partition("<")[2].removesuffix(">").split(", ")
    for seed, sizes in enumerate([(int(most), 8, 64, 24), (int(most), 64, 4096, 33), (int(most), 300, 2050, 5)]):
        check(cupy, case(np.random.default_rng(seed), (TYPES[own], TYPES[factor]), sizes))


@pytest.mark.parametrize("pair", [("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_the_sum_is_rounded_once(cupy, pair):
    rng = np.random.default_rng(0)
    y, x, lora_A, lora_B, _ = case(rng, pair, (5, 12, 200, 30))
    y, x, lora_A, lora_B = (rng.standard_normal(array.shape).astype(array.dtype) for array in (y, x, lora_A, lora_B))
    found = ops.add_low_rank(*(put(cupy, array) for array in (y, x, lora_A, lora_B)), 0.3).get()
    wide, rows, inner, outer = (array.astype(np.float64) for array in (y, x, lora_A, lora_B))
    exact = wide + 0.3 * (rows @ inner.T) @ outer.T
    sums = abs(wide) + 0.3 * (abs(rows) @ abs(inner).T) @ abs(outer).T
    bound = 0.5 * float(ml_dtypes.finfo(y.dtype).eps) * abs(exact) + 250 * 2.0**-24 * sums
    assert (abs(found.astype(np.float64) - exact) <= bound).all()


def test_rows_of_any_shape_are_taken(cupy):
    rng = np.random.default_rng(0)
    y, x, lora_A, lora_B, scaling = case(rng, ("float32", "float32"), (6, 3, 40, 7))
    for lead in ((6,), (2, 3), (1, 6, 1)):
        check(cupy, (y.reshape(*lead, 7), x.reshape(*lead, 40), lora_A, lora_B, scaling))
    check(cupy, (y[0], x[0], lora_A, lora_B, scaling))


def test_a_product_with_a_quantized_weight_takes_both_kernels(emulated):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((24, 64)).astype(np.float32), rng.standard_normal((2, 64)).astype(np.float32)
    lora_A, lora_B = rng.standard_normal((4, 64)).astype(np.float32), rng.standard_normal((24, 4)).astype(np.float32)
    q = lq.quantize(w, lq.BlockFormat(lq.NF4, 64))
    there = [put(emulated, array) for array in (x, lora_A, lora_B)]
    emulated.launched.clear()
    found = lq.matmul(there[0], lq.quantize(put(emulated, w), q.format), *there[1:], 0.5)
    assert [name.partition("<")[0] for name, *_ in emulated.launched][-3:] == [
        "matmul_packed", "low_rank_inner", "low_rank_outer",
    ]  # fmt: skip
    np.testing.assert_allclose(found.get(), lq.matmul(x, q, lora_A, lora_B, 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"y": (17, 8), "x": (17, 40)},
        {"y": (0, 8), "x": (0, 40)},
        {"lora_A": (0, 40), "lora_B": (8, 0)},
        {"y": (3, 8), "x": (2, 40)},
        {"y": (3, 1)},
        {"x": (3, 0), "lora_A": (2, 0)},
    ],
    ids=str,
)
def test_other_shapes_are_left_to_the_reference(emulated, changed):
    shapes = {"y": (3, 8), "x": (3, 40), "lora_A": (2, 40), "lora_B": (8, 2)}
    for asked, implementation in ((shapes, "cuda.add_low_rank"), (shapes | changed, "reference")):
        arrays = [emulated.empty(shape, dtype="float32") for shape in asked.values()]
        assert lq.backends.explain("add_low_rank", *arrays, 1.0).implementation == implementation


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float64", "float64", "float64", "float64"),
        ("float32", "float32", "float16", "float16"),
        ("float16", "float16", "float16", "float32"),
        ("float32", "float16", "float32", "float32"),
    ],
    ids=str,
)
def test_other_dtypes_are_left_to_the_reference(emulated, dtypes):
    shapes = ((3, 8), (3, 40), (2, 40), (8, 2))
    arrays = [emulated.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    assert lq.backends.explain("add_low_rank", *arrays, 1.0).implementation == "reference"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_tensors_with_gradients_are_left_to_torch(on_tensors, torch):
    forward_ad = torch.autograd.forward_ad
    arrays = [
        ops.convert(array, torch) for array in case(np.random.default_rng(0), ("float32", "float32"), (2, 5, 64, 9))[:4]
    ]
    fits = taken._TAKEN[ops.add_low_rank]
    memory = on_tensors._memory

    def is_taken(*given):
        return taken._Condition(memory, ops.add_low_rank, fits)(*given, 0.5)

    assert is_taken(*arrays)
    for position in range(4):
        given = [array.clone().requires_grad_(i == position) for i, array in enumerate(arrays)]
        assert not is_taken(*given)
        with torch.no_grad():
            assert is_taken(*given)
        with forward_ad.dual_level(), torch.no_grad():
            dual = [forward_ad.make_dual(t.detach(), t) if i == position else t for i, t in enumerate(given)]
            assert not is_taken(*dual)


@pytest.mark.parametrize("pair", [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_the_kernels_run_on_the_memory_of_tensors(on_tensors, torch, pair):
    arguments = case(np.random.default_rng(0), pair, (2, 5, 64, 9))
    tensors = [ops.convert(array, torch) for array in arguments[:4]]
    expected = ops.convert(ops.add_low_rank.reference(*arguments), torch)
    assert torch.equal(on_tensors.add_low_rank(*tensors, 0.5), expected)
