"""Text for messages about values of users and files: short, printable, and on one line."""

from __future__ import annotations

import itertools
import reprlib
from typing import TYPE_CHECKING

from lqlora._printable import printable

if TYPE_CHECKING:
    import os

__all__ = ["MESSAGE_LENGTH", "about_file", "given", "shortened", "shown"]

#: Largest number of characters of a message about a file.
MESSAGE_LENGTH = 400


class _Short(reprlib.Repr):
    """Texts of values that bound the entries, the levels, and the digits of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist, self.maxdict, self.maxlevel = 4, 3, 3

    def repr_int(self, value: int, level: int) -> str:  # noqa: ARG002 - called by reprlib
        # Python refuses to write integers of more than 4300 digits. A bit is log10(2) digits.
        return (
            repr(value) if value.bit_length() < 200 else f"an integer of {int(value.bit_length() * 0.30103) + 1} digits"
        )

    def repr_dict(self, value: dict[object, object], level: int) -> str:
        # The first keys in their order, where reprlib would sort all.
        if level <= 0:
            return "{...}"
        first = itertools.islice(value.items(), self.maxdict)
        parts = [f"{self.repr1(key, level - 1)}: {self.repr1(own, level - 1)}" for key, own in first]
        return "{" + ", ".join([*parts, "..."] if len(value) > self.maxdict else parts) + "}"


class _ShortJson(_Short):
    """Texts with the words of JSON, which readers of a file see."""

    def repr_bool(self, value: object, level: int) -> str:  # noqa: ARG002 - called by reprlib
        return {None: "null", True: "true", False: "false"}[value]  # type: ignore[index]

    repr_NoneType = repr_bool


_SHORT, _SHORT_JSON = _Short(), _ShortJson()


def given(value: object, length: int = 80) -> str:
    r"""Return an argument of a caller as printable text of bounded length.

    Parameters
    ----------
    value : object
        Any object.
    length : int, default 80
        Largest number of characters.

    Returns
    -------
    str
        Python's text of the object. What is left out is marked by ``…``.

    Examples
    --------
    >>> print(given("a\x1b[2J"), given(None), given(10**5000))
    'a\x1b[2J' None an integer of 5001 digits
    """
    return _text(value, length, _SHORT)


def shown(value: object, length: int = 80) -> str:
    r"""Return a value as printable text of bounded length.

    Parameters
    ----------
    value : object
        A value of JSON, or any other.
    length : int, default 80
        Largest number of characters.

    Returns
    -------
    str
        Python's text of the value, or the word of JSON for None, True and False. What is left out is marked by ``…``.

    Examples
    --------
    >>> print(shown("a\x1b[2J"), shown(None), shown([1, 2, 3, 4, 5]), shown(10**5000))
    'a\x1b[2J' null [1, 2, 3, 4, ...] an integer of 5001 digits
    """
    return _text(value, length, _SHORT_JSON)


def _text(value: object, length: int, short: reprlib.Repr) -> str:
    if isinstance(value, str):
        return _cut(printable(repr(value[: length + 1])), length)
    return _cut(printable(short.repr(value)), length)


def shortened(message: str, length: int = MESSAGE_LENGTH) -> str:
    """Return a text that is printable and not too long: the middle of a long one is left out.

    Parameters
    ----------
    message : str
        A message or name that may contain texts of files.
    length : int
        Largest number of characters.

    Returns
    -------
    str
        Printable text. The beginning of a message names the file, and its end says the value.

    Examples
    --------
    >>> len(shortened("a" * 1000)), shortened("short")
    (400, 'short')
    """
    message = printable(message)
    if len(message) <= length:
        return message
    end = length // 2
    return f"{message[: length - end - 1]}…{message[-end:]}"


def about_file(path: str | os.PathLike[str], problem: str) -> str:
    """Return the message of an error about a file, printable and of bounded length.

    Parameters
    ----------
    path : path-like
        The file or folder. Of a long path the end is kept.
    problem : str
        Predicate of the sentence, such as ``"is not a GGUF file."``.

    Returns
    -------
    str
        The sentence.

    Examples
    --------
    >>> about_file("model.gguf", "is not a GGUF file.")
    'model.gguf is not a GGUF file.'
    """
    name = str(path)
    return shortened(f"{name if len(name) <= 150 else f'…{name[-149:]}'} {problem}")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
