"""Exception classes of the library, with :class:`LQLoRAError` as their base, and its warnings.

A message begins with the parameter or file it is about, and says the value seen, what is allowed, and what to do. Each
class also inherits from the built-in exception that fits, so ``except ValueError`` catches bad arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._printable import printable

if TYPE_CHECKING:
    from fractions import Fraction

__all__ = [
    "CheckpointError",
    "ConformanceError",
    "DeadLayerWarning",
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
    """Base class of all exceptions of lqlora.

    Names from files may be part of a message. As text it holds escapes for the characters of them that cannot be printed.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


class InvalidArgumentError(LQLoRAError, ValueError):
    """An argument has a value for which the operation is not defined."""


class FormatError(InvalidArgumentError):
    """A block format, its spelling, or an array that is stored in it is not valid."""


class NonFiniteError(LQLoRAError, ValueError):
    """An array or a loss holds NaN or infinity where finite numbers are needed."""


class ScaleUnderflowWarning(UserWarning):
    """Blocks with nonzero weights decode to zeros, because the format rounds their scale to zero."""


class DeadLayerWarning(UserWarning):
    """Selected layers saw no rows, or got no gradients, in any batch, so that a collector of statistics leaves them out."""


class UnsupportedArrayError(LQLoRAError, TypeError):
    """An argument is not an array, or has a dtype that the operation does not support."""


class MixedArraysError(LQLoRAError, TypeError):
    """Arrays of two libraries, or on two devices, were passed to one call."""


class MissingDependencyError(LQLoRAError, ImportError):
    """An optional package is needed but not installed."""


class SolverError(LQLoRAError, RuntimeError):
    """A solver failed, or returned a solution that violates its constraints."""


class CheckpointError(LQLoRAError, OSError):
    """A file is truncated or inconsistent, does not fit a model, or cannot be written."""


class StoreError(LQLoRAError, OSError):
    """A store of costs is corrupt, in use by another process, or was made with other settings."""


class KernelError(LQLoRAError, RuntimeError):
    """A CUDA kernel could not be compiled for the present device."""


class ConformanceError(LQLoRAError, AssertionError):
    """A quantizer, solver or backend does not have a property that a suite of ``lqlora.testing`` checks."""


class InfeasibleBudgetError(LQLoRAError, ValueError):
    """No assignment of formats satisfies a budget or a limit.

    Parameters
    ----------
    message : str
        Constraint that cannot be satisfied, its feasible range, and what to do.
    asked, minimum, maximum : Fraction
        Requested limit, and the values of the smallest and the largest assignment. Limits of storage are in bits per
        weight of the matrices they apply to. Limits of the error are sums of costs.
    """

    def __init__(self, message: str, *, asked: Fraction, minimum: Fraction, maximum: Fraction) -> None:
        super().__init__(message)
        self.asked = asked
        self.minimum = minimum
        self.maximum = maximum
