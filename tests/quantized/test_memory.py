"""The workspace is at most 64 MiB besides input and output, whatever the size of the array."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lqlora import BlockFormat, QuantizedArray, dequantize, quantize

MIB = 1 << 20
SHAPE = (4096, 8192)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16])


def workspace(function, *arguments, **options):
    """Return the peak of memory in MiB, without the arguments and the result."""
    tracemalloc.start()  # knows all memory of NumPy
    try:
        result = function(*arguments, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    own = result.nbytes if result is not options.get("out") else 0
    return (peak - own) / MIB, result


def weights(shape, dtype=np.float32, *, transposed=False):
    row = np.random.default_rng(0).standard_normal(shape[-1]).astype(dtype)
    w = np.empty(shape[::-1] if transposed else shape, dtype=dtype)
    w = w.T if transposed else w
    w[...] = row
    return w


WHOLE = f"nf4/{10**12}:float32"


# Pieces are widened from float16, and copied in other layouts. Neither may happen to the whole array.
@DTYPES
@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "text", ["nf4/64:float32", "nf4/64@0:float32", "nf3/64:u8/256:float32", WHOLE, "affine4/64@-1:float16", "nf8/60@-1"]
)
def test_quantizing_and_restoring_take_a_bounded_workspace(dtype, transposed, text):
    w = weights(SHAPE, dtype, transposed=transposed)
    taken, q = workspace(quantize, w, BlockFormat.parse(text))
    assert isinstance(q, QuantizedArray)
    assert taken <= 64
    assert workspace(dequantize, q)[0] <= 64
    out = np.zeros(SHAPE[::-1], dtype=dtype).T if transposed else np.zeros(SHAPE, dtype=dtype)
    assert workspace(dequantize, q, out=out)[0] <= 64


@pytest.mark.parametrize("text", ["nf4/64:float32", "nf4/64@0:float32", "nf3/64:u8/256:float32", WHOLE])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_workspace_is_far_below_the_array(text, transposed):
    # The array takes 64 MiB as float32, so any copy of the whole shows.
    w = weights((2048, 8192), np.float16, transposed=transposed)
    taken, q = workspace(quantize, w, BlockFormat.parse(text))
    assert taken <= 24
    assert workspace(dequantize, q, dtype="float16")[0] <= 24


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("text", ["nf2/64:float32", "nf3/64@0:u8/256:float32"])
@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_a_fit_takes_a_bounded_workspace(dtype, text, fit):
    w = weights(SHAPE, dtype)
    importance = np.linspace(1, 2, SHAPE[1], dtype=np.float32)
    taken, _ = workspace(quantize, w, BlockFormat.parse(text), fit=fit, weights=importance)
    assert taken <= 64


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_a_fit_of_a_small_array_takes_as_much(fit):
    assert workspace(quantize, weights((512, 1024)), BlockFormat.parse("nf2/64"), fit=fit)[0] <= 64


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_one_block_takes_a_few_times_its_size(fit):
    w = weights((1024, 4096))
    assert workspace(quantize, w, BlockFormat.parse(f"nf2/{10**12}"), fit=fit)[0] <= 14 * w.nbytes / MIB


@pytest.mark.parametrize("shape", [(64, 4096)])
def test_levels_of_groups_of_lines_take_a_bounded_workspace(shape):
    taken, q = workspace(quantize, weights(shape), BlockFormat.parse("nf8+fit16/64@-1"))
    assert isinstance(q, QuantizedArray)
    assert taken <= 64


@pytest.mark.slow
def test_levels_of_many_lines_are_fitted_to_a_sample():
    taken, _ = workspace(quantize, weights((512, 4096)), BlockFormat.parse("nf2+fit512/64@-1"), fit="levels+scale")
    assert taken <= 64
