"""The kernels convert 16-bit numbers by integer arithmetic of their own: as NumPy does, and ml_dtypes."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

from lqlora.backends.cupy.source import source
from tests.emulator import build as emulator
from tests.emulator.build import Range, build
from tests.requirements import require_or_skip

TEXT = """
template <class Half> __global__ void widen_all(const Half* x, float* y, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) y[i] = widen(x[i]);
}
template <class Half> __global__ void narrow_all(const float* x, Half* y, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) narrow(x[i], y[i]);
}
"""
NAMES = tuple(f"{name}<{half}>" for name in ("widen_all", "narrow_all") for half in ("Float16", "BFloat16"))
HALVES = {"Float16": np.dtype(np.float16), "BFloat16": np.dtype(ml_dtypes.bfloat16)}


def run(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    require_or_skip("g++", emulator.is_available())
    ranges = [Range(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (x, y)]
    pointers = [array.ctypes.data.to_bytes(8, sys.byteorder) for array in (x, y)]
    kernel = build(source("packing") + TEXT, NAMES)[name]
    kernel.launch((8,), (256,), [*pointers, np.int32(len(x)).tobytes()], ranges)
    return y


@pytest.mark.parametrize("half", HALVES)
def test_all_numbers_are_widened_exactly(half):
    bits = np.arange(2**16, dtype=np.uint16)
    found, expected = run(f"widen_all<{half}>", bits, np.empty(2**16, np.float32)), bits.view(HALVES[half])
    expected = expected.astype(np.float32)
    assert (np.isnan(found) == np.isnan(expected)).all()
    number = ~np.isnan(expected)
    assert (found.view(np.uint32) == expected.view(np.uint32))[number].all()


def near(dtype: np.dtype) -> np.ndarray:
    """All numbers of a dtype, the midpoints between them, and the neighbors of both."""
    finite = np.arange(2**15, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = finite[np.isfinite(finite)]
    middle = (finite[1:].astype(np.float64) / 2 + finite[:-1].astype(np.float64) / 2).astype(np.float32)
    beyond = np.float32([65519.99, 65520.0, 1e30, 3.4e38, np.inf])
    exact = np.concatenate([finite, middle, beyond])
    with np.errstate(over="ignore"):
        around = [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))]
    positive = np.concatenate(around)
    return np.concatenate([positive, -positive])


@pytest.mark.parametrize("half", HALVES)
def test_numbers_are_rounded_to_the_nearest_and_to_even_between_two(half):
    x = near(HALVES[half])
    found = run(f"narrow_all<{half}>", x, np.empty(len(x), np.uint16))
    with np.errstate(over="ignore", under="ignore"):
        expected = x.astype(HALVES[half])
    assert (found == expected.view(np.uint16)).all()


@pytest.mark.parametrize("half", HALVES)
def test_nan_stays_nan(half):
    x = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    found = run(f"narrow_all<{half}>", x, np.empty(4, np.uint16)).view(HALVES[half])
    assert np.isnan(found.astype(np.float32)).all()
