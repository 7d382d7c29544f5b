"""Oracle of weighted norms and their best low-rank approximations, in float64, written from the docstrings."""

from __future__ import annotations

import numpy as np

FLOOR = 1e-6


def raised(importance: np.ndarray) -> np.ndarray:
    """Return importance of rows or columns raised to the floor; ones for all zeros."""
    importance = np.asarray(importance, dtype=np.float64)
    return np.maximum(importance, FLOOR * importance.max()) if importance.any() else np.ones_like(importance)


def damped(gram: np.ndarray, damping: float) -> np.ndarray:
    gram = np.asarray(gram, dtype=np.float64)
    return (gram + gram.T) / 2 + damping * np.mean(np.diag(gram)) * np.eye(len(gram))


def squared_norm(form: np.ndarray, residual: np.ndarray) -> float:
    """Return the value of a quadratic form of shape (mn, mn) in the entries of a residual in row-major order."""
    entries = np.asarray(residual, dtype=np.float64).ravel()
    return float(entries @ form @ entries)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def root(gram: np.ndarray, power: float = 0.5) -> np.ndarray:
    """Return a symmetric power of a positive definite matrix."""
    values, vectors = np.linalg.eigh(gram)
    return (vectors * values**power) @ vectors.T


def best(residual: np.ndarray, outputs: np.ndarray, inputs: np.ndarray, rank: int) -> np.ndarray:
    """Return the L of a rank that minimizes tr(G (E - L) R (E - L)^T): QERA, theorem 1, with a root on either side."""
    inner = truncated(root(outputs) @ residual @ root(inputs), rank)
    return root(outputs, -0.5) @ inner @ root(inputs, -0.5)
