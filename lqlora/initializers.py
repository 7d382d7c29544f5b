"""Published methods by name (LQ-LoRA, LoftQ, QLoRA, LoRC, QPiSSA, QERA, CLoQ), as presets of ``lqlora.decompose``.

Each returns the decomposition of its paper, or one with a smaller error in the same norm, up to the accuracy of the randomized SVD. That is
because :func:`lqlora.decompose` returns the best iterate, compares it with quantization alone and with quantization plus one
SVD of its residual, and refits the factors to the quantized part that is returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._dispatch import FLOATS, plain_array
from lqlora.decomposition import Decomposition, decompose
from lqlora.weighting import Elementwise, InputGram, RowColumn

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.formats import BlockFormat

__all__ = ["cloq", "loftq", "lorc", "lqlora", "pissa", "qera", "qlora"]

#: Damping where the paper has none, a ten-thousandth of the default: it keeps the Gram matrix of few inputs invertible.
_SLIGHT_DAMPING = 1e-6


def lqlora(
    w: Array, fmt: BlockFormat, rank: int, *, fisher: Array | None = None, max_iter: int = 100, seed: int = 0
) -> Decomposition:
    """Decompose by LQ-LoRA: start from an SVD and alternate, weighted by Fisher information if given.

    Parameters
    ----------
    w : array, shape (m, n)
        Weight matrix, outputs by inputs.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    fisher : array, shape (m, n), optional
        Diagonal Fisher information. The SVD is weighted by its row and column means, errors by each entry.
    max_iter : int, default 100
        Largest number of iterations.
    seed : int, default 0
        Seed of the randomized SVD.

    Returns
    -------
    Decomposition
        The best iterate. The published code stops at the first increase of the error and returns the iterate with that
        error. This function stops after three iterations without progress.

    See Also
    --------
    lqlora.decompose : extrapolates by default, and ``Elementwise(fisher)`` weights the low-rank step by each entry.

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
    # sweeps=0: the rank-one surrogate in the low-rank step, the true Fisher information in the error, as in the paper.
    weighting = None if fisher is None else Elementwise(plain_array(fisher, "fisher", FLOATS), sweeps=0)
    return decompose(w, fmt, rank, weighting=weighting, init="svd", extrapolation=0.0, max_iter=max_iter, seed=seed)


def loftq(w: Array, fmt: BlockFormat, rank: int, *, iterations: int = 5, seed: int = 0) -> Decomposition:
    """Decompose by LoftQ: quantize first, then alternate a fixed number of times.

    Parameters
    ----------
    w : array, shape (m, n)
        Weight matrix, outputs by inputs.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    iterations : int, default 5
        Number of alternations; with one the result is that of :func:`lorc`.
    seed : int, default 0
        Seed of the randomized SVD.

    Returns
    -------
    Decomposition
        The best iterate.

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
    """Decompose by QLoRA: quantize, and start the adapter at zero.

    Parameters
    ----------
    w : array, shape (m, n)
        Weight matrix, outputs by inputs.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    seed : int, default 0
        Seed of the noise in ``lora_A``.

    Returns
    -------
    Decomposition
        Quantized matrix with ``lora_B`` at zero and noise in ``lora_A``, ready for training.

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


def lorc(w: Array, fmt: BlockFormat, rank: int, *, seed: int = 0) -> Decomposition:
    """Decompose by LoRC: quantize, then approximate the residual by one SVD.

    Parameters
    ----------
    w : array, shape (m, n)
        Weight matrix, outputs by inputs.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    seed : int, default 0
        Seed of the randomized SVD.

    Returns
    -------
    Decomposition
        Quantized matrix, and the low-rank approximation of its residual.

    References
    ----------
    ZeroQuant-V2, arXiv 2303.08302, on low-rank compensation (LoRC).

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((32, 48))
    >>> d = lq.initializers.lorc(w, lq.BlockFormat.parse("nf4/16:float32"), rank=4)
    >>> len(d.errors), d.best
    (2, 1)
    """
    return decompose(w, fmt, rank, init="quantize", max_iter=1, seed=seed)


def pissa(w: Array, fmt: BlockFormat, rank: int, *, iterations: int = 1, seed: int = 0) -> Decomposition:
    """Decompose by QPiSSA: subtract the leading singular components, and quantize the rest.

    Parameters
    ----------
    w : array, shape (m, n)
        Weight matrix, outputs by inputs.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    iterations : int, default 1
        Number of times that the rest is quantized.
    seed : int, default 0
        Seed of the randomized SVD.

    Returns
    -------
    Decomposition
        The best iterate. The adapter of the paper is the one from before the last quantization. This function fits it
        to the quantized part afterwards, so that even a single iteration has a smaller error.

    References
    ----------
    PiSSA, arXiv 2404.02948, on its quantized form (QPiSSA).

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((32, 48))
    >>> len(lq.initializers.pissa(w, lq.BlockFormat.parse("nf4/16:float32"), rank=4, iterations=5).errors)
    7
    """
    return decompose(w, fmt, rank, init="svd", extrapolation=0.0, max_iter=iterations, rtol=0.0, seed=seed)


def qera(w: Array, fmt: BlockFormat, rank: int, *, gram: Array, seed: int = 0) -> Decomposition:
    """Decompose by QERA: quantize, then minimize the error at the outputs of the layer.

    Parameters
    ----------
    w : array, shape (m, n)
        Weight matrix, outputs by inputs.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    gram : array, shape (n, n) or (n,)
        Second moment of the inputs (QERA-exact), or its diagonal, the mean squares of the inputs (QERA-approx).
    seed : int, default 0
        Seed of the randomized SVD.

    Returns
    -------
    Decomposition
        Matrix quantized without regard to the inputs, and the low-rank part of least error at the outputs.

    References
    ----------
    QERA, arXiv 2410.06040, theorems 1 and 2.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((32, 48)), rng.standard_normal((500, 48)) @ rng.standard_normal((48, 48))
    >>> fmt = lq.BlockFormat.parse("nf4/16:float32")
    >>> exact, approx = (lq.initializers.qera(w, fmt, 4, gram=gram) for gram in (x.T @ x, (x * x).sum(axis=0)))
    >>> before, after = (np.linalg.norm(x @ (w - d.reconstruct()).T) for d in (approx, exact))
    >>> bool(after < before)
    True
    """
    gram = plain_array(gram, "gram", FLOATS)
    weighting = RowColumn(None, gram) if len(gram.shape) == 1 else InputGram(gram, damping=_SLIGHT_DAMPING)
    return decompose(w, fmt, rank, weighting=weighting, init="quantize", max_iter=1, seed=seed)


def cloq(w: Array, fmt: BlockFormat, rank: int, *, gram: Array, seed: int = 0) -> Decomposition:
    """Decompose by CLoQ: quantize by error feedback (GPTQ), then minimize the remaining error at the outputs.

    Parameters
    ----------
    w : array, shape (m, n)
        Weight matrix, outputs by inputs.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    gram : array, shape (n, n)
        Second moment of the inputs. One percent of the mean of its diagonal is added to the diagonal.
    seed : int, default 0
        Seed of the randomized SVD.

    Returns
    -------
    Decomposition
        Matrix quantized by :func:`lqlora.gptq` with ``fit="scale"``, and the low-rank part of its residual. The
        preprocessing of the paper, which shrinks outliers (MagR), is not implemented.

    References
    ----------
    CLoQ, arXiv 2501.18475; the damping is the one of its experiments.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((32, 48)), rng.standard_normal((500, 48)) @ rng.standard_normal((48, 48))
    >>> fmt = lq.BlockFormat.parse("nf2/16:float32")
    >>> ours, nearest = (method(w, fmt, 4, gram=x.T @ x) for method in (lq.initializers.cloq, lq.initializers.qera))
    >>> before, after = (np.linalg.norm(x @ (w - d.reconstruct()).T) for d in (nearest, ours))
    >>> bool(after < before)
    True
    """
    weighting = InputGram(gram, damping=0.01)
    return decompose(
        w, fmt, rank, weighting=weighting, quantizer="gptq", fit="scale", init="quantize", max_iter=1, seed=seed
    )
