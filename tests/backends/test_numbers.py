"""The kernels' own conversions of 16-bit numbers match NumPy and ml_dtypes; positions in blocks match divisions."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lqlora.backends.cuda import compiling as binary
from lqlora.backends.cuda.kernel_text import source
from lqlora.backends.cuda.launching import launch
from lqlora.backends.cuda.registration import kernels_run
from tests.emulator import build as emulator
from tests.emulator.build import Range, build
from tests.requirements import require_or_skip

TEXT = """
template <class Half> __global__ void widen_all(const Half* x, float* y, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) y[i] = widen(x[i]);
}
template <class Size> __global__ void position_all(
    const long long* x, long long* y, int count, Size size, double inverse) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const Position found = position_of(x[i], {size, inverse});
    y[2 * i] = found.block, y[2 * i + 1] = found.within;
  }
}
template <class Half> __global__ void narrow_all(const float* x, Half* y, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) narrow(x[i], y[i]);
}
"""
HALF_NAMES = (f"{name}<{half}>" for name in ("widen_all", "narrow_all") for half in ("Float16", "BFloat16"))
NAMES = (*HALF_NAMES, "position_all<long long>")
HALVES = {"Float16": np.dtype(np.float16), "BFloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Any:
    """Return a function that runs a kernel. A device has its own instructions for 16-bit numbers."""
    return run_emulated if request.param == "emulated" else run_on_device


def run_on_device(name: str, x: np.ndarray, y: np.ndarray, *scalars: np.generic) -> np.ndarray:
    require_or_skip("cupy", kernels_run())
    cupy = importlib.import_module("cupy")
    there = cupy.asarray(x.view(np.uint16) if x.itemsize == 2 else x), cupy.empty(y.shape, dtype=y.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary, "source", lambda module: source(module) + TEXT)
        launch(0, None, "packing", name, 256, 8 * 256, (*there, np.int32(len(x)), *scalars))
    return there[1].get()


def run_emulated(name: str, x: np.ndarray, y: np.ndarray, *scalars: np.generic) -> np.ndarray:
    require_or_skip("g++", emulator.is_available())
    ranges = [Range(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (x, y)]
    pointers = [array.ctypes.data.to_bytes(8, sys.byteorder) for array in (x, y)]
    kernel = build(source("packing") + TEXT, NAMES)[name]
    kernel.launch((8,), (256,), [*pointers, *(scalar.tobytes() for scalar in (np.int32(len(x)), *scalars))], ranges)
    return y


@pytest.mark.parametrize("half", HALVES)
def test_all_numbers_are_widened_exactly(run, half):
    bits = np.arange(2**16, dtype=np.uint16)
    found, expected = run(f"widen_all<{half}>", bits, np.empty(2**16, np.float32)), bits.view(HALVES[half])
    expected = expected.astype(np.float32)
    assert (np.isnan(found) == np.isnan(expected)).all()
    number = ~np.isnan(expected)
    assert (found.view(np.uint32) == expected.view(np.uint32))[number].all()


def near(dtype: np.dtype) -> np.ndarray:
    """Return all numbers of a dtype, the midpoints between them, and the neighbors of both."""
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
def test_numbers_are_rounded_to_the_nearest_and_to_even_between_two(run, half):
    x = near(HALVES[half])
    found = run(f"narrow_all<{half}>", x, np.empty(len(x), np.uint16))
    with np.errstate(over="ignore", under="ignore"):
        expected = x.astype(HALVES[half])
    assert (found == expected.view(np.uint16)).all()


@pytest.mark.parametrize("half", HALVES)
def test_nan_stays_nan(run, half):
    x = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    found = run(f"narrow_all<{half}>", x, np.empty(4, np.uint16)).view(HALVES[half])
    assert np.isnan(found.astype(np.float32)).all()


@pytest.mark.parametrize("size", [1, 3, 64, 4097, 2**31 - 1, 2**32, 2**33 + 7, 10**12 + 39])
def test_positions_are_found_beyond_32_bits(run, size):
    rng = np.random.default_rng(size)
    # At the ends of blocks, and anywhere.
    most = 2**51 // size
    ends = (rng.integers(0, most, 2000) * size)[:, None] + np.array([-1, 0, 1])
    weights = np.concatenate([ends.reshape(-1), rng.integers(0, 2**51, 2000), np.arange(100), 2**32 + np.arange(-9, 9)])
    weights = weights[weights >= 0]
    scalars = np.int64(size), np.float64(1 / size)
    found = run("position_all<long long>", weights, np.empty(2 * len(weights), np.int64), *scalars)
    assert (found[::2] == weights // size).all()
    assert (found[1::2] == weights % size).all()
