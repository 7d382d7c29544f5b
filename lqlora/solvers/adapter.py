"""Interface of solver adapters: the protocol they follow, their raw result, and the state of a license."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions, StopReason

__all__ = ["Adapter", "License", "RawResult"]


class License(NamedTuple):
    """State of the license of an installed solver.

    Parameters
    ----------
    ok : bool
        True if the solver may be used.
    message : str
        Terms of the license, or the reason why it is not valid.
    """

    ok: bool
    message: str


class RawResult(NamedTuple):
    """Unchecked result of a solver.

    Parameters
    ----------
    x : ndarray of float64, shape (k,), or None
        Value of each variable of the reduced problem; None if the solver has no feasible point.
    bound : float
        Lower bound on ``cost @ x + offset`` of the reduced problem; minus infinity if there is none.
    message : str
        The solver's own status message.
    stopped : StopReason
        Reason why the solver stopped.
    """

    x: npt.NDArray[np.float64] | None
    bound: float
    message: str
    stopped: StopReason


class Adapter(Protocol):
    """Protocol of an adapter. Import the vendor's package inside the methods, never at module level.

    If the solver needs a license, add a method ``check_license()`` that returns a :class:`License`. A solver without
    this method counts as free.
    """

    #: Name of the package that must be installed.
    REQUIRES: str

    def version(self) -> str:
        """Return the version of the installed solver.

        Returns
        -------
        str
            Version, such as ``"1.11.0"``.
        """

    def solve(self, reduced: Reduced, options: SolveOptions) -> RawResult:
        """Solve a reduced problem within the limits.

        Parameters
        ----------
        reduced : Reduced
            The problem. ``reduced.start`` is a feasible point to start from, or None.
        options : SolveOptions
            Time limit, gap, seed and threads. Ignore ``options.start``: it refers to the original problem.

        Returns
        -------
        RawResult
            The unchecked result of the solver.

        Raises
        ------
        SolverError
            If the solver fails. Reaching a limit, also that of a license, is not a failure.
        """
