"""What was asked of a plan, and what the plan uses of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lqlora.errors import InvalidArgumentError

__all__ = ["Demand"]

_UNITS = ("bits", "error")


@dataclass(frozen=True)
class Demand:
    """One limit that was asked of a plan, and what the plan uses of it.

    Parameters
    ----------
    what : str
        Which matrices: ``"all matrices"``, or the pattern or name that the caller gave.
    used : float
        Bits or error of those matrices in the plan.
    upper, lower : float, optional
        The limits: ``used`` is at most ``upper`` and at least ``lower``. At least one of the two is given.
    unit : {"bits", "error"}
        What is limited. Bits are whole; the low-rank factors are among them if the plan counts them.
    weights : int
        Number of weights of those matrices, to state bits as bits per weight.

    Raises
    ------
    InvalidArgumentError
        If there is no limit, the unit is another word, or a number is negative or not finite.

    Examples
    --------
    >>> Demand("all matrices", used=2_700, upper=2_750, weights=1_000).describe()
    'all matrices: at most 2.7500 bits per weight, used 2.7000, 50 bits left'
    """

    what: str
    used: float
    upper: float | None = None
    lower: float | None = None
    unit: str = "bits"
    weights: int = 0

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.upper, self.lower) if limit is not None]
        if not limits:
            raise InvalidArgumentError(f"A demand on {self.what!r} has an upper or a lower limit, or both.")
        if self.unit not in _UNITS:
            raise InvalidArgumentError(f"A demand is on 'bits' or 'error', not {self.unit!r}.")
        for number in (self.used, self.weights, *limits):
            if not math.isfinite(number) or number < 0:
                raise InvalidArgumentError(f"A demand on {self.what!r} has a number that is {number}.")

    def describe(self) -> str:
        """Return the demand as it is printed.

        Returns
        -------
        str
            One line without a period.
        """
        words = [
            f"{word} {self._quantity(limit)}"
            for word, limit in (("at least", self.lower), ("at most", self.upper))
            if limit is not None
        ]
        unit = "an error of " if self.unit == "error" else ""
        end = " bits per weight" if self.unit == "bits" else ""
        left = f", {self.upper - self.used:,} bits left" if self.unit == "bits" and self.upper is not None else ""
        return f"{self.what}: {unit}{' and '.join(words)}{end}, used {self._quantity(self.used)}{left}"

    def _quantity(self, number: float) -> str:
        return f"{number:.4g}" if self.unit == "error" else f"{number / max(1, self.weights):.4f}"
