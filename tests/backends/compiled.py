"""Helpers of the tests of compiled kernels: drawn sizes and codebooks, and the comparison of bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from lqlora.testing.strategies import ALL_CODEBOOKS

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
#: Lengths around the lengths of registers (8, 16, 32) and of stripes (2048).
COUNTS = st.sampled_from([0, 1, 7, 8, 9, 31, 32, 33, 63, 65, 100, 2047, 2048, 2049, 5000])
SIZES = st.sampled_from([1, 2, 3, 7, 8, 16, 63, 64, 65, 256, 2048, 2056, 10**6])
BOOKS = st.sampled_from(ALL_CODEBOOKS)


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def ran(operation, *arguments):
    """Run an operation, after checking that a compiled kernel takes the call."""
    assert operation.select(*arguments).implementation.startswith("native."), operation.select(*arguments).reason
    return operation(*arguments)


def zeros_of(codebook, blocks):
    if codebook.normalization != "affine":
        return None
    return np.random.default_rng(blocks).integers(0, len(codebook), blocks).astype(np.uint8)
