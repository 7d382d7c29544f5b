"""Block-wise optimal float (BOF4, BOF4-S): levels of least squared error for normal weights in blocks."""

from __future__ import annotations

import numpy as np

from lqlora._annotations import annotated
from lqlora.codebooks._block_normal import block_normal_density
from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks._optimal_levels import Ends, optimal_levels
from lqlora.codebooks.codebook import Codebook

__all__ = ["block_optimal"]


@annotated
@cached(256)
def block_optimal(bits: int, block_size: int, *, signed: bool = False) -> Codebook:
    """Return BOF4 or BOF4-S, or their counterpart for another number of bits and block size.

    The levels minimize the mean squared error of normal weights. Each level is the mean of the normalized weights of
    its cell, weighted by the square of their block maximum: that turns the error of the normalized weight into the
    error of the weight. The means are computed by quadrature, not from samples.

    Parameters
    ----------
    bits : int
        Bits of a code, 2 to 8.
    block_size : int
        Block size that the levels are computed for, 2 to 2**32. A format may use them with another block size.
    signed : bool, default False
        False is BOF4: blocks are divided by their absolute maximum, and -1, 0 and 1 are levels. True is BOF4-S: blocks
        are divided by their entry of largest magnitude with its sign, so that it becomes 1; 0 and 1 are levels, -1
        is not.

    Returns
    -------
    Codebook
        Codebook of ``2**bits`` levels, named ``bof{bits}-{block_size}``, or ``bof{bits}s-{block_size}`` with
        normalization ``"signed"``. The tables published for 4 bits were fitted to samples and differ by up to 4e-4.

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
    require_integer("bits", bits, 2, 8, "block-wise optimal float")
    require_integer("block_size", block_size, 2, 2**32, "block-wise optimal float")
    # E(w - scale * level)**2 = E scale**2 (x - level)**2 with x = w / scale: the density of x counts each block
    # absmax**2 times. It is symmetric, so the two sides are independent problems between the fixed levels.
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
