"""Weighted norms and their best low-rank approximations, in float64, from what the docstrings promise."""

from __future__ import annotations

import numpy as np

FLOOR = 1e-6


def raised(weights: np.ndarray) -> np.ndarray:
    """Row or column weights with the floor below which none falls; all of one if there are none."""
    weights = np.asarray(weights, dtype=np.float64)
    return np.maximum(weights, FLOOR * weights.max()) if weights.any() else np.ones_like(weights)


def damped(gram: np.ndarray, damping: float) -> np.ndarray:
    gram = np.asarray(gram, dtype=np.float64)
    return (gram + gram.T) / 2 + damping * np.mean(np.diag(gram)) * np.eye(len(gram))


def squared_norm(form: np.ndarray, residual: np.ndarray) -> float:
    """Value of a quadratic form, of shape (mn, mn), in the entries of a residual, row after row."""
    entries = np.asarray(residual, dtype=np.float64).ravel()
    return float(entries @ form @ entries)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def root(gram: np.ndarray, power: float = 0.5) -> np.ndarray:
    """Symmetric power of a positive definite matrix."""
    values, vectors = np.linalg.eigh(gram)
    return (vectors * values**power) @ vectors.T


def best(residual: np.ndarray, outputs: np.ndarray, inputs: np.ndarray, rank: int) -> np.ndarray:
    """Minimize tr(G (E - L) R (E - L)^T) over L of a rank: QERA, theorem 1, with a root on either side."""
    inner = truncated(root(outputs) @ residual @ root(inputs), rank)
    return root(outputs, -0.5) @ inner @ root(inputs, -0.5)
