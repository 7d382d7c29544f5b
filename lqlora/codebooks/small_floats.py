"""Floating-point numbers of at most eight bits, divided by the largest."""

from __future__ import annotations

import functools

from lqlora.codebooks._checks import require_whole
from lqlora.codebooks.codebook import Codebook
from lqlora.errors import InvalidArgumentError

__all__ = ["FP4_BNB", "fp4", "small_float"]

#: Largest magnitudes that OCP's formats of eight bits keep for infinities and NaN: NaN alone, or a whole exponent.
_RESERVED = {(4, 3): 1, (5, 2): 4}


@functools.lru_cache(maxsize=None, typed=True)
def small_float(exponent_bits: int, mantissa_bits: int) -> Codebook:
    """Floating-point numbers with a sign, subnormals and one zero, divided by the largest so that they span -1 to 1.

    Every code is a finite number, as in OCP's E2M1, E2M3 and E3M2, except where OCP defines a format of eight bits
    that is not so: ``e4m3`` leaves out NaN (largest number 448 before the division) and ``e5m2`` leaves out infinities
    and NaN (largest 57344). The two zeros are one level, so one code is never used.

    Parameters
    ----------
    exponent_bits : int
        1 to 7.
    mantissa_bits : int
        0 to 6, at most ``7 - exponent_bits``.

    Returns
    -------
    Codebook
        ``2**(1 + exponent_bits + mantissa_bits) - 1`` levels, 253 for ``e4m3`` and 247 for ``e5m2``, symmetric about
        zero, named ``e{exponent_bits}m{mantissa_bits}``.

    Raises
    ------
    InvalidArgumentError
        If a number of bits is out of range, or the sum with the sign exceeds 8.

    References
    ----------
    OCP Microscaling Formats (MX) Specification 1.0, section 5.3, with OFP8 for the formats of eight bits.

    Examples
    --------
    >>> (6 * small_float(2, 1).levels[7:]).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    require_whole("A small float has an exponent of", exponent_bits, 1, 7)
    require_whole("A small float has a mantissa of", mantissa_bits, 0, 6)
    if 1 + exponent_bits + mantissa_bits > 8:
        raise InvalidArgumentError(f"e{exponent_bits}m{mantissa_bits} with its sign takes more than 8 bits.")
    finite = 2 ** (exponent_bits + mantissa_bits) - _RESERVED.get((exponent_bits, mantissa_bits), 0)
    positive = [_magnitude(code, mantissa_bits) for code in range(1, finite)]
    levels = [x / positive[-1] for x in [*(-x for x in reversed(positive)), 0, *positive]]
    return Codebook(levels, name=f"e{exponent_bits}m{mantissa_bits}")


def _magnitude(code: int, mantissa_bits: int) -> int:
    """Value of the bits below the sign, in units of the smallest subnormal number."""
    exponent, mantissa = divmod(code, 1 << mantissa_bits)
    return (mantissa + (1 << mantissa_bits)) << (exponent - 1) if exponent else mantissa


@functools.cache
def fp4() -> Codebook:
    """E2M1 under its usual name.

    Returns
    -------
    Codebook
        The 15 levels of :func:`small_float` with 2 and 1 bits, named ``fp4``: 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with both
        signs, divided by 6. The table that bitsandbytes calls FP4 is :data:`lqlora.codebooks.FP4_BNB`.

    References
    ----------
    OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.

    Examples
    --------
    >>> fp4() == small_float(2, 1), fp4().name
    (True, 'fp4')
    """
    return Codebook(small_float(2, 1).levels, name="fp4")


_BNB_MAGNITUDES = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)

#: FP4 of bitsandbytes, in increasing order. Its smallest magnitude is 1/192, not the subnormal number of E2M1, and its
#: two zeros are two codes, so that files of bitsandbytes keep their bits.
FP4_BNB = Codebook([x / 12 for x in (*(-x for x in reversed(_BNB_MAGNITUDES)), *_BNB_MAGNITUDES)], name="fp4-bnb")
