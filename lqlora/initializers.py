"""The papers' methods by name: thin presets of :func:`lqlora.decompose`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora.decomposition import Decomposition, decompose
from lqlora.weighting import Elementwise

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.formats import BlockFormat

__all__ = ["loftq", "lqlora", "qlora"]


def lqlora(
    w: Array, fmt: BlockFormat, rank: int, *, fisher: Array | None = None, max_iter: int = 100, seed: int = 0
) -> Decomposition:
    """LQ-LoRA: SVD first, alternate until the error stops falling, weighted by Fisher information if there is any.

    Parameters
    ----------
    w : array, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    fisher : array, shape (m, n), optional
        Diagonal Fisher information.
    max_iter : int, default 100
        Largest number of iterations.
    seed : int, default 0
        Of the randomized SVD.

    Returns
    -------
    Decomposition
        The best iterate; the published code returns the one after it.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, algorithm 1 and section 3.2.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((32, 48))
    >>> lq.initializers.lqlora(w, lq.BlockFormat.parse("nf2/16:float32"), rank=4).rank
    4
    """
    weighting = None if fisher is None else Elementwise(fisher)
    return decompose(w, fmt, rank, weighting=weighting, init="svd", max_iter=max_iter, seed=seed)


def loftq(w: Array, fmt: BlockFormat, rank: int, *, iterations: int = 5, seed: int = 0) -> Decomposition:
    """LoftQ: quantize first, then a fixed number of alternations.

    Parameters
    ----------
    w : array, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    iterations : int, default 5
        Alternations; one is ZeroQuant-V2's LoRC.
    seed : int, default 0
        Of the randomized SVD.

    Returns
    -------
    Decomposition
        The best of the iterates.

    References
    ----------
    LoftQ, arXiv 2310.08659, algorithm 1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((32, 48))
    >>> len(lq.initializers.loftq(w, lq.BlockFormat.parse("nf2/16:float32"), rank=4).errors)
    6
    """
    return decompose(w, fmt, rank, init="quantize", extrapolation=0.0, max_iter=iterations, rtol=0.0, seed=seed)


def qlora(w: Array, fmt: BlockFormat, rank: int, *, seed: int = 0) -> Decomposition:
    """QLoRA: quantize, and start the adapter at zero.

    Parameters
    ----------
    w : array, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    seed : int, default 0
        Of the noise in ``lora_A``.

    Returns
    -------
    Decomposition
        ``lora_B`` is zero.

    References
    ----------
    QLoRA, arXiv 2305.14314, section 3.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((32, 48))
    >>> bool((lq.initializers.qlora(w, lq.BlockFormat.parse("nf4/16:float32"), rank=4).lora_B == 0).all())
    True
    """
    return decompose(w, fmt, rank, init="zero", seed=seed)
