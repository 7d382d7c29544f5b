"""Decoding to new arrays of any dtype and to given arrays, and the distance from the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import NF4, BlockFormat, Codebook, dequantize, quantize
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from lqlora.testing.strategies import ALL_CODEBOOKS, LAYOUTS, lay_out, weights
from tests.oracles import quantize as oracle
from tests.quantized.cases import KINDS, draw_case, normal, quantized, ramp, restored
from tests.strategies import host, on, scale_dtypes

pytestmark = pytest.mark.slow_on_strict

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")


@quiet
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_any_array_of_the_shape_is_written_to(xp, layout, data):
    w, fmt = draw_case(data, xp, fitted=True)
    dtype = data.draw(st.sampled_from([*scale_dtypes(xp), "float64"]))
    q = quantized(xp, w, fmt)
    if layout == "reversed" and "torch" in xp.__name__:
        layout = "every second"  # torch has no negative strides
    # The result must not depend on the old content, and memory beside the array must not change.
    native = np.float64 if dtype == "float64" else oracle.STORAGE[dtype]
    out = lay_out(on(xp, np.full(w.shape, 9.0).astype(native)), layout)
    assert dequantize(q, out=out) is out
    with np.errstate(over="ignore", under="ignore"):
        expected = restored(q).astype(native)
    assert host(out).tobytes() == expected.tobytes()


def test_entries_beside_the_output_are_left_alone(fast_xp):
    q = quantized(fast_xp, ramp(6, 7), BlockFormat(NF4, 5))
    whole = on(fast_xp, np.full((8, 20), 9.0, dtype=np.float32))
    dequantize(q, out=whole[1:7, 3:17:2])
    found = host(whole)
    assert found[1:7, 3:17:2].tolist() == restored(q).tolist()
    found[1:7, 3:17:2] = 9.0
    assert (found == 9.0).all()


@pytest.mark.parametrize("text", KINDS)
def test_an_output_of_float64_holds_the_values_of_float32(xp, text):
    q = quantized(xp, normal(6, 7), BlockFormat.parse(text))
    out = on(xp, np.zeros((6, 7)))
    np.testing.assert_array_equal(host(dequantize(q, out=out)), host(dequantize(q)))


@pytest.mark.parametrize("shape", [(7, 6), (6,), (6, 7, 1), (42,), ()])
def test_an_array_of_another_shape_is_refused(xp, shape):
    q = quantized(xp, ramp(6, 7), BlockFormat(NF4))
    with pytest.raises(InvalidArgumentError, match=r"out must have shape \(6, 7\)"):
        dequantize(q, out=on(xp, np.zeros(shape, dtype=np.float32)))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64])
def test_an_output_that_is_no_float_is_refused(xp, dtype):
    q = quantized(xp, ramp(6, 7), BlockFormat(NF4))
    with pytest.raises(UnsupportedArrayError):
        dequantize(q, out=on(xp, np.zeros((6, 7), dtype=dtype)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_values_are_rounded_to_other_dtypes(xp, dtype):
    q = quantized(xp, ramp(6, 7), BlockFormat(NF4))
    if dtype not in (*scale_dtypes(xp), "float64"):
        with pytest.raises(UnsupportedArrayError):
            dequantize(q, dtype=dtype)
        return
    expected = restored(q).astype(oracle.STORAGE.get(dtype, np.float64))
    assert host(dequantize(q, dtype=dtype)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["int8", "float8", "fp16"])
def test_unknown_dtypes_are_refused(xp, dtype):
    with pytest.raises((InvalidArgumentError, UnsupportedArrayError)):
        dequantize(quantized(xp, ramp(6, 7), BlockFormat(NF4)), dtype=dtype)


def test_an_output_of_another_library_is_refused(torch):
    q = quantize(ramp(4, 4), BlockFormat(NF4))
    with pytest.raises(MixedArraysError):
        dequantize(q, out=torch.zeros(4, 4))
    with pytest.raises(MixedArraysError):
        dequantize(q.to(torch), out=np.zeros((4, 4), dtype=np.float32))


@pytest.mark.parametrize("value", [[0.0], None, 1.0])
def test_an_output_that_is_no_array_is_refused(value):
    q = quantize(ramp(4, 4), BlockFormat(NF4))
    if value is None:
        assert dequantize(q, out=None).shape == (4, 4)
        return
    with pytest.raises(UnsupportedArrayError, match="array"):
        dequantize(q, out=value)


# --- distance from the weights


@quiet
@given(
    w=weights(largest=1e37),
    codebook=st.sampled_from(
        [book for book in ALL_CODEBOOKS if np.abs(book.levels).min() == 0 and book.levels[0] == -1]
    ),
    block_size=st.integers(1, 70),
)
def test_the_error_is_at_most_half_the_widest_gap(xp, w, codebook, block_size):
    q = quantize(on(xp, w), BlockFormat(codebook, block_size))
    errors = np.abs(host(dequantize(q)).astype(np.float64) - w).reshape(-1)
    gap = np.diff(codebook.levels.astype(np.float64)).max()
    scales = np.abs(host(q.scales).astype(np.float64)).repeat(block_size)[: w.size]
    # Division, midpoint and product are each rounded to float32; the last may be subnormal.
    assert (errors <= (gap / 2 + 2e-7) * scales + 1e-45).all()


def test_the_largest_weight_of_a_block_is_exact(xp):
    w = normal(10, 64)
    dense = host(dequantize(quantize(on(xp, w), BlockFormat(lq.uniform(4)))))
    peaks = np.abs(w).argmax(axis=1)
    assert dense[range(10), peaks].tolist() == w[range(10), peaks].tolist()


def test_levels_beyond_one_are_used_as_well_as_those_within():
    # The levels of FP4 are usually written from -6 to 6: the scale must map the largest weight to the largest level.
    levels = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    w = normal(4096)
    wide, unit = (dequantize(quantize(w, BlockFormat(Codebook(x)))) for x in (levels, levels / 6))
    np.testing.assert_allclose(np.linalg.norm(wide - w), np.linalg.norm(unit - w), rtol=1e-3)
