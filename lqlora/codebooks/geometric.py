"""Logarithmic levels for numbers that are never negative, such as the scales of blocks."""

from __future__ import annotations

import functools

import numpy as np

from lqlora.codebooks._checks import require_whole
from lqlora.codebooks.codebook import Codebook

__all__ = ["logarithmic"]

_OCTAVES = 16


@functools.lru_cache(maxsize=None, typed=True)
def logarithmic(bits: int) -> Codebook:
    """Zero, then levels at equal ratios from ``2**-16`` to 1.

    Made for the scales of blocks. A scale never becomes negative, a scale of zero stays zero, and from ``2**-16`` on
    the relative error is bounded: neighbors differ by the factor ``r = 2**(16 / (2**bits - 2))`` and the error is at
    most ``(r - 1) / (r + 1)``, 2.2 % for 8 bits and 36 % for 4. What is not above ``2**-17`` of the largest scale
    becomes zero.

    Parameters
    ----------
    bits : int
        3 to 8.

    Returns
    -------
    Codebook
        ``2**bits`` levels named ``log{bits}``.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is not an integer from 3 to 8.

    References
    ----------
    A construction of this library.

    Examples
    --------
    >>> logarithmic(8).levels[[0, 1, -1]].tolist()
    [0.0, 1.52587890625e-05, 1.0]
    """
    require_whole("Logarithmic codebooks take", bits, 3, 8)
    exponents = np.linspace(-_OCTAVES, 0, 2**bits - 1)
    return Codebook(np.concatenate([[0.0], 2.0**exponents]), name=f"log{bits}")
