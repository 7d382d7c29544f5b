"""Registry of solvers: registered by name, found by name, with checks for installation and license."""

from __future__ import annotations

from typing import cast

from lqlora._messages import given
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError
from lqlora.solvers.adapter import Adapter, License
from lqlora.solvers.mckp import solver as mckp
from lqlora.solvers.vendors import cbc, gurobi, highs, ortools, scip, scipy_milp

__all__ = ["ADAPTERS", "FINISHERS", "available", "check_license", "find", "finisher", "register"]

#: Adapters by name, in order of preference.
ADAPTERS: dict[str, Adapter] = {
    "mckp": cast("Adapter", mckp),
    "highs": cast("Adapter", highs),
    "scipy": cast("Adapter", scipy_milp),
    "cbc": cast("Adapter", cbc),
    "scip": cast("Adapter", scip),
    "gurobi": cast("Adapter", gurobi),
    "ortools": cast("Adapter", ortools),
}

#: Exact free solvers that close the gap that ``mckp`` leaves, fastest first. Those problems are small and hard.
FINISHERS = ("cbc", "highs", "scip", "scipy")


def register(name: str, adapter: Adapter) -> None:
    """Add a solver to the registry, or replace one.

    Parameters
    ----------
    name : str
        Name of the solver in :func:`solve`. ``"auto"`` is reserved.
    adapter : Adapter
        A module or object with ``REQUIRES``, ``version()`` and ``solve(reduced, options)``.

    Raises
    ------
    InvalidArgumentError
        If the name is ``"auto"`` or the adapter lacks an attribute.
    """
    if name == "auto":
        raise InvalidArgumentError("name must not be 'auto', which stands for the best installed solver.")
    missing = [part for part in ("REQUIRES", "version", "solve") if not hasattr(adapter, part)]
    if missing:
        raise InvalidArgumentError(
            f"adapter of solver {name!r} must have REQUIRES, version and solve, but lacks {missing}."
        )
    ADAPTERS[name] = adapter


def find(name: str) -> Adapter:
    """Return the adapter of a solver, installed or not.

    Parameters
    ----------
    name : str
        Name of a registered solver.

    Returns
    -------
    Adapter
        The adapter.

    Raises
    ------
    InvalidArgumentError
        If there is no solver of that name.
    """
    if not isinstance(name, str) or name not in ADAPTERS:
        raise InvalidArgumentError(f"solver must be 'auto' or one of {', '.join(ADAPTERS)}, got {given(name)}.")
    return ADAPTERS[name]


def available() -> dict[str, bool]:
    """Return whether each solver is installed, without importing it or checking its license.

    Returns
    -------
    dict of str to bool
        True for installed solvers, by name in order of preference.

    See Also
    --------
    check_license : Check the license of an installed solver.

    Examples
    --------
    >>> available()["scipy"]
    True
    """
    return {name: is_installed(adapter.REQUIRES) for name, adapter in ADAPTERS.items()}


def finisher() -> str | None:
    """Return the name of the solver that closes the gap that ``mckp`` leaves.

    Returns
    -------
    str or None
        The first of :data:`FINISHERS` that is installed; None if none is.
    """
    return next((name for name in FINISHERS if name in ADAPTERS and is_installed(ADAPTERS[name].REQUIRES)), None)


def check_license(name: str) -> License:
    """Check the license of a solver. This may import the solver and hold a license for a moment.

    Parameters
    ----------
    name : str
        Name of a registered solver.

    Returns
    -------
    License
        ``ok`` is False if the solver is not installed or its license is not valid. Free solvers are always ok.

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
