"""Weightings of every kind on every library, each with the dense quadratic form of its norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lqlora.weighting import AbstractWeighting, Elementwise, InputGram, Kronecker, RowColumn, Uniform
from tests.oracles import weighting as oracle
from tests.strategies import on

#: Those whose best low-rank approximation has a closed form.
CLOSED = ("uniform", "row", "column", "row-column", "gram", "kronecker")
KINDS = (*CLOSED, "elementwise")


@dataclass(frozen=True)
class Case:
    """A weighting as NumPy arrays.

    ``scaled`` multiplies all weights, ``permuted`` moves rows and columns; ``rows`` and ``columns`` are the quadratic
    forms of the two sides, whose Kronecker product the norm is.
    """

    kind: str
    weights: tuple[np.ndarray | None, ...]
    sweeps: int = 2

    def on(self, xp: Any) -> AbstractWeighting:
        arrays = [None if array is None else on(xp, array) for array in self.weights]
        if self.kind == "elementwise":
            return Elementwise(*arrays, sweeps=self.sweeps)
        if self.kind in ("gram", "kronecker"):
            return (InputGram if self.kind == "gram" else Kronecker)(*arrays)
        return RowColumn(*arrays) if arrays else Uniform()

    def sides(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "uniform":
            return np.eye(shape[0]), np.eye(shape[1])
        if self.kind == "gram":
            return np.eye(shape[0]), oracle.damped(self.weights[0], 0.01)
        if self.kind == "kronecker":
            outputs, inputs = (oracle.damped(gram, 0.01) for gram in self.weights)
            return outputs, inputs
        row, col = (
            np.eye(size) if own is None else np.diag(oracle.raised(own))
            for own, size in zip(self.weights, shape, strict=True)
        )
        return row, col

    def form(self, shape: tuple[int, int]) -> np.ndarray:
        if self.kind == "elementwise":
            return np.diag(self.weights[0].ravel().astype(np.float64))
        return np.kron(*self.sides(shape))

    def norm(self, residual: np.ndarray) -> float:
        """Squared norm, without the form as a whole where that would be large."""
        residual = residual.astype(np.float64)
        if self.kind == "elementwise":
            return float((self.weights[0].astype(np.float64) * residual**2).sum())
        row, col = self.sides(residual.shape)
        return float(((row @ residual @ col) * residual).sum())

    def scaled(self, factor: float) -> Case:
        return Case(self.kind, tuple(None if w is None else w * w.dtype.type(factor) for w in self.weights))

    def permuted(self, rows: np.ndarray, columns: np.ndarray) -> Case:
        if self.kind == "elementwise":
            return Case(self.kind, (self.weights[0][rows][:, columns],))
        if self.kind == "gram":
            return Case(self.kind, (self.weights[0][columns][:, columns],))
        if self.kind == "kronecker":
            outputs, inputs = self.weights
            return Case(self.kind, (outputs[rows][:, rows], inputs[columns][:, columns]))
        places = (rows, columns)
        return Case(
            self.kind, tuple(None if w is None else w[own] for w, own in zip(self.weights, places, strict=False))
        )


def gram(rng: np.random.Generator, size: int, samples: int | None = None) -> np.ndarray:
    """Second moment of correlated inputs of different sizes."""
    x = rng.standard_normal((samples or 3 * size, size)) * np.exp(rng.standard_normal(size))
    x[:, 1:] += 0.5 * x[:, :-1]
    return x.T @ x / len(x)


def case(kind: str, seed: int = 0, rows: int = 9, columns: int = 7, dtype: Any = np.float64) -> Case:
    rng = np.random.default_rng(seed + 100)
    row, col = (rng.exponential(size=size) + 0.01 for size in (rows, columns))
    weights = {
        "uniform": (),
        "row": (row, None),
        "column": (None, col),
        "row-column": (row, col),
        "elementwise": (np.outer(row, col) * (rng.exponential(size=(rows, columns)) + 0.1),),
        "gram": (gram(rng, columns),),
        "kronecker": (gram(rng, rows), gram(rng, columns)),
    }[kind]
    return Case(kind, tuple(None if own is None else own.astype(dtype) for own in weights))


def residual(seed: int = 0, rows: int = 9, columns: int = 7, dtype: Any = np.float64) -> np.ndarray:
    """Noise and a few strong directions."""
    rng = np.random.default_rng(seed)
    strong = rng.standard_normal((rows, 2)) @ rng.standard_normal((2, columns))
    return (strong + 0.5 * rng.standard_normal((rows, columns))).astype(dtype)
