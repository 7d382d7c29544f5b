"""What an adapter is: a module-like object with three names, and the raw result it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions, StopReason

__all__ = ["Adapter", "License", "RawResult"]


class License(NamedTuple):
    """Whether an installed solver may be used.

    Parameters
    ----------
    ok : bool
        True if it may.
    message : str
        What the license allows, or what is wrong with it.
    """

    ok: bool
    message: str


class RawResult(NamedTuple):
    """What a solver says, before anything of it is believed.

    Parameters
    ----------
    x : ndarray of float64, shape (k,), or None
        Value of each variable of the reduced problem; None if the solver holds no feasible point.
    bound : float
        Lower bound on ``cost @ x + constant / unit`` of the reduced problem; minus infinity if there is none.
    message : str
        The solver's own word for why it stopped.
    stopped : StopReason
        The same, in the words of this library.
    """

    x: npt.NDArray[np.float64] | None
    bound: float
    message: str
    stopped: StopReason


class Adapter(Protocol):
    """One solver. The vendor's package is imported inside the methods, never at module level.

    An adapter whose solver needs a license also has a method ``check_license()`` that returns a :class:`License`;
    a solver without it is free.
    """

    #: Name of the package that must be installed.
    REQUIRES: str

    def version(self) -> str:
        """Return the version of the installed solver.

        Returns
        -------
        str
            Such as ``"1.11.0"``.
        """

    def solve(self, reduced: Reduced, options: SolveOptions) -> RawResult:
        """Solve a reduced problem within the limits.

        Parameters
        ----------
        reduced : Reduced
            The problem; ``reduced.start`` is a feasible point to start from, if there is one.
        options : SolveOptions
            The limits. ``options.start`` is for the library, not for adapters.

        Returns
        -------
        RawResult
            What the solver says.

        Raises
        ------
        SolverError
            If it fails. To be stopped by a limit, that of a license too, is no failure.
        """
