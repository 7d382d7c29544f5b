"""Operations: a reference implementation, its overrides, and the choice between them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeAlias, TypeVar

from lqlora._dispatch.libraries import LIBRARY_OF, device_of, known_libraries, namespace
from lqlora._dispatch.overrides import Override
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora._dispatch.overrides import Takes
    from lqlora._typing import Array

    Maker: TypeAlias = Callable[[tuple[int, ...], Any, Array], Array | None]

__all__ = ["Operation", "Selection", "empty", "forced", "op", "prefer_maker", "prefer_pieces", "preferred_piece"]

P = ParamSpec("P")
R = TypeVar("R")

#: What forced() knows, and the backend that it passes over: None for all.
_FORCED: dict[str, str | None] = {"reference": None, "numpy": "native"}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("lqlora_forced", default=None)


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Pass over faster implementations inside the ``with`` block.

    Parameters
    ----------
    implementation : {"reference", "numpy"}
        "reference": every operation runs its reference, whatever overrides exist. "numpy": no compiled kernel of the
        CPU runs; other overrides do.

    Yields
    ------
    None
        The choice holds for the current context (thread or task) until the block ends.

    Raises
    ------
    InvalidArgumentError
        If another name is asked for.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 100, dtype=np.float32)
    >>> with lq.forced("reference"):
    ...     slow = lq.quantize(w, lq.BlockFormat(lq.NF4))
    >>> bool((slow.packed == lq.quantize(w, lq.BlockFormat(lq.NF4)).packed).all())
    True
    """
    if implementation not in _FORCED:
        raise InvalidArgumentError(f"forced() knows 'reference' and 'numpy', not {implementation!r}.")
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Selection:
    """Which implementation a call would run, and why.

    Parameters
    ----------
    operation : str
        Name of the operation.
    implementation : str
        ``"reference"`` or the name of the override.
    reason : str
        One sentence.
    """

    operation: str
    implementation: str
    reason: str


#: Entries that overrides for a library would rather be given at a time.
_PIECES: dict[str, int] = {}


def prefer_pieces(library: str, entries: int) -> None:
    """Let callers know that overrides for a library take this many entries at a time without a workspace.

    Parameters
    ----------
    library : str
        Name of the library.
    entries : int
        A multiple of eight.
    """
    _PIECES[library] = entries


def preferred_piece(array: object) -> int | None:
    """Return how many entries overrides for an array would rather be given at a time.

    Parameters
    ----------
    array : object
        Any array.

    Returns
    -------
    int or None
        None if nobody said so, or :func:`forced` passes faster implementations over.
    """
    library = LIBRARY_OF[type(array)]
    known = known_libraries().get(library or "")
    if known is None or _forced.get() is not None:
        return None
    known.load()
    return _PIECES.get(known.name)


#: What makes arrays of a library faster than the library does.
_MAKERS: dict[str, Maker] = {}


def prefer_maker(library: str, maker: Maker) -> None:
    """Let arrays for results be made by something faster than their library.

    Parameters
    ----------
    library : str
        Name of the library.
    maker : callable
        From a shape, a dtype of the library and an array to an array of any contents beside that one; None to decline.
    """
    _MAKERS[library] = maker


def empty(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Return an array for results, of any contents.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : dtype
        As the library of ``like`` has it.
    like : array
        An array of the library, on the device where it is wanted.

    Returns
    -------
    array
        The caller's alone.
    """
    library = LIBRARY_OF[type(like)]
    known = known_libraries().get(library or "")
    if known is not None and _forced.get() is None:
        known.load()
        if known.name in _MAKERS and (made := _MAKERS[known.name](shape, dtype, like)) is not None:
            return made
    return namespace(like).empty(shape, dtype=dtype, device=device_of(like))


class Operation(Generic[P, R]):
    """A reference implementation together with its registered overrides.

    Parameters
    ----------
    reference : callable
        Array API implementation; its first argument is the array that decides the library.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.__signature__ = self._signature = inspect.signature(reference)
        self._names = tuple(self._signature.parameters)
        self._overrides: dict[str, dict[str, Override]] = {}
        self._ready: dict[str | None, tuple[Override, ...]] = {}

    @property
    def name(self) -> str:
        """Name of the operation, as in messages."""
        return self.reference.__name__

    def register(
        self, library: str, *, takes: Takes, backend: str | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Return a decorator that adds an override for one library.

        Overrides are tried in the order in which they are registered. Registering an override of the same backend and
        function name again replaces the earlier one.

        Parameters
        ----------
        library : str
            Library whose arrays the override takes: ``"numpy"``, ``"torch"``, ``"cupy"``, or one that was registered.
        takes : Takes
            The calls that it takes.
        backend : str, optional
            What the override runs on, such as ``"native"``; the first part of its name, and what :func:`forced` knows.
            The name of the library by default.

        Returns
        -------
        callable
            The decorator; it returns the function unchanged.

        Raises
        ------
        InvalidArgumentError
            If an argument that is declared is none of the operation.
        """

        def add(function: Callable[P, R]) -> Callable[P, R]:
            name = f"{backend or library}.{function.__name__}"
            override = Override(name, library, function, takes, self._signature)
            self._overrides.setdefault(library, {})[name] = override
            self._ready.pop(library, None)
            return function

        return add

    def overrides(self, library: str | None) -> tuple[Override, ...]:
        """Return the overrides for a library, in the order in which they are tried.

        Parameters
        ----------
        library : str or None
            Name of the library. The modules that register its overrides are imported.

        Returns
        -------
        tuple of Override
            None for a library that nobody registered.
        """
        known = known_libraries().get(library or "")
        if known is not None:
            known.load()
        self._ready[library] = ready = tuple(self._overrides.get(library or "", {}).values())
        return ready

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return all arguments by position, defaults too: records of overrides look at positions."""
        rest = self._names[len(args) :]
        if len(rest) == len(kwargs) and all(name in kwargs for name in rest):
            return (*args, *(kwargs[name] for name in rest))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def _candidates(self, args: tuple[Any, ...]) -> tuple[Override, ...]:
        library = LIBRARY_OF[type(args[0])]
        ready = self._ready.get(library)
        return self.overrides(library) if ready is None else ready

    def _choice(self, args: tuple[Any, ...]) -> Override | None:
        word = _forced.get()
        if word == "reference":
            return None
        for override in self._candidates(args):
            if word is not None and override.backend == _FORCED[word]:
                continue
            if not override.fault(args):
                return override
        return None

    def select(self, *args: P.args, **kwargs: P.kwargs) -> Selection:
        """Tell which implementation a call with these arguments would run, without running it.

        Parameters
        ----------
        *args, **kwargs
            The arguments of the call.

        Returns
        -------
        Selection
            The choice and its reason.
        """
        positional = self._positional(args, kwargs)
        override = self._choice(positional)
        if override is not None:
            return Selection(self.name, override.name, f"{override.name} takes these {override.library} arguments.")
        return Selection(self.name, "reference", self._why_reference(positional))

    def _why_reference(self, args: tuple[Any, ...]) -> str:
        word = _forced.get()
        if word == "reference":
            return "forced('reference') is active."
        passed_over = f"is passed over by forced({word!r})"
        reasons = [
            f"{override.name} {passed_over}"
            if word is not None and override.backend == _FORCED[word]
            else f"{override.name} declined: {override.fault(args)}"
            for override in self._candidates(args)
        ]
        return f"{'; '.join(reasons)}." if reasons else f"{LIBRARY_OF[type(args[0])]}: no override is registered."

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the operation by the implementation that :meth:`select` names."""
        positional = args if len(args) == len(self._names) and not kwargs else self._positional(args, kwargs)
        override = self._choice(positional)
        implementation: Callable[..., R] = self.reference if override is None else override.function
        return implementation(*positional)


def op(reference: Callable[P, R]) -> Operation[P, R]:
    """Turn an array API function into an :class:`Operation` that backends can override.

    Parameters
    ----------
    reference : callable
        The implementation that runs everywhere.

    Returns
    -------
    Operation
        Callable exactly like ``reference``.
    """
    return Operation(reference)
