"""Multiplication by a weight given as a dense matrix plus low-rank factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._dispatch import namespace

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["matmul_dense"]


def matmul_dense(x: Array, weight: Array, lora_A: Array = None, lora_B: Array = None, scaling: float = 1.0) -> Array:
    """Apply ``weight + scaling * lora_B @ lora_A`` to rows, without forming the sum.

    Parameters
    ----------
    x : array, shape (..., n)
        Inputs.
    weight : array, shape (m, n)
        Dense weight.
    lora_A, lora_B : array, shape (rank, n) and (m, rank), optional
        Low-rank factors, both or neither.
    scaling : float, default 1.0
        Factor of the low-rank part.

    Returns
    -------
    array, shape (..., m)
        ``x @ weight.T + scaling * (x @ lora_A.T) @ lora_B.T``.

    Examples
    --------
    >>> import numpy as np
    >>> matmul_dense(np.ones(2), np.eye(2)).tolist()
    [1.0, 1.0]
    """
    xp = namespace(x, weight, lora_A, lora_B)
    y = x @ xp.matrix_transpose(weight)
    if lora_A is None or lora_B is None:
        return y
    return y + ((x @ xp.matrix_transpose(lora_A)) @ xp.matrix_transpose(lora_B)) * scaling
