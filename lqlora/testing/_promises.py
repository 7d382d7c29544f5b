"""What a property is, whoever it is asked of."""

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
    """A promise, the inputs it is tried on, and what has to be known of the subject."""

    name: str
    statement: str
    check: Check
    inputs: Callable[[S], SearchStrategy[dict[str, Any]]]
    needs: tuple[str, ...]

    def missing(self, subject: S) -> str:
        """Return why the property does not apply, or nothing."""
        known = {name: getattr(subject, name) for name in self.needs}
        absent = [name for name, value in known.items() if value is None or value is False]
        return f"needs {' and '.join(absent)}" if absent else ""


def promises(registry: dict[str, Property[S]]) -> Callable[..., Callable[[Check], Check]]:
    """Return a decorator that adds a function to the registry: its docstring is the promise."""

    def _promise(inputs: Callable[[S], SearchStrategy[dict[str, Any]]], *needs: str) -> Callable[[Check], Check]:
        def _register(check: Check) -> Check:
            registry[check.__name__] = Property(check.__name__, str(check.__doc__), check, inputs, needs)
            return check

        return _register

    return _promise
