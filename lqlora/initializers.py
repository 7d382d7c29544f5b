"""The papers' methods by name: thin presets of :func:`lqlora.decompose`.

Each returns what its paper describes, or something better in the same norm: a decomposition is the best pair seen,
quantization alone and quantization with one SVD of its residual included, and its factors always fit its own quantized
part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._dispatch import namespace
from lqlora.decomposition import Decomposition, decompose
from lqlora.weighting import Elementwise, InputGram, RowColumn

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.formats import BlockFormat

__all__ = ["cloq", "loftq", "lorc", "lqlora", "pissa", "qera", "qlora"]

#: What keeps the Gram matrix of few inputs invertible, where the paper has none: a ten-thousandth of the usual damping.
_SLIGHT_DAMPING = 1e-6


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
        Diagonal Fisher information. Its row and column means weigh the SVD; errors are weighed entry by entry.
    max_iter : int, default 100
        Largest number of iterations.
    seed : int, default 0
        Of the randomized SVD.

    Returns
    -------
    Decomposition
        The best iterate; the published code returns the one after it. It stops at the first error that rises, this when
        three iterations together gain too little.

    See Also
    --------
    lqlora.decompose : by default it extrapolates, and improves the factors in the norm of every single weight.

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
    weighting = None if fisher is None else Elementwise(fisher, sweeps=0)
    return decompose(w, fmt, rank, weighting=weighting, init="svd", extrapolation=0.0, max_iter=max_iter, seed=seed)


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
        Alternations; one is :func:`lorc`.
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


def lorc(w: Array, fmt: BlockFormat, rank: int, *, seed: int = 0) -> Decomposition:
    """LoRC: quantize, and repair what that did by one SVD of the residual.

    Parameters
    ----------
    w : array, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    seed : int, default 0
        Of the randomized SVD.

    Returns
    -------
    Decomposition
        Quantized without regard to the low-rank part.

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
    """QPiSSA: keep the leading singular components back from the quantizer, and quantize the rest.

    Parameters
    ----------
    w : array, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    iterations : int, default 1
        Times that the rest is quantized.
    seed : int, default 0
        Of the randomized SVD.

    Returns
    -------
    Decomposition
        The best of the iterates. The paper's adapter is that from before the last quantization; this one is fitted to
        it, so that a single iteration is closer to the matrix, too.

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
    """QERA: quantize, and repair what that did to the outputs of the layer.

    Parameters
    ----------
    w : array, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    gram : array, shape (n, n) or (n,)
        Second moment of the inputs (QERA-exact), or its diagonal, the mean square of each input (QERA-approx).
    seed : int, default 0
        Of the randomized SVD.

    Returns
    -------
    Decomposition
        Quantized without regard to the inputs.

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
    namespace(gram)
    weighting = RowColumn(None, gram) if len(gram.shape) == 1 else InputGram(gram, damping=_SLIGHT_DAMPING)
    return decompose(w, fmt, rank, weighting=weighting, init="quantize", max_iter=1, seed=seed)


def cloq(w: Array, fmt: BlockFormat, rank: int, *, gram: Array, seed: int = 0) -> Decomposition:
    """CLoQ: quantize by error feedback, and repair what is left of the errors at the outputs of the layer.

    Parameters
    ----------
    w : array, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    gram : array, shape (n, n)
        Second moment of the inputs; a hundredth of its mean diagonal is added to its diagonal.
    seed : int, default 0
        Of the randomized SVD.

    Returns
    -------
    Decomposition
        Quantized by :func:`lqlora.gptq`, with scales fitted to its targets. The paper shrinks outliers before it
        quantizes (MagR), which is left out.

    References
    ----------
    CLoQ, arXiv 2501.18475; the damping is that of its experiments.

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
