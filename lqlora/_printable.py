"""Text for terminals: control characters, format characters and lone surrogates as escapes."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, *, keep: str = "") -> str:
    r"""Return a text with an escape, such as ``\x1b``, for each character that cannot be printed.

    Names in files of others may hold characters that move the cursor, end a line or reverse the direction of writing.
    Use this function wherever such a name becomes part of a message. It does not escape backslashes, so a second call
    changes nothing.

    Parameters
    ----------
    text : str
        Any text.
    keep : str, default ""
        Characters that stay, such as a line break in texts of several lines.

    Returns
    -------
    str
        Text for which ``str.isprintable`` is true, apart from the characters in ``keep``.

    Examples
    --------
    >>> print(printable("layers.\x1b[2J0\u202e"))
    layers.\x1b[2J0\u202e
    """
    # isprintable is false for the Unicode categories "Other" (controls, formats with the marks of direction, surrogates)
    # and "Separator", except for the space.
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
