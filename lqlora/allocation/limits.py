"""Limits on the size of some matrices together, and the record of a limit and its use in a plan."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from lqlora._annotations import annotated_class
from lqlora._options import require_choice, require_number
from lqlora._patterns import as_patterns
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._patterns import Patterns

__all__ = ["Limit", "LimitUse"]

_UNITS = ("bits", "error")


@annotated_class
@dataclass(frozen=True)
class Limit:
    """A limit on the size of some matrices together: a largest size, or a smallest one with ``at_least``.

    Parameters
    ----------
    include, exclude : str, compiled regular expression, callable, or several of them
        Names or their ends (``"q_proj"``), shell patterns (``"model.layers.0.*"``), expressions that match the whole
        name, or functions of the name. A matrix counts if one of ``include`` matches and none of ``exclude`` does. Limits
        may overlap.
    bits_per_weight : float or Fraction, optional
        Average over the weights of these matrices.
    total_bytes : int, optional
        Number of bytes. Give exactly one of the two.
    at_least : bool, default False
        Whether the limit is a smallest size instead of a largest one.

    Raises
    ------
    InvalidArgumentError
        If not exactly one of the two is given, or it is negative or not a finite number.

    Examples
    --------
    >>> print(Limit("model.layers.0.*", bits_per_weight=3.5))
    at most 3.5 bits per weight for 'model.layers.0.*'
    >>> print(Limit(["*.q_proj", "*.k_proj"], exclude="model.layers.0.*", total_bytes=4096, at_least=True))
    at least 4096 bytes for '*.q_proj', '*.k_proj' without 'model.layers.0.*'
    """

    include: Patterns = "*"
    exclude: Patterns = field(default=(), kw_only=True)
    bits_per_weight: float | Fraction | None = field(default=None, kw_only=True)
    total_bytes: int | None = field(default=None, kw_only=True)
    at_least: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", as_patterns(self.include))
        object.__setattr__(self, "exclude", as_patterns(self.exclude, "exclude"))
        if (self.bits_per_weight is None) == (self.total_bytes is None):
            raise InvalidArgumentError(
                f"bits_per_weight or total_bytes must be given, and not both: got {self.bits_per_weight!r} and "
                f"{self.total_bytes!r}."
            )
        value = self.total_bytes if self.bits_per_weight is None else self.bits_per_weight
        parameter = "total_bytes" if self.bits_per_weight is None else "bits_per_weight"
        try:
            if self.total_bytes is not None:
                object.__setattr__(self, "total_bytes", operator.index(self.total_bytes))
            if not (math.isfinite(value) and value >= 0):  # type: ignore[arg-type, operator]
                raise InvalidArgumentError(f"{parameter} must be a finite number of at least 0, got {value!r}.")
        except (OverflowError, TypeError):
            unit = "number" if self.total_bytes is None else "whole number of bytes"
            raise InvalidArgumentError(f"{parameter} must be a {unit}, got {value!r}.") from None

    def in_bits(self, weight_count: int) -> Fraction:
        """Return the limit in bits.

        Parameters
        ----------
        weight_count : int
            Number of weights of the matrices that count.

        Returns
        -------
        Fraction
            Exact, not rounded.

        Examples
        --------
        >>> Limit(bits_per_weight=2.75).in_bits(10)
        Fraction(55, 2)
        """
        if self.total_bytes is not None:
            return Fraction(8 * self.total_bytes)
        # A float is taken at its exact binary value, which may be a little below the decimal number that was typed: 2.3
        # excludes a plan of exactly 23/10 bits per weight. Fraction(23, 10) admits it.
        rate = self.bits_per_weight
        return (rate if isinstance(rate, Fraction) else Fraction(float(rate))) * weight_count  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return the limit as text for errors."""
        kind = "at least" if self.at_least else "at most"
        if self.total_bytes is not None:
            amount = f"{self.total_bytes} bytes"
        else:
            amount = f"{float(self.bits_per_weight):.6g} bits per weight"  # type: ignore[arg-type]
        return f"{kind} {amount} for {self.matrices}"

    @property
    def matrices(self) -> str:
        """Patterns of the matrices in the limit, as text for plans and errors."""
        wanted = ", ".join(map(repr, self.include))  # type: ignore[arg-type] # a tuple: see __post_init__
        unwanted = ", ".join(map(repr, self.exclude))  # type: ignore[arg-type]
        wanted = "all matrices" if wanted == "'*'" else wanted
        return wanted + (f" without {unwanted}" if unwanted else "")


@dataclass(frozen=True)
class LimitUse:
    """A limit or budget of a plan, in numbers, and how much of it the plan uses.

    Parameters
    ----------
    matrices : str
        Matrices that count: ``"all matrices"``, or the patterns that the caller gave.
    used : float
        Bits or error of those matrices in the plan.
    upper, lower : float, optional
        Limits: ``used`` is at most ``upper`` and at least ``lower``. At least one of the two is given.
    unit : {"bits", "error"}
        Quantity that is limited. Bits are whole; the low-rank factors are among them if the plan counts them.
    weight_count : int
        Number of weights of those matrices, to state bits as bits per weight.

    Raises
    ------
    InvalidArgumentError
        If neither limit is given, the unit is not one of the two, or a number is negative or not finite.

    Examples
    --------
    >>> LimitUse("all matrices", used=2_700, upper=2_750, weight_count=1_000).describe()
    'all matrices: at most 2.7500 bits per weight, used 2.7000, 50 bits left'
    """

    matrices: str
    used: float
    upper: float | None = None
    lower: float | None = None
    unit: str = "bits"
    weight_count: int = 0

    def __post_init__(self) -> None:
        # Plans are read from files, so the numbers of a use are checked as if a user had typed them.
        given = {"upper": self.upper, "lower": self.lower}
        numbers = {"used": self.used, "weight_count": self.weight_count}
        numbers |= {name: limit for name, limit in given.items() if limit is not None}
        if len(numbers) == 2:
            raise InvalidArgumentError(
                f"upper or lower must be given for the limit on {self.matrices}, got None for both."
            )
        require_choice(self.unit, "unit", _UNITS)
        for name, number in numbers.items():
            allowed = f"at least 0 and finite in the limit on {self.matrices}"
            require_number(number, name, allowed, lambda own: 0 <= own < math.inf)

    def describe(self) -> str:
        """Return the limit and its use as they are printed.

        Returns
        -------
        str
            One line without a period.
        """
        limits = [
            f"{words} {self._quantity(limit)}"
            for words, limit in (("at least", self.lower), ("at most", self.upper))
            if limit is not None
        ]
        unit = "an error of " if self.unit == "error" else ""
        end = " bits per weight" if self.unit == "bits" else ""
        left = f", {self.upper - self.used:,} bits left" if self.unit == "bits" and self.upper is not None else ""
        return f"{printable(self.matrices)}: {unit}{' and '.join(limits)}{end}, used {self._quantity(self.used)}{left}"

    def _quantity(self, number: float) -> str:
        return f"{number:.4g}" if self.unit == "error" else f"{number / max(1, self.weight_count):.4f}"
