"""Exceptions that a check raises: a violation, a refusal, a failed adapter, or a property that does not apply."""

from __future__ import annotations

__all__ = ["AdapterError", "NotApplicableError", "RefusedError", "ViolationError", "named"]


class ViolationError(Exception):
    """The subject violated the property."""


class RefusedError(Exception):
    """The subject raised an exception."""


class AdapterError(Exception):
    """The caller's ``adapt`` raised, so the quantizer could not be checked."""


class NotApplicableError(Exception):
    """The property does not apply to this subject."""


def named(error: Exception) -> str:
    """Return class and message of an exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
