"""Matrices, importance and host versions of the two steps of the alternation, for the tests of decompositions."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings

from lqlora import BlockFormat, Decomposition, dequantize, quantize
from tests.strategies import host, stored
from tests.weighting.cases import Case, case

FMT = BlockFormat.parse("nf3/16:float32")
ROWS, COLUMNS = 40, 32

#: A sketch would span this small matrix, so the low-rank step is an exact SVD.
SMALL = (24, 16)

#: Few examples: each runs a whole alternation, and the properties do not depend on rare inputs.
few = settings(max_examples=10)


def matrix(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS, dtype: Any = np.float32) -> np.ndarray:
    """Return noise with a few strong directions and outliers, similar to weights."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * 0.02
    w += 0.05 * np.outer(rng.standard_normal(rows), rng.standard_normal(columns))
    w[rng.integers(0, rows, 5), rng.integers(0, columns, 5)] *= 10
    return w.astype(dtype)


def fisher(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Return importance over several orders of magnitude."""
    rng = np.random.default_rng(seed + 1)
    return (np.exp(2 * rng.standard_normal((rows, 1))) * rng.exponential(size=(rows, columns))).astype(np.float32)


def weighted(array: Any, weights: Any) -> float:
    return float((np.asarray(weights, dtype=np.float64) * np.asarray(array, dtype=np.float64) ** 2).sum()) ** 0.5


def small_case(kind: str, seed: int = 0, dtype: Any = np.float64) -> Case:
    return case(kind, seed, *SMALL, dtype=dtype)


def rounded(target: np.ndarray, fmt: BlockFormat = FMT, **options: Any) -> np.ndarray:
    return host(dequantize(quantize(target, fmt, **options))).astype(np.float64)


def residual_of(w: np.ndarray, d: Decomposition) -> np.ndarray:
    """Return the residual of a decomposition, computed as its documentation defines the approximation."""
    product = host(d.lora_B).astype(np.float64) @ host(d.lora_A).astype(np.float64)
    return w.astype(np.float64) - host(dequantize(d.quantized)) - d.scaling * product


def contents(d: Decomposition) -> tuple[Any, ...]:
    """Return everything that two equal decompositions have in common, bytes included."""
    return stored(d.quantized), host(d.lora_A).tobytes(), host(d.lora_B).tobytes(), d.errors, d.best, d.stop_reason
