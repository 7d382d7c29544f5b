"""Logarithmic codebooks: levels at equal ratios, for values that are never negative, such as scales."""

from __future__ import annotations

import numpy as np

from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks.codebook import Codebook

__all__ = ["logarithmic"]

_OCTAVES = 16


@cached()
def logarithmic(bits: int) -> Codebook:
    """Return a codebook of zero and of levels at equal ratios from ``2**-16`` to 1.

    Use it to quantize the scales of a format. A decoded scale is never negative, and a scale of zero stays zero. From
    ``2**-16`` of the largest scale on, the relative error is at most ``(r - 1) / (r + 1)``, where
    ``r = 2**(16 / (2**bits - 2))`` is the ratio of neighbors: 2.2 % for 8 bits and 36 % for 4. Scales of at most
    ``2**-17`` of the largest become zero.

    Parameters
    ----------
    bits : int
        Bits of a code, 3 to 8.

    Returns
    -------
    Codebook
        Codebook of ``2**bits`` levels, named ``log{bits}``.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is not an integer from 3 to 8.

    References
    ----------
    None: the construction was made for this library.

    Examples
    --------
    >>> logarithmic(8).levels[[0, 1, -1]].tolist()
    [0.0, 1.52587890625e-05, 1.0]
    """
    require_integer("bits", bits, 3, 8, "logarithmic codebooks")
    exponents = np.linspace(-_OCTAVES, 0, 2**bits - 1)
    return Codebook(np.concatenate([[0.0], 2.0**exponents]), name=f"log{bits}")
