"""The dynamic 8-bit map of bitsandbytes: seven decades, each with twice the levels of the one below."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lqlora._annotations import annotated
from lqlora.codebooks._checks import cached
from lqlora.codebooks.codebook import Codebook

__all__ = ["dynamic8"]

_DECADES = 7


@annotated
@cached()
def dynamic8(*, signed: bool = True) -> Codebook:
    """Return the dynamic 8-bit codebook, in which bitsandbytes stores scales and optimizer states.

    Decade ``i`` from 0 to 6 is the interval from ``10**(i - 7)`` to ``10**(i - 6)``. It is cut into ``2**i`` equal
    cells (``2**(i + 1)`` if unsigned), whose centers are levels. Zero and one are added; -1 is not a level.

    Parameters
    ----------
    signed : bool, default True
        False leaves out the negative levels and doubles the number of cells per decade.

    Returns
    -------
    Codebook
        Codebook of 256 levels, from -0.99297 to 1 or from 0 to 1, named ``dynamic8`` or ``udynamic8``. It equals the
        map of bitsandbytes bit by bit.

    References
    ----------
    8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.2.

    Examples
    --------
    >>> dynamic8().levels[[0, 127, 128, 255]].tolist()
    [-0.992968738079071, 0.0, 5.500000384017767e-07, 1.0]
    """
    decades = [np.float32(10.0 ** (i + 1 - _DECADES)) * _centers(2 ** (i + (not signed))) for i in range(_DECADES)]
    magnitudes = np.concatenate(decades)
    below = -magnitudes if signed else magnitudes[:0]
    levels = np.sort(np.concatenate([below, magnitudes, np.array([0, 1], dtype=np.float32)]))
    return Codebook(levels, name="dynamic8" if signed else "udynamic8")


def _centers(count: int) -> npt.NDArray[np.float32]:
    """Return the centers of equal cells between 0.1 and 1, rounded as ``torch.linspace`` rounds on a CPU."""
    first, last, edges = np.float32(0.1), np.float32(1), np.arange(count + 1)
    step = float((last - first) / np.float32(count))
    # torch.linspace computes the first half of the edges from the first end and the second half from the last end,
    # and rounds each once. float64 holds these products and sums exactly, so a single cast gives the same floats.
    values = np.where(edges < (count + 1) // 2, float(first) + step * edges, float(last) - step * (count - edges))
    rounded = values.astype(np.float32)
    return (rounded[1:] + rounded[:-1]) / np.float32(2)
