"""What an adapter is: a module-like object with three names, and the raw result it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["Adapter", "RawResult"]


class RawResult(NamedTuple):
    """What a solver says, before anything of it is believed.

    Parameters
    ----------
    x : ndarray of float64, shape (k,), or None
        Value of each variable of the reduced problem; None if the solver holds no feasible point.
    bound : float
        Lower bound on ``cost @ x + constant / unit`` of the reduced problem.
    message : str
        The solver's own word for why it stopped.
    infeasible : bool
        True if the solver proved that there is no feasible point.
    """

    x: npt.NDArray[np.float64] | None
    bound: float
    message: str
    infeasible: bool


class Adapter(Protocol):
    """One solver. The vendor's package is imported inside the methods, never at module level."""

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
            The problem.
        options : SolveOptions
            The limits.

        Returns
        -------
        RawResult
            What the solver says.

        Raises
        ------
        SolverError
            If it fails.
        """
