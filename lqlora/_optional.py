"""Imports of optional packages: whether one is installed, and an error with the pip command if it is not."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from lqlora.errors import MissingDependencyError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["is_installed", "require"]


def is_installed(module: str) -> bool:
    """Return whether a module is installed, without importing it. Parent packages of a dotted name are imported.

    Parameters
    ----------
    module : str
        Dotted name of the module.

    Returns
    -------
    bool
        True if the import system finds it.

    Examples
    --------
    >>> is_installed("numpy"), is_installed("no_such_package")
    (True, False)
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package of a dotted name is missing
        return False


def require(module: str, extra: str, needed_by: str) -> ModuleType:
    """Import a module of an optional package.

    Parameters
    ----------
    module : str
        Dotted name of the module to import.
    extra : str
        Extra of lqlora that installs the package. A value with a space in it is a whole pip command.
    needed_by : str
        Subject of the error: the function or feature that needs the package.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    MissingDependencyError
        If the package is not installed. A package that is installed but broken raises its own error.
    """
    # The package is looked for first, and its import is not wrapped in `except ImportError`: an installed package that
    # fails to import has its own message, and another pip command would not help.
    if not is_installed(module):
        command = extra if " " in extra else f"pip install 'lqlora[{extra}]'"
        message = f"{needed_by} needs {module.partition('.')[0]}: {command}."
        raise MissingDependencyError(message)
    return importlib.import_module(module)
