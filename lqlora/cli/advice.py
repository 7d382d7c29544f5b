"""Error messages in terms of command line options: ``max_iter must be ...`` becomes ``--iterations must be ...``."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lqlora.errors import LQLoRAError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["CommandError", "advise_options", "in_options"]

#: A keyword argument that a message tells Python users to pass, such as ``clip_rank=True`` or ``mode='exact'``.
_KEYWORD = re.compile(r"(?<![\w./-])([A-Za-z_]\w*)=('[^']*'|\([^()]*\)|\[[^][]*\]|True|False|None|[\d.]+)(?!\w)")


class CommandError(LQLoRAError):
    """An error of the library, in terms of the options of the command that caused it."""


@contextmanager
def advise_options(options: Mapping[str, str]) -> Iterator[None]:
    """Turn errors of the library into errors that name the options of a command.

    Parameters
    ----------
    options : mapping of str to str
        Command line option for each parameter of the library.

    Raises
    ------
    CommandError
        After any error of the library, with its message translated by :func:`in_options`.
    """
    try:
        yield
    except LQLoRAError as error:
        raise CommandError(in_options(str(error), options)) from error


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Replace names of Python parameters in a message by command line options.

    A parameter is replaced where it cannot be an ordinary word: at the beginning of the message, in ``name=value``, and
    anywhere if its name has an underscore. Sentences that advise a keyword argument without an option are left out.

    Parameters
    ----------
    message : str
        Message of an error.
    options : mapping of str to str
        Command line option for each parameter of the library.

    Returns
    -------
    str
        The message for users of the command line.

    Examples
    --------
    >>> options = {"rank": "--ranks", "max_iter": "--iterations", "force": "--force", "mode": "--mode"}
    >>> in_options("rank must be at most 16, got 17. Pass clip_rank=True to pad.", options)
    '--ranks must be at most 16, got 17.'
    >>> in_options("t.json exists. Pass another file, or force=True to replace it.", options)
    't.json exists. Pass another file, or --force to replace it.'
    >>> in_options("max_iter must be at least 1. A rank may be 0. Pass mode='exact'.", options)
    '--iterations must be at least 1. A rank may be 0. Pass --mode exact.'
    """
    first, *rest = re.split(r"(?<=[.!?]) (?=[A-Z])", message)
    sentences = [first, *(sentence for sentence in rest if _is_for_options(sentence, options))]
    message = _KEYWORD.sub(lambda found: _option(found, options), " ".join(sentences))
    # A name with an underscore cannot be an English word. Others, such as "rank" or "force", can: they are replaced at the
    # beginning only. An option begins with a dash, so no later turn of the loop changes what an earlier one has put in.
    for name, option in options.items():
        pattern = rf"(?<![\w./'\"-]){name}(?![\w/'\"-]|\.\w)" if "_" in name else rf"\A{name}\b"
        message = re.sub(pattern, option, message)
    return message


def _is_for_options(sentence: str, options: Mapping[str, str]) -> bool:
    return all(found[1] in options for found in _KEYWORD.finditer(sentence))


def _option(found: re.Match[str], options: Mapping[str, str]) -> str:
    name, value = found[1], found[2].strip("'")
    if name not in options:
        return found[0]
    return options[name] if value == "True" else f"{options[name]} {value}"
