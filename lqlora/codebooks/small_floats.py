"""Small floating-point formats (E2M1, E4M3 and others of at most eight bits, FP4 of bitsandbytes) as codebooks."""

from __future__ import annotations

import functools

from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks.codebook import Codebook
from lqlora.errors import InvalidArgumentError

__all__ = ["FP4_BNB", "fp4", "small_float"]

#: Number of largest magnitudes that OCP's 8-bit formats reserve: E4M3 for NaN, E5M2 for infinity and three NaN.
_RESERVED = {(4, 3): 1, (5, 2): 4}


@cached()
def small_float(exponent_bits: int, mantissa_bits: int) -> Codebook:
    """Return the numbers of a small floating-point format, divided by the largest so that they span -1 to 1.

    The format has a sign bit and subnormal numbers. Every code is a finite number, as in OCP's E2M1, E2M3 and E3M2.
    The exceptions are those of OCP's 8-bit formats: ``e4m3`` has no NaN here (largest number 448 before the division),
    and ``e5m2`` neither infinity nor NaN (largest 57344). Both zeros are one level, so one code is never used.

    Parameters
    ----------
    exponent_bits : int
        Bits of the exponent, 1 to 7.
    mantissa_bits : int
        Bits of the mantissa, 0 to 6 and at most ``7 - exponent_bits``.

    Returns
    -------
    Codebook
        Codebook of ``2**(1 + exponent_bits + mantissa_bits) - 1`` levels, or 253 for ``e4m3`` and 247 for ``e5m2``,
        symmetric about zero, named ``e{exponent_bits}m{mantissa_bits}``.

    Raises
    ------
    InvalidArgumentError
        If a number of bits is out of range, or the bits and the sign exceed 8.

    References
    ----------
    OCP Microscaling Formats (MX) Specification 1.0, section 5.3, with OFP8 for the formats of eight bits.

    Examples
    --------
    >>> (6 * small_float(2, 1).levels[7:]).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    require_integer("exponent_bits", exponent_bits, 1, 7, "small floats")
    require_integer("mantissa_bits", mantissa_bits, 0, 6, "small floats")
    if 1 + exponent_bits + mantissa_bits > 8:
        raise InvalidArgumentError(
            f"exponent_bits and mantissa_bits must add up to at most 7, which leaves one bit for the sign, got "
            f"{exponent_bits} and {mantissa_bits}."
        )
    finite = 2 ** (exponent_bits + mantissa_bits) - _RESERVED.get((exponent_bits, mantissa_bits), 0)
    positive = [_magnitude(code, mantissa_bits) for code in range(1, finite)]
    levels = [x / positive[-1] for x in [*(-x for x in reversed(positive)), 0, *positive]]
    return Codebook(levels, name=f"e{exponent_bits}m{mantissa_bits}")


def _magnitude(code: int, mantissa_bits: int) -> int:
    """Return the value of the bits below the sign, in units of the smallest subnormal number."""
    # Subnormal (exponent 0): 0.mantissa * 2**(1 - bias). Normal: 1.mantissa * 2**(exponent - bias). In units of
    # 2**(1 - bias - mantissa_bits) both are integers, so no bias is needed.
    exponent, mantissa = divmod(code, 1 << mantissa_bits)
    return (mantissa + (1 << mantissa_bits)) << (exponent - 1) if exponent else mantissa


@functools.cache
def fp4() -> Codebook:
    """Return E2M1, the 4-bit floating-point format of OCP, under its usual name.

    Returns
    -------
    Codebook
        The 15 levels of ``small_float(2, 1)``, named ``fp4``: 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with both signs, divided
        by 6. The table that bitsandbytes calls FP4 differs: it is :data:`lqlora.codebooks.FP4_BNB`.

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

#: FP4 of bitsandbytes, in increasing order. Its smallest magnitude is 1/192, where E2M1 has the subnormal 1/12. It has
#: codes for -0.0 and 0.0, so that files of bitsandbytes are read and written without loss.
FP4_BNB = Codebook([x / 12 for x in (*(-x for x in reversed(_BNB_MAGNITUDES)), *_BNB_MAGNITUDES)], name="fp4-bnb")
