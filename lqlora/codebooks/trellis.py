"""Trellis codes: levels of the states of a bit-shift trellis, for codes that depend on their neighbors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks.codebook import Codebook
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Trellis", "trellis_code"]

#: Bits of a state where the name does not say them.
_STATE_BITS = 10

#: Most bits of a state whose levels are trained; those of more states are computed. `experiments/trellis_levels.py` writes the file.
_TRAINED_BITS, _TRAINED = 10, Path(__file__).with_name("trellis_levels.npz")

#: Unit of the trained levels, which are stored as integers.
_UNIT = np.float32(2.0**-12)

#: Factors of the computed levels, by bits of a code, that minimize the error on normal weights divided by their root mean square.
_SPREAD = {1: 0.88, 2: 1.04, 3: 1.08, 4: 1.12}


class Trellis(Codebook):
    """Levels of the states of a trellis, in the order of the states. Made by :func:`trellis_code`.

    A code adds its bits to the state of the weight before it, and the new state chooses the level. So a level is not
    found by rounding: there are no boundaries, and the nearest sequence is searched. The scale of a block is its root
    mean square.

    Parameters
    ----------
    bits : int
        Bits of a code, 1 to 4.
    state_bits : int
        Bits of a state, 4 to 16 and at least twice ``bits``.

    Attributes
    ----------
    levels : ndarray of float32, shape (2**state_bits,)
        Level of each state, read-only.
    boundaries : ndarray of float32, shape (0,)
        Empty.

    Raises
    ------
    InvalidArgumentError
        If a number is out of range.

    Examples
    --------
    >>> trellis_code(2).levels.shape, len(trellis_code(2)), trellis_code(2).normalization
    ((1024,), 4, 'rms')
    """

    state_bits: int

    def __init__(self, bits: int, state_bits: int) -> None:
        require_integer("bits", bits, 1, 4, "trellis codes")
        require_integer("state_bits", state_bits, 4, 16, "trellis codes")
        if state_bits < 2 * bits:
            raise InvalidArgumentError(
                f"state_bits must be at least twice the bits of a code, got {state_bits} for {bits}."
            )
        make = _trained_levels if state_bits <= _TRAINED_BITS else _computed_levels
        levels, boundaries = make(bits, state_bits), np.zeros(0, dtype=np.float32)
        levels.flags.writeable = boundaries.flags.writeable = False
        name = f"tcq{bits}" if state_bits == _STATE_BITS else f"tcq{bits}-{state_bits}"
        attributes = {"levels": levels, "name": name, "normalization": "rms", "boundaries": boundaries}
        for attribute, value in {**attributes, "state_bits": state_bits, "_bits": bits}.items():
            object.__setattr__(self, attribute, value)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self._bits  # type: ignore[attr-defined,no-any-return]

    @property
    def widest(self) -> float:
        """One: the root mean square of a block is its scale."""
        return 1.0

    def __len__(self) -> int:
        """Return the number of codes, ``2**bits``."""
        return int(2**self.bits)

    def _identity(self) -> tuple[bytes, str]:
        return self.levels.tobytes(), f"rms, {self.bits} bits"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the two numbers."""
        return trellis_code, (self.bits, self.state_bits)


def _trained_levels(bits: int, state_bits: int) -> npt.NDArray[np.float32]:
    with np.load(_TRAINED) as tables:
        levels: npt.NDArray[np.float32] = tables[f"tcq{bits}-{state_bits}"] * _UNIT
    return levels


def _computed_levels(bits: int, state_bits: int) -> npt.NDArray[np.float32]:
    # A linear congruential step scatters the states; the sum of the four bytes of the result is nearly normal, with mean 510
    # and standard deviation 147.8. The sum is an integer below 2^11, so that level = float32(sum - 510) * factor is one
    # rounding, which kernels can compute instead of reading a table.
    states = np.arange(2**state_bits, dtype=np.uint64)
    mixed = (states * 34038481 + 76625530) % 2**32
    total = sum((mixed >> np.uint64(shift) & np.uint64(255)).astype(np.int64) for shift in (0, 8, 16, 24))
    centered = (np.asarray(total) - 510).astype(np.float32)
    levels: npt.NDArray[np.float32] = centered * np.float32(_SPREAD[bits] / 147.8)
    return levels


@cached(64)
def trellis_code(bits: int, state_bits: int = _STATE_BITS) -> Trellis:
    """Return the codebook of trellis-coded quantization.

    Parameters
    ----------
    bits : int
        Bits of a code, 1 to 4.
    state_bits : int, default 10
        Bits of a state, 4 to 16 and at least twice ``bits``. Each one more doubles the time of quantization and lowers the error a
        little. Decoding takes the same time for all.

    Returns
    -------
    Trellis
        Codebook of ``2**state_bits`` levels, trained for states of at most 10 bits and computed for more, named ``tcq{bits}`` for states of 10 bits, else
        ``tcq{bits}-{state_bits}``.

    Raises
    ------
    InvalidArgumentError
        If a number is out of range.

    Notes
    -----
    Mean squared error on normal weights of variance 1 with 64 of them a scale and ``fit="scale"``: at 10 bits of state 0.28, 0.072, 0.019
    and 0.0050 for 1 to 4 bits, at 8 bits 0.074 and 0.020 for 2 and 3. The
    best scalar levels leave 0.117, 0.035 and 0.0095 at 2 to 4 bits (Max, 1960).

    Levels of states of at most 10 bits are trained on normal weights, by Lloyd's algorithm. Those of more bits are computed, and with 12
    bits they leave about as much error as trained ones with 10.

    Short blocks lose this gain, since few sequences close the circle: the error of 2 bits is 0.09 with 16 weights a scale
    and 0.17 with 8. A block of one weight has only ``2**bits`` levels, and for 1 bit none near to it. A
    block at the end of a line is as short as what is left of the line, so choose a block size that divides its length.

    References
    ----------
    QTIP, arXiv 2406.11235, section 3.1 (bit-shift trellis) and algorithm 1 (the computed code 1MAD). Lloyd, 1982, and for trellis codes Stewart,
    Gray and Linde, 1982 (training). The factors of the computed levels are ours.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    >>> q = lq.quantize(w, lq.BlockFormat(trellis_code(2), 64))
    >>> str(q.format), bool(np.mean((lq.dequantize(q) - w) ** 2) < 0.09)
    ('tcq2/64:float32', True)
    """
    return Trellis(bits, state_bits)
