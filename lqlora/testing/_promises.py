"""Properties of a conformance suite: a statement, its check and its inputs, collected in a registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

    Check = Callable[..., None]

__all__ = ["Property", "promises"]

S = TypeVar("S")


@dataclass(frozen=True)
class Property(Generic[S]):
    """A property: its statement, its check, a strategy for its inputs, and the options it needs.

    It applies to a subject if each attribute named in ``needs`` is neither None nor False.
    """

    name: str
    statement: str
    check: Check
    inputs: Callable[[S], SearchStrategy[dict[str, Any]]]
    needs: tuple[str, ...]

    def missing(self, subject: S) -> str:
        """Return the reason why the property does not apply, or an empty string."""
        known = {name: getattr(subject, name) for name in self.needs}
        absent = [name for name, value in known.items() if value is None or value is False]
        return f"needs {' and '.join(absent)}" if absent else ""


def promises(registry: dict[str, Property[S]]) -> Callable[..., Callable[[Check], Check]]:
    """Return a decorator that adds a check to the registry. The docstring of the check is the statement in reports."""

    def _promise(inputs: Callable[[S], SearchStrategy[dict[str, Any]]], *needs: str) -> Callable[[Check], Check]:
        def _register(check: Check) -> Check:
            registry[check.__name__] = Property(check.__name__, str(check.__doc__), check, inputs, needs)
            return check

        return _register

    return _promise
