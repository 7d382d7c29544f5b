"""Student float: quantiles of the Student t distribution."""

from __future__ import annotations

import functools

from scipy.special import stdtrit

from lqlora.codebooks._checks import require_whole
from lqlora.codebooks._quantiles import quantile_levels
from lqlora.codebooks.codebook import Codebook

__all__ = ["student_float"]

_USUAL_DF = 5


@functools.lru_cache(maxsize=None, typed=True)
def student_float(bits: int, df: int = _USUAL_DF) -> Codebook:
    """NormalFloat's construction with the quantiles of the Student t distribution, whose tails are heavier.

    Parameters
    ----------
    bits : int
        2 to 8.
    df : int, default 5
        Degrees of freedom, 1 to 1000. The fewer, the closer the levels are to zero.

    Returns
    -------
    Codebook
        ``2**bits`` levels from -1 to 1 with a zero, named ``sf{bits}``, or ``sf{bits}-{df}`` if ``df`` is not 5.

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
    require_whole("Student float takes", bits, 2, 8)
    require_whole("Student float takes", df, 1, 1000, "degrees of freedom")
    name = f"sf{bits}" if df == _USUAL_DF else f"sf{bits}-{df}"
    return Codebook(quantile_levels(bits, functools.partial(stdtrit, df)), name=name)
