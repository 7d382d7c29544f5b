"""Oracles of the published initializers, in float64, with exact SVDs and the quantizer as a parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Quantizer = Callable[[np.ndarray], np.ndarray]
    Pair = tuple[np.ndarray, np.ndarray]


def svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]


def lqlora(w: np.ndarray, q: Quantizer, rank: int, fisher: np.ndarray | None, iterations: int) -> list[Pair]:
    """LQ-LoRA, algorithm 1: L = SVD(W - Q) and Q = quantize(W - L) in turns, from Q = 0; with F, scaled by its means.

    The scaled SVD is that of D_row (W - Q) D_col, with roots of row and column means on the diagonals.
    """
    rows, columns = w.shape
    d_row = np.diag(np.ones(rows) if fisher is None else np.sqrt(fisher.mean(axis=1)))
    d_col = np.diag(np.ones(columns) if fisher is None else np.sqrt(fisher.mean(axis=0)))

    def factorize(matrix: np.ndarray) -> np.ndarray:
        return np.linalg.inv(d_row) @ svd(d_row @ matrix @ d_col, rank) @ np.linalg.inv(d_col)

    quantized, pairs = np.zeros_like(w), []
    for _ in range(iterations + 1):
        low_rank = factorize(w - quantized)
        pairs.append((quantized, low_rank))
        quantized = q(w - low_rank)
    return pairs[1:]


def loftq(w: np.ndarray, q: Quantizer, rank: int, iterations: int) -> list[Pair]:
    """LoftQ, algorithm 1: Q_t = q(W - A B^T), then A B^T = SVD(W - Q_t), from A = B = 0."""
    low_rank, pairs = np.zeros_like(w), []
    for _ in range(iterations):
        quantized = q(w - low_rank)
        low_rank = svd(w - quantized, rank)
        pairs.append((quantized, low_rank))
    return pairs


def lorc(w: np.ndarray, q: Quantizer, rank: int) -> Pair:
    """ZeroQuant-V2: the error E = W - q(W) is approximated by U sqrt(S) times sqrt(S) V."""
    left, values, right = np.linalg.svd(w - q(w), full_matrices=False)
    roots = np.sqrt(values[:rank])
    return q(w), (left[:, :rank] * roots) @ (roots[:, None] * right[:rank])


def pissa(w: np.ndarray, q: Quantizer, rank: int, iterations: int) -> list[Pair]:
    """QPiSSA: the adapter is the principal part, the base q(W - adapter); again with the SVD of W minus that base."""
    adapter, pairs = svd(w, rank), []
    for _ in range(iterations):
        base = q(w - adapter)
        pairs.append((base, adapter))
        adapter = svd(w - base, rank)
    return pairs


def qera_exact(w: np.ndarray, q: Quantizer, rank: int, moment: np.ndarray) -> Pair:
    """QERA, theorem 1: C = SVD(E R^1/2) R^-1/2, with the symmetric root."""
    values, vectors = np.linalg.eigh(moment)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    return q(w), svd((w - q(w)) @ root, rank) @ np.linalg.inv(root)


def qera_approx(w: np.ndarray, q: Quantizer, rank: int, mean_squares: np.ndarray) -> Pair:
    """QERA, theorem 2: the same with S = diag(sqrt(E[x_i^2]))."""
    s = np.diag(np.sqrt(mean_squares))
    return q(w), svd((w - q(w)) @ s, rank) @ np.linalg.inv(s)


def cloq(w: np.ndarray, quantized: np.ndarray, rank: int, gram: np.ndarray) -> Pair:
    """CLoQ: H damped by 0.01 tr(H) / n, R with R^T R = H from its eigenvectors, and R^+ SVD(R dW) for dW = W - Q.

    The paper has inputs by outputs, hence the transposes.
    """
    size = len(gram)
    values, vectors = np.linalg.eigh(gram + 0.01 * np.trace(gram) / size * np.eye(size))
    root = np.diag(np.sqrt(values)) @ vectors.T
    return quantized, (np.linalg.pinv(root) @ svd(root @ (w - quantized).T, rank)).T
