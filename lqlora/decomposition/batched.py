"""Decomposition of a stack: several matrices stored as one array, such as the experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from lqlora._annotations import annotated
from lqlora._dispatch import FLOATS, namespace, plain_array
from lqlora._parallel import map_matrices
from lqlora._progress import reported
from lqlora.decomposition.solver import decompose
from lqlora.errors import InvalidArgumentError
from lqlora.quantized import QuantizedArray, dequantize
from lqlora.weighting import AbstractWeighting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from lqlora._typing import Array
    from lqlora.decomposition.result import Decomposition
    from lqlora.formats import BlockFormat

__all__ = ["DecompositionStack", "decompose_stack"]


@dataclass(frozen=True, eq=False)
class DecompositionStack:
    """Result of :func:`decompose_stack`: quantized matrices and their low-rank factors, stacked.

    Parameters
    ----------
    quantized : QuantizedArray of shape (..., m, n)
        Frozen quantized part.
    lora_A : array of float32, shape (..., rank, n)
        Right factors.
    lora_B : array of float32, shape (..., m, rank)
        Left factors.
    scaling : float
        Factor of each product ``lora_B @ lora_A``.
    parts : tuple of Decomposition
        Decomposition of each matrix, in row-major order, with its history of errors.
    """

    quantized: QuantizedArray
    lora_A: Array
    lora_B: Array
    scaling: float
    parts: tuple[Decomposition, ...]

    @property
    def storage_bits(self) -> int:
        """Exact number of bits of all quantized parts and factors."""
        return sum(part.storage_bits for part in self.parts)

    def reconstruct(self) -> Array:
        """Return the dense approximation.

        Returns
        -------
        array of float32, shape (..., m, n)
            ``dequantize(quantized) + scaling * lora_B @ lora_A``.
        """
        return dequantize(self.quantized) + (self.lora_B @ self.lora_A) * self.scaling


@annotated
def decompose_stack(
    w: Array,
    fmt: BlockFormat,
    rank: int,
    *,
    weighting: AbstractWeighting | Sequence[AbstractWeighting | None] | None = None,
    executor: Executor | None = None,
    progress: bool | Callable[[int, int], None] = True,
    name: str = "w",
    **options: Any,
) -> DecompositionStack:
    """Decompose each matrix of a stack independently, several at a time.

    The result equals that of :func:`lqlora.decompose` for each matrix. The stacked arrays can be stored and multiplied
    as one.

    Parameters
    ----------
    w : array of a floating-point dtype, shape (..., m, n)
        Stack of at least one matrix.
    fmt : BlockFormat
        Format of the quantized parts.
    rank : int
        Rank of each low-rank part.
    weighting : AbstractWeighting, or a sequence with one (or None) for each matrix, optional
        Norm of the residual, one for all matrices or one for each.
    executor, progress : Executor, and bool or callable, optional
        Options as in :func:`lqlora.cost_table`.
    name : str, optional
        Name of the stack in error messages.
    **options
        Options of :func:`lqlora.decompose`.

    Returns
    -------
    DecompositionStack
        Stacked results, and the result of each matrix.

    Raises
    ------
    InvalidArgumentError
        If there is no matrix, or the number of weightings differs from the number of matrices.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> experts = np.random.default_rng(0).standard_normal((4, 32, 48))
    >>> found = lq.decompose_stack(experts, lq.BlockFormat.parse("nf4/16:float32"), rank=2, max_iter=2)
    >>> found.quantized.shape, found.lora_A.shape, found.lora_B.shape
    ((4, 32, 48), (4, 2, 48), (4, 32, 2))
    """
    w = plain_array(w, name, FLOATS)
    xp = namespace(w)
    if len(w.shape) < 2 or not prod(w.shape[:-2]):
        raise InvalidArgumentError(
            f"{name} must have shape (..., m, n) and hold at least one matrix, got shape {tuple(w.shape)}."
        )
    batch_shape = tuple(w.shape[:-2])
    matrices = xp.reshape(w, (-1, *w.shape[-2:]))
    count = matrices.shape[0]
    norms = [weighting] * count if weighting is None or isinstance(weighting, AbstractWeighting) else [*weighting]
    if len(norms) != count:
        raise InvalidArgumentError(
            f"weighting must be one norm, or one for each of the {count} matrices of {name}, got {len(norms)}."
        )
    items = [(matrices[index, ...], norms[index], f"{name}[{index}]") for index in range(count)]
    work = partial(_decompose_one, fmt=fmt, rank=rank, options=options)
    with reported(progress, "Decomposing", count, "matrix") as report:
        parts = map_matrices(work, items, executor, report)
    return DecompositionStack(
        QuantizedArray.stack([part.quantized for part in parts], batch_shape),
        xp.reshape(xp.stack([part.lora_A for part in parts]), (*batch_shape, *parts[0].lora_A.shape)),
        xp.reshape(xp.stack([part.lora_B for part in parts]), (*batch_shape, *parts[0].lora_B.shape)),
        parts[0].scaling,
        tuple(parts),
    )


def _decompose_one(
    item: tuple[Array, AbstractWeighting | None, str], *, fmt: BlockFormat, rank: int, options: dict[str, Any]
) -> Decomposition:
    """Return the decomposition of one matrix; a function of the module, so that processes can run it."""
    matrix, weighting, name = item
    return decompose(matrix, fmt, rank, weighting=weighting, name=name, **options)
