"""Keeping the best iterate, and deciding when to stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora.decomposition.result import StopReason

__all__ = ["Watch"]

T = TypeVar("T")

#: Iterations in a row that must bring less than ``rtol`` together before the alternation counts as converged. One is
#: too few: the error of an alternation is not monotone, since the quantizer need not lower the norm of the residual.
_PATIENCE = 3


class Watch(Generic[T]):
    """Keeps the best of what it sees.

    Parameters
    ----------
    norm : float
        Squared norm of the matrix.
    rtol, target, time_limit : float, float or None, float or None
        See :func:`lqlora.decompose`.
    callback : callable, optional
        See there.
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
        self._lowest: list[float] = []
        self.best = 0
        self.best_iterate: T
        self.reason: StopReason = "max_iter"

    def see(self, iterate: T, squared_error: float) -> bool:
        """Take note of an iterate, and tell whether it is to be the last."""
        error = self._relative(squared_error)
        self.errors.append(error)
        if len(self.errors) == 1 or error < self.errors[self.best]:
            self.best, self.best_iterate = len(self.errors) - 1, iterate
        self._lowest.append(self.errors[self.best])
        reason = self._reason_to_stop(error)
        if reason is not None:
            self.reason = reason
        return reason is not None

    def improve(self, squared_error: float) -> None:
        """Take note that the best iterate was improved afterwards."""
        self.errors[self.best] = self._relative(squared_error)

    def _relative(self, squared_error: float) -> float:
        # A matrix of norm zero is represented exactly, unless the weighting is zero: both count as no error.
        return (squared_error / self._norm) ** 0.5 if self._norm > 0 else 0.0

    def _reason_to_stop(self, error: float) -> StopReason | None:
        if self._callback is not None and self._callback(len(self.errors) - 1, error):
            return "callback"
        if self._target is not None and error <= self._target:
            return "target"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "time_limit"
        return "converged" if self._stalled() else None

    def _stalled(self) -> bool:
        if len(self._lowest) < _PATIENCE + 3:  # the two safeguards are no iterations
            return False
        return (
            self._lowest[-1] == 0.0 or self._lowest[-1 - _PATIENCE] - self._lowest[-1] < self._rtol * self._lowest[-1]
        )
