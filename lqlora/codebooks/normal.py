"""NormalFloat (NF2 to NF8): levels at quantiles of the normal distribution."""

from __future__ import annotations

from statistics import NormalDist

from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks._quantiles import quantile_levels
from lqlora.codebooks.codebook import Codebook

__all__ = ["NF4", "normal_float"]


@cached()
def normal_float(bits: int) -> Codebook:
    """Return NormalFloat for a number of bits, by LQ-LoRA's rule.

    The levels are quantiles of the standard normal distribution, divided by the largest so that they end at -1 and 1.
    The rule takes ``2**(bits - 1)`` equally spaced probabilities from ``1 - 0.9677083`` to one half, and
    ``2**(bits - 1) + 1`` from one half to 0.9677083. Both lists contain one half, whose quantile is zero and is kept
    once. The number 0.9677083 is the same for every number of bits.

    Parameters
    ----------
    bits : int
        Bits of a code, 2 to 8.

    Returns
    -------
    Codebook
        Codebook of ``2**bits`` levels, named ``nf{bits}``. ``normal_float(4)`` is :data:`NF4`, the published table,
        which differs from the formula evaluated in float64 by up to 1.1e-7.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is not an integer from 2 to 8.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2; QLoRA, arXiv 2305.14314, section 3 and appendix E.

    Examples
    --------
    >>> [round(float(level), 4) for level in normal_float(2).levels]
    [-1.0, 0.0, 0.3379, 1.0]
    """
    require_integer("bits", bits, 2, 8, "NormalFloat")
    return NF4 if bits == 4 else Codebook(quantile_levels(bits, NormalDist().inv_cdf), name=f"nf{bits}")


#: NF4 as published, to the digits of float32 (QLoRA, arXiv 2305.14314, appendix E). It is data, not computed: the
#: published table was made in float32, and files of other libraries hold exactly these values.
NF4 = Codebook(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    name="nf4",
)
