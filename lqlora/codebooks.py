"""Codebooks: the sorted values a code can stand for."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lqlora.errors import FormatError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NF4", "Codebook", "by_name", "is_standard", "normal_float", "uniform"]

_MAX_BITS = 8


@dataclass(frozen=True, eq=False)
class Codebook:
    """Sorted levels, and the boundaries between the cells that are rounded to them.

    Parameters
    ----------
    levels : sequence of float, length 2 to 256
        Strictly increasing finite values, kept as float32. A length that is no power of two is allowed: the codes
        then do not use all their bits.
    name : str, optional
        How plans and reports spell it. Codebooks with a name that :func:`lqlora.codebooks.by_name` knows are not stored in files.

    Attributes
    ----------
    levels : ndarray of float32, shape (n,)
        Read-only.
    boundaries : ndarray of float32, shape (n - 1,)
        Midpoints of neighboring levels, rounded to float32. A value equal to a boundary belongs to the lower level.

    Raises
    ------
    InvalidArgumentError
        If the levels are not 2 to 256 strictly increasing finite numbers (after rounding to float32), or the name has
        characters that the spelling of a format does not allow.

    Examples
    --------
    >>> ternary = Codebook([-1, 0, 1], name="ternary")
    >>> ternary.bits, ternary.boundaries.tolist()
    (2, [-0.5, 0.5])
    """

    levels: npt.NDArray[np.float32]
    name: str = "custom"
    boundaries: npt.NDArray[np.float32] = field(init=False, repr=False)

    def __init__(self, levels: Sequence[float] | npt.NDArray[np.floating], name: str = "custom") -> None:
        with np.errstate(over="ignore"):  # what overflows is refused below
            values = np.array(levels, dtype=np.float32)  # a copy: the caller's array stays his own
        if re.fullmatch(r"[A-Za-z][\w.+-]*", name) is None:
            raise InvalidArgumentError(f"A codebook is named by letters, digits, '_', '.', '+' and '-', not {name!r}.")
        if values.ndim != 1 or not 2 <= values.size <= 2**_MAX_BITS:
            raise InvalidArgumentError(
                f"A codebook has 2 to {2**_MAX_BITS} levels in one dimension, not {values.shape}."
            )
        if not np.isfinite(values).all() or not (np.diff(values) > 0).all():
            raise InvalidArgumentError("The levels of a codebook must be finite and strictly increasing in float32.")
        wide = values.astype(np.float64)
        boundaries = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
        values.flags.writeable = boundaries.flags.writeable = False
        for attribute, value in (("levels", values), ("name", name), ("boundaries", boundaries)):
            object.__setattr__(self, attribute, value)

    @property
    def bits(self) -> int:
        """Bits of one code, ``ceil(log2(number of levels))``."""
        return (len(self.levels) - 1).bit_length()

    @property
    def widest(self) -> float:
        """Largest absolute level: 1 for all codebooks of this module."""
        return float(np.abs(self.levels).max())

    def __len__(self) -> int:
        """Return the number of levels."""
        return len(self.levels)

    def __eq__(self, other: object) -> bool:
        """Compare levels bit for bit; the name does not count."""
        return isinstance(other, Codebook) and self.levels.tobytes() == other.levels.tobytes()

    def __hash__(self) -> int:
        """Hash the levels."""
        return hash(self.levels.tobytes())


#: Probability mass of the outermost quantile of NormalFloat: ``1 - (1/32 + 1/30) / 2`` to the digits published.
_NF_OFFSET = 0.9677083


@functools.lru_cache(maxsize=None, typed=True)
def normal_float(bits: int) -> Codebook:
    """NormalFloat for any number of bits, by LQ-LoRA's rule.

    Quantiles of the standard normal distribution at ``2**(bits - 1)`` equally spaced probabilities below one half and
    ``2**(bits - 1) + 1`` above it, which share the zero at one half, divided by the largest so that the ends are -1
    and 1. The outermost probability is 0.9677083 for every number of bits.

    Parameters
    ----------
    bits : int
        2 to 8.

    Returns
    -------
    Codebook
        ``2**bits`` levels named ``nf{bits}``. ``normal_float(4)`` is :data:`NF4`, the table as published: it differs
        from the formula evaluated in float64 by up to 1.1e-7.

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
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= _MAX_BITS:
        raise InvalidArgumentError(f"NormalFloat is defined here for 2 to {_MAX_BITS} bits, not {bits!r}.")
    return NF4 if bits == 4 else Codebook(_normal_float_levels(bits), name=f"nf{bits}")


def _normal_float_levels(bits: int) -> list[float]:
    half = 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf
    below = [quantile(p) for p in np.linspace(1 - _NF_OFFSET, 0.5, half)[:-1]]
    above = [quantile(p) for p in np.linspace(0.5, _NF_OFFSET, half + 1)[1:]]
    largest = max(above[-1], -below[0])
    return [x / largest for x in [*below, 0.0, *above]]


#: NF4 exactly as published (QLoRA, arXiv 2305.14314, appendix E), to the digits of float32.
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


@functools.lru_cache(maxsize=None, typed=True)
def uniform(bits: int, *, signed: bool = True) -> Codebook:
    """Equally spaced levels.

    Parameters
    ----------
    bits : int
        1 to 8 (2 to 8 if signed).
    signed : bool, default True
        True: ``2**bits - 1`` levels ``k / (2**(bits-1) - 1)``, symmetric about an exact zero, from -1 to 1.
        False: ``2**bits`` levels ``k / (2**bits - 1)`` from 0 to 1, as LQ-LoRA uses for scales.

    Returns
    -------
    Codebook
        Named ``int{bits}`` if signed, else ``uint{bits}``.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is out of range.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2 (second-level quantization of the scales).

    Examples
    --------
    >>> uniform(2, signed=False).levels.tolist()
    [0.0, 0.3333333432674408, 0.6666666865348816, 1.0]
    >>> uniform(3).levels.size
    7
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 + signed <= bits <= _MAX_BITS:
        raise InvalidArgumentError(f"Uniform codebooks take {1 + signed} to {_MAX_BITS} bits, not {bits!r}.")
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    codes = np.arange(-steps if signed else 0, steps + 1)
    return Codebook(codes / steps, name=f"{'int' if signed else 'uint'}{bits}")


def by_name(name: str) -> Codebook:
    """Return the codebook that a name in a plan, a report or a file stands for.

    Parameters
    ----------
    name : str
        ``nf2`` … ``nf8``, ``int2`` … ``int8`` or ``uint1`` … ``uint8``.

    Returns
    -------
    Codebook
        The codebook.

    Raises
    ------
    FormatError
        If the name is unknown.

    Examples
    --------
    >>> by_name("nf4") is NF4
    True
    """
    family, digits = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    makers: dict[str, Callable[[int], Codebook]] = {
        "nf": normal_float,
        "int": uniform,
        "uint": functools.partial(uniform, signed=False),
    }
    if family not in makers or not 1 <= len(digits) <= 2:
        raise FormatError(f"Unknown codebook {name[:40]!r}: use nf2…nf8, int2…int8 or uint1…uint8.")
    try:
        return makers[family](int(digits))
    except InvalidArgumentError as error:
        raise FormatError(f"Unknown codebook {name!r}: {error}") from None


def is_standard(codebook: Codebook) -> bool:
    """Tell whether a codebook is the one its name stands for, so that the name is enough to restore it.

    Parameters
    ----------
    codebook : Codebook
        Any codebook.

    Returns
    -------
    bool
        True if :func:`by_name` gives the same levels.

    Examples
    --------
    >>> is_standard(NF4), is_standard(Codebook([-1, 0, 1], name="nf4"))
    (True, False)
    """
    try:
        return by_name(codebook.name) == codebook
    except FormatError:
        return False
