"""AbnormalFloat (AF4): levels for a small absolute error of normalized weights, computed for a block size."""

from __future__ import annotations

import numpy as np

from lqlora.codebooks._block_normal import block_normal_density
from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks._optimal_levels import Ends, optimal_levels
from lqlora.codebooks.codebook import Codebook

__all__ = ["AF4", "abnormal_float"]


@cached(256)
def abnormal_float(bits: int, block_size: int) -> Codebook:
    """Return AF4 or its counterpart for another number of bits and block size.

    The levels are -1, 0, 1, and the median of each other cell, for normal weights divided by the absolute maximum of
    their block. The cells of the two levels next to zero begin at zero, not halfway to it. This is the rule of the
    published table: it puts levels closer to zero than the least absolute error would.

    The median minimizes the error of the *normalized* weight and ignores the scale of the block. For the error of the
    weight itself use :func:`lqlora.codebooks.block_optimal`.

    Parameters
    ----------
    bits : int
        Bits of a code, 2 to 8.
    block_size : int
        Block size that the levels are computed for, 2 to 2**32. A format may use them with another block size.

    Returns
    -------
    Codebook
        Codebook of ``2**bits`` levels, named ``af{bits}-{block_size}``. For 4 bits and blocks of 64 it is
        :data:`lqlora.codebooks.AF4`, the published table of eight digits, named ``af4``.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` or ``block_size`` is out of range.

    References
    ----------
    Yoshida, NF4 Isn't Information Theoretically Optimal (and that's Good), arXiv 2306.06965.

    Examples
    --------
    >>> [round(float(level), 4) for level in abnormal_float(3, 64).levels]
    [-1.0, -0.4299, -0.1306, 0.0, 0.0924, 0.2895, 0.5373, 1.0]
    """
    require_integer("bits", bits, 2, 8, "AbnormalFloat")
    require_integer("block_size", block_size, 2, 2**32, "AbnormalFloat")
    if (bits, block_size) == (4, 64):
        return AF4
    # The density is symmetric, so each side is found on 0 to 1 by itself; there is one level more above zero.
    density = block_normal_density(block_size, power=0)
    half = 2 ** (bits - 1)
    below, above = (optimal_levels(density, count, 1, Ends(zero_cuts=True)) for count in (half - 2, half - 1))
    return Codebook(np.concatenate([[-1.0], -below[::-1], [0.0], above, [1.0]]), name=f"af{bits}-{block_size}")


#: AF4 for blocks of 64, the eight digits published by Yoshida (arXiv 2306.06965).
AF4 = Codebook(
    [
        -1.0,
        -0.69441008,
        -0.51243739,
        -0.3736951,
        -0.25607552,
        -0.14982478,
        -0.04934812,
        0.0,
        0.04273164,
        0.12934483,
        0.21961274,
        0.31675666,
        0.42563882,
        0.55496234,
        0.72424863,
        1.0,
    ],
    name="af4",
)
