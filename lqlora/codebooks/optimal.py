"""Block-wise optimal float: the levels of least squared error for normal weights in blocks."""

from __future__ import annotations

import functools

import numpy as np

from lqlora.codebooks._block_normal import block_normal_density
from lqlora.codebooks._checks import require_whole
from lqlora.codebooks._optimal_levels import Ends, optimal_levels
from lqlora.codebooks.codebook import Codebook

__all__ = ["block_optimal"]


@functools.lru_cache(maxsize=None, typed=True)
def block_optimal(bits: int, block_size: int, *, signed: bool = False) -> Codebook:
    """BOF4 and BOF4-S for any number of bits: least mean squared error of normal weights in blocks of a size.

    A level is the mean of the normalized weights of its cell, each weighted by the square of the maximum of its
    block, because that is the error of the weight itself. The means are integrals, not samples.

    Parameters
    ----------
    bits : int
        2 to 8.
    block_size : int
        Weights per block that the levels are for, 2 to 2**32. Blocks of another size can be rounded to them too.
    signed : bool, default False
        False (BOF4): blocks are divided by their absolute maximum; -1, 0 and 1 are levels. True (BOF4-S): blocks are
        divided by their entry of largest magnitude with its sign, which becomes 1; 0 and 1 are levels, -1 is not.

    Returns
    -------
    Codebook
        ``2**bits`` levels named ``bof{bits}-{block_size}``, or ``bof{bits}s-{block_size}`` with the normalization
        ``"signed"``. The tables published for 4 bits were fitted to samples: they differ by up to 4e-4.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` or ``block_size`` is out of range.

    References
    ----------
    BOF4, arXiv 2505.06653, section 3.1, equation 4 (signed normalization), and section 3.2, equation 5 (levels).

    Examples
    --------
    >>> [round(float(level), 4) for level in block_optimal(3, 64, signed=True).levels]
    [-0.7107, -0.4199, -0.1983, 0.0, 0.1796, 0.3763, 0.6192, 1.0]
    """
    require_whole("Block-wise optimal float takes", bits, 2, 8)
    require_whole("The levels are optimal for blocks of", block_size, 2, 2**32, "weights")
    density = block_normal_density(block_size, power=2)
    half = 2 ** (bits - 1)
    above = optimal_levels(density, half - 1, 2, Ends())
    if signed:
        below = optimal_levels(density, half - 1, 2, Ends(free=True))
    else:
        below = np.append(optimal_levels(density, half - 2, 2, Ends()), 1.0)
    levels = np.concatenate([-below[::-1], [0.0], above, [1.0]])
    name = f"bof{bits}{'s' if signed else ''}-{block_size}"
    return Codebook(levels, name=name, normalization="signed" if signed else "absmax")
