"""The library under test, the implementations of its operations, and the expected bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy as np

from lqlora import ops
from lqlora._dispatch import Operation, array_library, forced
from lqlora.errors import UnsupportedArrayError
from lqlora.testing._verdicts import NotApplicableError, RefusedError, ViolationError, named
from lqlora.testing.backends._cases import DTYPES, Blocks
from lqlora.testing.quantizers._subject import on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from lqlora._typing import Array, Namespace
    from lqlora.testing.backends._cases import Product

__all__ = ["BackendSubject", "Call", "operations"]

#: Arguments that are read-only NumPy arrays for every library.
_TABLES = ("levels", "boundaries")


def operations() -> dict[str, Operation[Any, Any]]:
    """Return the operations of :mod:`lqlora.ops`, by name."""
    known = {name: getattr(ops, name) for name in ops.__all__}
    return {name: operation for name, operation in known.items() if isinstance(operation, Operation)}


class Call(NamedTuple):
    """An implementation with the flat arguments of a call."""

    name: str
    operation: Operation[Any, Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def arrays(self, *, written: bool = False) -> dict[str, int]:
        """Return the positions of the array arguments by name; those of ``out`` only if ``written``."""
        names = self.operation.arguments.flat
        own = {name: i for i, name in enumerate(names) if name not in _TABLES and array_library(self.arguments[i])}
        return own if written else {name: i for name, i in own.items() if name != "out"}

    def run(self) -> list[Any]:
        """Return the results as a list of arrays."""
        try:
            result = self.function(*self.operation.arguments.unflatten(self.arguments))
        except Exception as error:
            raise RefusedError(f"{self.name} raised {named(error)}") from error
        return list(result) if isinstance(result, tuple) else [result]


@dataclass(frozen=True)
class BackendSubject:
    """A namespace, a device, and the operations to check."""

    xp: Namespace
    library: str
    device: object
    names: tuple[str, ...]

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Floating-point dtypes that the library has."""
        return tuple(name for name in DTYPES if self._has(name))

    def _has(self, name: str) -> bool:
        try:
            self.put(np.zeros(1, dtype=DTYPES[name]))
        except UnsupportedArrayError:
            return False
        return True

    def put(self, array: npt.NDArray[Any]) -> Array:
        """Copy a NumPy array to the library."""
        return ops.convert(np.array(array), self.xp, self.device)

    def of(self, case: Blocks | Product) -> list[str]:
        """Return the operations to check whose examples are made from a problem of this kind."""
        of_blocks = isinstance(case, Blocks)
        known = operations().items()
        return self.asked(*(name for name, operation in known if (operation.examples is not None) is of_blocks))

    def asked(self, *names: str) -> list[str]:
        """Return the given operations that are to be checked; the property does not apply if there are none."""
        found = [name for name in names if name in self.names]
        if not found:
            raise NotApplicableError(f"checks only {', '.join(names)}")
        return found

    def calls(self, case: Blocks | Product) -> Iterator[Call]:
        """Yield a call of every implementation of every operation that takes the arguments of a case."""
        for name in self.of(case):
            yield from self.calls_of(name, case.arguments(name))

    def calls_of(
        self, name: str, arguments: tuple[Any, ...], lay: Callable[[Array], Array] | None = None
    ) -> Iterator[Call]:
        """Yield a call of every override that takes the arguments, or of the reference if none does."""
        operation = operations()[name]
        # Each call gets its own copies: an override that writes to an argument must not spoil the next one.
        taken = self._given(operation, arguments, lay)
        overrides = [override for override in operation.overrides(self.library) if not override.fault(taken)]
        for override in overrides:
            yield Call(override.name, operation, override.function, self._given(operation, arguments, lay))
        if not overrides:
            yield Call(f"the reference of {name}", operation, operation, taken)

    def _given(
        self, operation: Operation[Any, Any], arguments: tuple[Any, ...], lay: Callable[[Array], Array] | None
    ) -> tuple[Any, ...]:
        names = operation.arguments.flat
        given = tuple(
            value
            if name in _TABLES or not isinstance(value, np.ndarray)
            else (lay or _as_it_is)(self.put(value))
            for name, value in zip(names, arguments, strict=True)
        )  # fmt: skip
        return operation.arguments.flatten(operation.arguments.unflatten(given))  # with a record of the new arrays

    def expect_reference(self, case: Blocks | Product) -> None:
        """Raise unless every implementation returns the bytes of the reference on NumPy."""
        for name in self.of(case):
            self.expect_right(name, case.arguments(name))

    def expect_right(self, name: str, arguments: tuple[Any, ...], lay: Callable[[Array], Array] | None = None) -> None:
        """Raise unless every implementation of an operation returns the bytes of the reference on NumPy."""
        expected = right(name, arguments)
        for call in self.calls_of(name, arguments, lay):
            self.expect(call, call.run(), expected)

    def expect(self, call: Call, found: list[Any], expected: list[npt.NDArray[Any]]) -> None:
        """Raise unless the results are arrays of the library, on the device, with the expected bytes."""
        first = call.arguments[0]
        for result, right_one in zip(found, expected, strict=True):
            if array_library(result) != array_library(first):
                raise ViolationError(f"{call.name} returned a {type(result).__name__}")
            if array_api_compat.device(result) != array_api_compat.device(first):
                raise ViolationError(f"{call.name} returned an array on {array_api_compat.device(result)}")
            expect_bytes(call.name, on_host(result), right_one)


def _as_it_is(array: Array) -> Array:
    return array


def right(name: str, arguments: tuple[Any, ...]) -> list[npt.NDArray[Any]]:
    """Return the results of the reference on copies of NumPy arrays."""
    copies = [np.array(value) if isinstance(value, np.ndarray) else value for value in arguments]
    with forced("reference"), np.errstate(all="ignore"):
        operation = operations()[name]
        result = operation.reference(*operation.arguments.unflatten(tuple(copies)))
    return list(result) if isinstance(result, tuple) else [result]


def expect_bytes(who: str, found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Raise unless two arrays have the same dtype, shape and bytes. All NaN are equal here."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        got, wanted = f"{found.dtype} of shape {found.shape}", f"{expected.dtype} of shape {expected.shape}"
        raise ViolationError(f"{who} returned {got} where the reference returns {wanted}")
    if found.tobytes() == expected.tobytes():
        return
    size = found.dtype.itemsize
    differ = (
        (found.reshape(-1, 1).view(np.uint8) != expected.reshape(-1, 1).view(np.uint8)).reshape(-1, size).any(axis=1)
    )
    # NaN is the only value that differs from itself. Its payload is not part of the promise.
    differ &= ~((found != found) & (expected != expected)).reshape(-1)  # noqa: PLR0124 - NaN
    if differ.any():
        i = int(differ.argmax())
        pair = f"{found.reshape(-1)[i]} at {i} where the reference has {expected.reshape(-1)[i]}"
        raise ViolationError(f"{who} returned {pair} ({int(differ.sum())} of {found.size} differ)")
