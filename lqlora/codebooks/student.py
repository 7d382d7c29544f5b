"""Student float (SF2 to SF8): levels at quantiles of the Student t distribution."""

from __future__ import annotations

import functools

from scipy.special import stdtrit

from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks._quantiles import quantile_levels
from lqlora.codebooks.codebook import Codebook

__all__ = ["student_float"]

_USUAL_DF = 5


@cached(256)
def student_float(bits: int, df: int = _USUAL_DF) -> Codebook:
    """Return Student float: the construction of NormalFloat with quantiles of the Student t distribution.

    Its tails are heavier than normal, so the levels are denser near zero. Use it for weights with outliers.

    Parameters
    ----------
    bits : int
        Bits of a code, 2 to 8.
    df : int, default 5
        Degrees of freedom, 1 to 1000. Fewer degrees mean heavier tails and levels closer to zero.

    Returns
    -------
    Codebook
        Codebook of ``2**bits`` levels from -1 to 1, zero included, named ``sf{bits}``, or ``sf{bits}-{df}`` if ``df``
        is not 5.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` or ``df`` is not an integer in its range.

    References
    ----------
    Dotzel et al., Learning from Students, arXiv 2405.03103, section 3.3, algorithm 1.

    Examples
    --------
    >>> [round(float(level), 3) for level in student_float(3).levels]
    [-1.0, -0.411, -0.18, 0.0, 0.133, 0.284, 0.491, 1.0]
    """
    require_integer("bits", bits, 2, 8, "Student float")
    require_integer("df", df, 1, 1000, "Student float")
    # quantile_levels divides by the largest quantile, so the scale of the t distribution does not matter.
    name = f"sf{bits}" if df == _USUAL_DF else f"sf{bits}-{df}"
    return Codebook(quantile_levels(bits, functools.partial(stdtrit, df)), name=name)
