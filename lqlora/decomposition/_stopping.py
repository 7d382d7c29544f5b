"""Stopping rule of the alternation, which also keeps the best iterate and the history of errors."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from lqlora.errors import InvalidArgumentError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora.decomposition.result import StopReason

__all__ = ["StoppingRule"]

T = TypeVar("T")

#: The alternation has converged when this many iterations in a row together lower the error by less than ``rtol``. One
#: is too few: the error need not fall in each iteration, because the quantizer need not lower the norm of the residual.
_PATIENCE = 3


class StoppingRule(Generic[T]):
    """Stopping rule: it records iterates, keeps the best one, and decides when to stop.

    Parameters
    ----------
    norm : float
        Squared norm of the matrix, by which squared errors are divided.
    rtol, target, time_limit : float, float or None, float or None
        See :func:`lqlora.decompose`.
    callback : callable, optional
        See :func:`lqlora.decompose`.
    """

    def __init__(
        self,
        norm: float,
        rtol: float,
        target: float | None,
        time_limit: float | None,
        callback: Callable[[int, float], bool | None] | None,
    ) -> None:
        self._norm, self._rtol, self._target, self._callback = norm, rtol, target, callback
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self.errors: list[float] = []
        self._lowest: list[float] = []  # after each iterate, the least error so far: it never rises
        self.best = 0
        self.first_iterate: T
        self.best_iterate: T
        self.reason: StopReason = "max_iter"

    def record(self, iterate: T, squared_error: float) -> bool:
        """Record an iterate and return whether to stop."""
        error = self._relative(squared_error)
        if not self.errors and error == math.inf:
            raise InvalidArgumentError(
                "weighting must give importance to a nonzero entry of the matrix: its squared norm is 0, and no relative error "
                "exists. Use another weighting, or a format with a level of zero."
            )
        self.errors.append(error)
        if len(self.errors) == 1:
            self.first_iterate = iterate
        if len(self.errors) == 1 or error < self.errors[self.best]:
            self.best, self.best_iterate = len(self.errors) - 1, iterate
        self._lowest.append(self.errors[self.best])
        reason = self._reason_to_stop(error)
        if reason is not None:
            self.reason = reason
        return reason is not None

    def return_first(self, squared_error: float) -> None:
        """Make the first iterate the best one, and record the error that the best one so far turned out to have."""
        self.errors[self.best] = self._ratio(squared_error)
        self.best, self.best_iterate = 0, self.first_iterate

    def revise_best(self, squared_error: float) -> None:
        """Replace the recorded error of the best iterate, after its factors were refitted or quantized."""
        self.errors[self.best] = self._relative(squared_error)

    def _relative(self, squared_error: float) -> float:
        if not 0 <= squared_error < math.inf:
            raise NonFiniteError(
                f"squared error of iterate {len(self.errors)} must be finite and at least 0, got {squared_error!r}. The "
                "low-rank part leaves the range of the matrix's dtype: multiply the matrix by a power of two."
            )
        return self._ratio(squared_error)

    def _ratio(self, squared_error: float) -> float:
        # The norm is zero for a matrix of zeros and for one whose entries all have zero importance. No error is then the
        # only finite one.
        if self._norm > 0:
            ratio: float = (squared_error / self._norm) ** 0.5
            return ratio
        return 0.0 if squared_error == 0 else math.inf

    def _reason_to_stop(self, error: float) -> StopReason | None:
        if self._callback is not None and self._callback(len(self.errors) - 1, error):
            return "callback"
        if self._target is not None and error <= self._target:
            return "target"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "time_limit"
        return "converged" if self._stalled() else None

    def _stalled(self) -> bool:
        # The first two errors are those of the safeguards, not of iterations, and the oldest error compared is that of
        # an iteration.
        if len(self._lowest) < _PATIENCE + 3:
            return False
        return (
            self._lowest[-1] == 0.0 or self._lowest[-1 - _PATIENCE] - self._lowest[-1] < self._rtol * self._lowest[-1]
        )
