"""AbnormalFloat: levels of small absolute error for normalized weights, given the block size."""

from __future__ import annotations

import functools

import numpy as np

from lqlora.codebooks._block_normal import block_normal_density
from lqlora.codebooks._checks import require_whole
from lqlora.codebooks._optimal_levels import Ends, optimal_levels
from lqlora.codebooks.codebook import Codebook

__all__ = ["AF4", "abnormal_float"]


@functools.lru_cache(maxsize=None, typed=True)
def abnormal_float(bits: int, block_size: int) -> Codebook:
    """AF4 for any number of bits: small mean absolute error of *normalized* weights in blocks of a size.

    -1, 0 and 1 are levels, and each other level is the median of its cell, where the weights are normal and divided
    by the absolute maximum of their block. The cells of the two levels next to zero are taken to begin at zero, not
    halfway to it: the published levels follow that rule, which is why they lie closer to zero than those of least
    error would. What the error of a normalized weight leaves out is the scale of its block: see
    :func:`lqlora.codebooks.block_optimal`.

    Parameters
    ----------
    bits : int
        2 to 8.
    block_size : int
        Weights per block that the levels are for, 2 to 2**32. Blocks of another size can be rounded to them too.

    Returns
    -------
    Codebook
        ``2**bits`` levels named ``af{bits}-{block_size}``. For 4 bits and blocks of 64 it is
        :data:`lqlora.codebooks.AF4`, the table as published to eight digits, named ``af4``.

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
    require_whole("AbnormalFloat takes", bits, 2, 8)
    require_whole("The levels are for blocks of", block_size, 2, 2**32, "weights")
    if (bits, block_size) == (4, 64):
        return AF4
    density = block_normal_density(block_size, power=0)
    half = 2 ** (bits - 1)
    below, above = (optimal_levels(density, count, 1, Ends(zero_cuts=True)) for count in (half - 2, half - 1))
    return Codebook(np.concatenate([[-1.0], -below[::-1], [0.0], above, [1.0]]), name=f"af{bits}-{block_size}")


#: AF4 for blocks of 64 exactly as published (Yoshida, arXiv 2306.06965), to eight digits.
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
