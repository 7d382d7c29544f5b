"""How the try of a property may end, other than well."""

from __future__ import annotations

__all__ = ["AdapterError", "NotApplicableError", "RefusedError", "ViolationError", "named"]


class ViolationError(Exception):
    """The subject broke the promise."""


class RefusedError(Exception):
    """The subject raised."""


class AdapterError(Exception):
    """The caller's ``adapt`` raised: nothing can be said of the quantizer."""


class NotApplicableError(Exception):
    """The property cannot be tried on this subject."""


def named(error: Exception) -> str:
    """Return class and text of an exception, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
