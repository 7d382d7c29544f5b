"""Limits on the size of some matrices: a device, a layer, a group; from above or from below."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from lqlora._patterns import as_patterns
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._patterns import Patterns

__all__ = ["Limit"]


@dataclass(frozen=True)
class Limit:
    """A limit on the size of some matrices together: a budget of their own, or a least size.

    Parameters
    ----------
    include, exclude : str, compiled regular expression, callable, or several of them
        Shell patterns (``"model.layers.0.*"``), expressions that match the whole name, or functions of the name. A
        matrix counts if one of ``include`` matches and none of ``exclude`` does. Limits may overlap.
    bits_per_weight : float or Fraction, optional
        As an average over the weights of these matrices.
    total_bytes : int, optional
        In bytes. Exactly one of the two is given.
    at_least : bool, default False
        The limit is a least size instead of a greatest one.

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
        object.__setattr__(self, "exclude", as_patterns(self.exclude))
        if (self.bits_per_weight is None) == (self.total_bytes is None):
            raise InvalidArgumentError("Give a budget as bits_per_weight or as total_bytes, and only one of them.")
        value = self.total_bytes if self.bits_per_weight is None else self.bits_per_weight
        try:
            if self.total_bytes is not None:
                object.__setattr__(self, "total_bytes", operator.index(self.total_bytes))
            if not (math.isfinite(value) and value >= 0):  # type: ignore[arg-type, operator]
                raise InvalidArgumentError(f"A budget is a finite number that is not negative, not {value!r}.")
        except (OverflowError, TypeError):
            unit = "bits per weight" if self.total_bytes is None else "whole bytes"
            raise InvalidArgumentError(f"A budget is a number of {unit}, not {value!r}.") from None

    def in_bits(self, weight_count: int) -> Fraction:
        """Return the limit in bits.

        Parameters
        ----------
        weight_count : int
            Number of weights that the limit is for.

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
        rate = self.bits_per_weight
        return (rate if isinstance(rate, Fraction) else Fraction(float(rate))) * weight_count  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return the limit as errors name it."""
        kind = "at least" if self.at_least else "at most"
        if self.total_bytes is not None:
            amount = f"{self.total_bytes} bytes"
        else:
            amount = f"{float(self.bits_per_weight):.6g} bits per weight"  # type: ignore[arg-type]
        return f"{kind} {amount} for {self.matrices}"

    @property
    def matrices(self) -> str:
        """Which matrices the limit is for, in words."""
        wanted, unwanted = (", ".join(map(repr, as_patterns(p))) for p in (self.include, self.exclude))
        wanted = "all matrices" if wanted == "'*'" else wanted
        return wanted + (f" without {unwanted}" if unwanted else "")
