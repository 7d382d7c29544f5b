"""The solvers by name: which exist, which are installed, and which of them may be used."""

from __future__ import annotations

from typing import cast

from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError
from lqlora.solvers.adapter import Adapter, License
from lqlora.solvers.mckp import solver as mckp
from lqlora.solvers.vendors import cbc, gurobi, highs, ortools, scip, scipy_milp

__all__ = ["ADAPTERS", "FINISHERS", "available", "check_license", "find", "finisher", "register"]

#: In order of preference.
ADAPTERS: dict[str, Adapter] = {
    "mckp": cast("Adapter", mckp),
    "highs": cast("Adapter", highs),
    "scipy": cast("Adapter", scipy_milp),
    "cbc": cast("Adapter", cbc),
    "scip": cast("Adapter", scip),
    "gurobi": cast("Adapter", gurobi),
    "ortools": cast("Adapter", ortools),
}

#: Who finishes what the native solver leaves, which is small and hard: exact solvers that are free, the fastest first.
FINISHERS = ("cbc", "highs", "scip", "scipy")


def register(name: str, adapter: Adapter) -> None:
    """Add a solver, or replace one.

    Parameters
    ----------
    name : str
        What :func:`solve` will call it; not ``"auto"``.
    adapter : Adapter
        A module or object with ``REQUIRES``, ``version()`` and ``solve(reduced, options)``.

    Raises
    ------
    InvalidArgumentError
        If the name is ``"auto"`` or the adapter lacks a part.
    """
    lacking = [part for part in ("REQUIRES", "version", "solve") if not hasattr(adapter, part)]
    if name == "auto" or lacking:
        raise InvalidArgumentError(f"Solver {name!r} cannot be registered: reserved name, or it lacks {lacking}.")
    ADAPTERS[name] = adapter


def find(name: str) -> Adapter:
    """Return the adapter of a solver.

    Parameters
    ----------
    name : str
        As registered.

    Returns
    -------
    Adapter
        Whether it is installed or not.

    Raises
    ------
    InvalidArgumentError
        If there is no solver of that name.
    """
    if name not in ADAPTERS:
        raise InvalidArgumentError(f"Unknown solver {name!r}: there are {', '.join(ADAPTERS)}.")
    return ADAPTERS[name]


def available() -> dict[str, bool]:
    """Tell which solvers are installed, without importing them and without asking for a license.

    Returns
    -------
    dict of str to bool
        By name, in order of preference.

    See Also
    --------
    check_license : Whether an installed solver may be used.

    Examples
    --------
    >>> available()["scipy"]
    True
    """
    return {name: is_installed(adapter.REQUIRES) for name, adapter in ADAPTERS.items()}


def finisher() -> str | None:
    """Name the solver that takes over from the native one.

    Returns
    -------
    str or None
        The first installed one of those that can; None if there is none.
    """
    installed = available()
    return next((name for name in FINISHERS if installed.get(name)), None)


def check_license(name: str) -> License:
    """Tell whether a solver may be used. This may import it, and may take a license for a moment.

    Parameters
    ----------
    name : str
        Name of a registered solver.

    Returns
    -------
    License
        Not ok if the solver is not installed. Free solvers are always licensed.

    Raises
    ------
    InvalidArgumentError
        If there is no solver of that name.

    Examples
    --------
    >>> check_license("scipy")
    License(ok=True, message='free')
    """
    adapter = find(name)
    if not is_installed(adapter.REQUIRES):
        return License(ok=False, message=f"{adapter.REQUIRES} is not installed")
    check = getattr(adapter, "check_license", None)
    return License(ok=True, message="free") if check is None else check()
