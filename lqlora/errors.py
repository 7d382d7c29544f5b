"""Every exception the library raises on purpose, and the one warning.

Each message says what was wrong, where, and what to do about it. Each class also inherits the built-in exception a
caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction

__all__ = [
    "CheckpointError",
    "ConformanceError",
    "FormatError",
    "InfeasibleBudgetError",
    "InvalidArgumentError",
    "KernelError",
    "LQLoRAError",
    "MissingDependencyError",
    "MixedArraysError",
    "NonFiniteError",
    "ScaleUnderflowWarning",
    "SolverError",
    "StoreError",
    "UnsupportedArrayError",
]


class LQLoRAError(Exception):
    """Base class of every error raised by lqlora."""


class InvalidArgumentError(LQLoRAError, ValueError):
    """An argument has a value the operation is not defined for."""


class FormatError(InvalidArgumentError):
    """A block format, or the text that should spell one, is not valid."""


class NonFiniteError(LQLoRAError, ValueError):
    """An array holds NaN or infinity where finite numbers are needed."""


class ScaleUnderflowWarning(UserWarning):
    """Blocks that are not zero decode to zeros, because the format cannot tell their scale from zero."""


class UnsupportedArrayError(LQLoRAError, TypeError):
    """An argument is not an array, or has a dtype the operation does not take."""


class MixedArraysError(LQLoRAError, TypeError):
    """Arrays of two libraries (or two devices) met in one call."""


class MissingDependencyError(LQLoRAError, ImportError):
    """An optional package is needed and not installed."""


class SolverError(LQLoRAError, RuntimeError):
    """A solver failed, or returned something its own constraints contradict."""


class CheckpointError(LQLoRAError, OSError):
    """A checkpoint is truncated, inconsistent, or cannot be written."""


class StoreError(LQLoRAError, OSError):
    """A store of costs is corrupt, in use, or of other work."""


class KernelError(LQLoRAError, RuntimeError):
    """A CUDA kernel could not be compiled for the device at hand."""


class ConformanceError(LQLoRAError, AssertionError):
    """A quantizer or a solver broke a promise that a test asked of it."""


class InfeasibleBudgetError(LQLoRAError, ValueError):
    """No assignment of formats fits a budget or a limit.

    Parameters
    ----------
    message : str
        Which limit cannot be met, what range is feasible, and what to do.
    asked, minimum, maximum : Fraction
        The limit asked for, and what the smallest and the largest assignment take, in bits per weight of the matrices
        that the limit is for; of a limit of the error, the least and the greatest sum of costs.
    """

    def __init__(self, message: str, *, asked: Fraction, minimum: Fraction, maximum: Fraction) -> None:
        super().__init__(message)
        self.asked = asked
        self.minimum = minimum
        self.maximum = maximum
