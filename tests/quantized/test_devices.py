"""Arrays whose memory the host cannot read: array-api-strict has devices that refuse to be mixed, or to become NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import BlockFormat, dequantize, gptq, matmul, normal_float, ops, quantize
from tests.quantized.cases import KINDS, normal
from tests.strategies import host, on, stored


@pytest.fixture
def away(strict):
    """Convert an array on the host to one on a device."""
    return lambda array: strict.asarray(on(strict, array), device=strict.Device("device1"))


@pytest.fixture
def home(strict):
    return lambda array: host(array.to_device(strict.Device("CPU_DEVICE")))


def test_the_device_is_not_the_host(away):
    assert not ops.is_on_host(away(normal(2)))
    with pytest.raises(RuntimeError):
        host(away(normal(2)))


@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
@pytest.mark.parametrize(
    "fmt",
    [
        pytest.param(fmt, marks=() if fmt.levels == "codebook" else pytest.mark.slow)
        for fmt in map(BlockFormat.parse, KINDS)
    ],
    ids=str,
)
def test_stored_and_decoded_bytes_are_those_of_the_host(away, home, fmt):
    fit = "absmax" if fmt.levels == "codebook" else "levels+scale"
    w = normal(6, 24)
    q, expected = quantize(away(w), fmt, fit=fit), quantize(w, fmt, fit=fit)
    assert {name: home(array).tobytes() for name, array in q.to_arrays().items()} == stored(expected)
    assert home(dequantize(q)).tobytes() == dequantize(expected).tobytes()


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_weighted_fits_are_those_of_the_host(away, home, fit, axis):
    fmt, w, weights = BlockFormat(normal_float(3), 8, axis=axis), normal(6, 24), abs(normal(6, 24, seed=1))
    q, expected = (quantize(put(w), fmt, weights=put(weights), fit=fit) for put in (away, lambda array: array))
    assert {name: home(array).tobytes() for name, array in q.to_arrays().items()} == stored(expected)
    assert home(dequantize(q)).tobytes() == dequantize(expected).tobytes()


@pytest.mark.parametrize("text", ["nf4/16:float32", "nf3/7:u8/5:float32", "affine4/8@-1:float32", "nf4/4@0:float32"])
@pytest.mark.parametrize("rows", [1, 20, 200])
def test_products_are_those_of_the_host(away, home, text, rows):
    fmt, w, x = BlockFormat.parse(text), normal(24, 56), normal(rows, 56, seed=1)
    found = home(matmul(away(x), quantize(away(w), fmt)))
    np.testing.assert_allclose(found, matmul(x, quantize(w, fmt)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "nf4/8:float32",
        "uint5/8:u8/4:float32",
        "affine4/8:float32",
        pytest.param("nf2+fit1/8@-1:float32", marks=pytest.mark.slow),
    ],
)
def test_error_feedback_is_that_of_the_host(away, home, text):
    fmt, w, x = BlockFormat.parse(text), normal(6, 24), normal(60, 24, seed=1)
    fit = "levels+scale" if isinstance(fmt.levels, int) else "scale"
    q, expected = gptq(away(w), fmt, away(x.T @ x), fit=fit), gptq(w, fmt, x.T @ x, fit=fit)
    assert {name: home(array).tobytes() for name, array in q.to_arrays().items()} == stored(expected)
