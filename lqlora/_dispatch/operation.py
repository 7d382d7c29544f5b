"""Operations: a reference implementation, its overrides, and the choice between them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeAlias, TypeVar, overload

from lqlora._annotations import annotated
from lqlora._dispatch.arguments import Arguments
from lqlora._dispatch.kinds import NUMBERS, fault_of
from lqlora._dispatch.libraries import (
    LIBRARY_OF,
    PASSED_OVER,
    PLAIN_LIBRARY_OF,
    device_of,
    load_overrides,
    namespace,
)
from lqlora._dispatch.misfits import FOREIGN, misfit
from lqlora._dispatch.overrides import Override
from lqlora.errors import InvalidArgumentError, UnsupportedArrayError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from lqlora._dispatch.examples import BlocksProblem, ProductProblem
    from lqlora._dispatch.overrides import Takes
    from lqlora._typing import Array

    Maker: TypeAlias = Callable[[tuple[int, ...], Any, Array], Array]

__all__ = [
    "Operation",
    "Selection",
    "empty",
    "forced",
    "op",
    "passes_over",
    "prefer_maker",
    "prefer_pieces",
    "preferred_piece",
]

P = ParamSpec("P")
R = TypeVar("R")

#: Backends whose overrides are passed over; None passes over all overrides. It is a context variable and not a global:
#: a block in one thread or asyncio task does not change the calls of others.
_NOTHING: frozenset[str] = frozenset()
_passed_over: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar(
    "lqlora_passed_over", default=_NOTHING
)


@contextlib.contextmanager
@annotated
def forced(implementation: str | None = None, *, without: str | Collection[str] = ()) -> Iterator[None]:
    """Pass over faster implementations inside the ``with`` block.

    Parameters
    ----------
    implementation : {"reference", "numpy"}, optional
        "reference": every operation runs its reference, whatever overrides exist. "numpy": no compiled kernel of the
        CPU runs, as with ``without="native"``.
    without : str or collection of str
        Backends whose overrides do not run, such as ``"native"`` or ``"cuda"``: the first parts of the names that
        :func:`lqlora.backends.capabilities` lists. Backends that are not installed may be named too.

    Yields
    ------
    None
        The choice holds for the current context (thread or task) until the block ends.

    Raises
    ------
    InvalidArgumentError
        If ``implementation`` is neither of the two.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 100, dtype=np.float32)
    >>> with lq.forced("reference"):
    ...     slow = lq.quantize(w, lq.BlockFormat(lq.NF4))
    >>> bool((slow.packed == lq.quantize(w, lq.BlockFormat(lq.NF4)).packed).all())
    True
    """
    names = frozenset((without,) if isinstance(without, str) else without)
    if implementation is not None and implementation != "reference" and implementation not in PASSED_OVER:
        known = " or ".join(map(repr, ("reference", *PASSED_OVER)))
        raise InvalidArgumentError(
            f"implementation must be {known}, got {implementation!r}. Pass without='native' to pass over one backend."
        )
    if implementation == "reference":
        token = _passed_over.set(None)
    else:
        token = _passed_over.set(names | PASSED_OVER.get(implementation or "", frozenset()))
    try:
        yield
    finally:
        _passed_over.reset(token)


def passes_over(backend: str) -> bool:
    """Return whether :func:`forced` passes over a backend in this context.

    Parameters
    ----------
    backend : str
        Name of the backend, such as ``"native"``.

    Returns
    -------
    bool
        True in a block that runs references only, too.
    """
    passed_over = _passed_over.get()
    return passed_over is None or backend in passed_over


@dataclass(frozen=True)
class Selection:
    """The implementation that a call would run, and the reason.

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


#: Number of entries that overrides for a library prefer to be given at a time.
_PIECES: dict[str, int] = {}


def prefer_pieces(library: str, entries: int) -> None:
    """Declare the number of entries that overrides for a library take at a time without a workspace.

    Parameters
    ----------
    library : str
        Name of the library.
    entries : int
        A multiple of eight.
    """
    _PIECES[library] = entries


def preferred_piece(array: object) -> int | None:
    """Return the number of entries that overrides for an array prefer at a time.

    Parameters
    ----------
    array : object
        Any array.

    Returns
    -------
    int or None
        None if no preference is declared, or :func:`forced` passes over faster implementations.
    """
    if _passed_over.get() != _NOTHING:
        return None
    library = LIBRARY_OF[type(array)]
    load_overrides(library)
    return _PIECES.get(library or "")


#: Functions that make arrays for results faster than the libraries do.
_MAKERS: dict[str, Maker] = {}


def prefer_maker(library: str, maker: Maker) -> None:
    """Declare a function that makes arrays for results faster than their library does.

    Parameters
    ----------
    library : str
        Name of the library.
    maker : callable
        Takes a shape, a dtype of the library and an array; returns an array of any contents on the device of that one.
    """
    _MAKERS[library] = maker


def empty(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Return an array for results, of any contents.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : dtype
        A dtype of the library of ``like``.
    like : array
        An array of the library, on the device of the result.

    Returns
    -------
    array
        An array that shares no memory with any other.
    """
    library = LIBRARY_OF[type(like)]
    if _passed_over.get() == _NOTHING:
        load_overrides(library)
        maker = _MAKERS.get(library or "")
        if maker is not None:
            return maker(shape, dtype, like)
    return namespace(like).empty(shape, dtype=dtype, device=device_of(like))


#: Arguments that are NumPy arrays for every library, and in the memory of the host.
_TABLES = ("levels", "boundaries")


def _require_table(table: Array, name: str) -> None:
    """Raise unless an argument is a NumPy array of numbers, of any byte order."""
    library = LIBRARY_OF[type(table)]
    if library == "numpy" and NUMBERS.taken[0][table.dtype.newbyteorder("=")]:
        return
    fault = (
        fault_of(table, library, NUMBERS) or f"must be a NumPy array, got one of {library}. Pass that of a codebook."
    )
    raise UnsupportedArrayError(f"{name} {fault}")


class Operation(Generic[P, R]):
    """A reference implementation together with its registered overrides.

    Parameters
    ----------
    reference : callable
        Array API implementation; its first argument is the array that decides the library.
    examples : callable, optional
        Makes arguments from a :class:`~lqlora._dispatch.examples.BlocksProblem`. Overrides return the same bytes.
    products : callable, optional
        Makes arguments from a :class:`~lqlora._dispatch.examples.ProductProblem`. The operation adds in no fixed order,
        so the results of overrides are compared on integers, and by a bound.
    record : tuple of str and type, optional
        Name and class of an argument that is a record, a named tuple whose fields conditions may name like arguments.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        examples: Callable[[BlocksProblem], tuple[Any, ...]] | None = None,
        products: Callable[[ProductProblem], tuple[Any, ...]] | None = None,
        record: tuple[str, type[Any]] | None = None,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.reference, self.examples, self.products = reference, examples, products
        self.__signature__ = self._signature = inspect.signature(reference)
        self.arguments = Arguments(self._signature, record)
        self._count = len(self.arguments.names)
        self._is_flat = record is None
        self._tables = [(self.arguments.flat.index(name), name) for name in _TABLES if name in self.arguments.flat]
        # Calls run through the tuples in `_ready`. `register` drops the tuple of its library, and the next call makes a
        # new one. A call in another thread meanwhile goes on with the old tuple, which never changes.
        self._overrides: dict[str, dict[str, Override]] = {}
        self._ready: dict[str | None, tuple[Override, ...]] = {}

    @property
    def name(self) -> str:
        """Name of the operation."""
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
            Name of the backend, such as ``"native"``. It is the first part of the override's name, and
            :func:`lqlora.forced` can pass it over. The name of the library by default.

        Returns
        -------
        callable
            The decorator; it returns the function unchanged.

        Raises
        ------
        InvalidArgumentError
            If ``takes`` or its condition names an argument that the operation does not have.
        """

        def add(function: Callable[P, R]) -> Callable[P, R]:
            name = f"{backend or library}.{function.__name__}"
            override = Override(name, library, function, takes, self.arguments)
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
            Empty for a library that is not registered.
        """
        load_overrides(library)
        self._ready[library] = ready = tuple(self._overrides.get(library or "", {}).values())
        return ready

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return all arguments by position, with defaults filled in: overrides find arguments by their positions."""
        # Binding a signature takes longer than a small kernel, so calls that name all the rest are put in order here.
        rest = self.arguments.names[len(args) :]
        if len(rest) == len(kwargs) and all(name in kwargs for name in rest):
            return (*args, *(kwargs[name] for name in rest))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def _choice(self, args: tuple[Any, ...]) -> Override | None:
        """Return the first override that takes a call with these flat arguments, or None for the reference.

        This runs in every call of every operation, so the checks are written out here. All but the condition are
        functions in C. :meth:`Override.fault` runs the same checks in the same order, and words the first that fails.
        """
        passed_over = _passed_over.get()
        if passed_over is None:
            return None
        # The first array decides the library. If a later one is of another library, no override takes the call, and the
        # reference raises: it asks for one namespace of all its arrays.
        candidates = self._ready.get(LIBRARY_OF[type(args[0])])
        if candidates is None:
            candidates = self.overrides(LIBRARY_OF[type(args[0])])
        for override in candidates:
            if override.backend in passed_over:
                continue
            library, on_host = override.library, override.on_host
            for position, is_optional, dtypes, is_on_host, layout_of, dense, _ in override.arrays:
                value = args[position]
                if value is None and is_optional:
                    continue
                if (
                    PLAIN_LIBRARY_OF[type(value)] != library
                    or not dtypes[value.dtype]
                    or (is_on_host is not None and is_on_host(value) is not on_host)
                    or (layout_of is not None and layout_of(value) not in dense)
                ):
                    break
            else:
                # The condition comes last: it may rely on dtypes and memory, such as that every array has a shape.
                named = override.named
                if (override.bits is None or args[override.bits_at] in override.bits) and (
                    named is None or override.condition(*named(args))  # type: ignore[misc]  # there is one to name them
                ):
                    return override
        return None

    def select(self, *args: P.args, **kwargs: P.kwargs) -> Selection:
        """Return the implementation that a call with these arguments would run, without running it.

        Parameters
        ----------
        *args, **kwargs
            The arguments of the call.

        Returns
        -------
        Selection
            The choice and its reason.
        """
        flat = self.arguments.flatten(self._positional(args, kwargs))
        override = self._choice(flat)
        if override is not None:
            return Selection(self.name, override.name, f"{override.name} takes these {override.library} arguments.")
        return Selection(self.name, "reference", self._why_reference(flat))

    def _why_reference(self, args: tuple[Any, ...]) -> str:
        passed_over = _passed_over.get()
        if passed_over is None:
            return "forced('reference') is active."
        reasons = [
            f"{override.name} is passed over by forced(without={override.backend!r})"
            if override.backend in passed_over
            else f"{override.name} declined: {override.fault(args)}"
            for override in self.overrides(LIBRARY_OF[type(args[0])])
        ]
        return f"{'; '.join(reasons)}." if reasons else f"{LIBRARY_OF[type(args[0])]}: no override is registered."

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation that :meth:`select` names."""
        positional = args if len(args) == self._count and not kwargs else self._positional(args, kwargs)
        try:
            flat = positional if self._is_flat else self.arguments.flatten(positional)
            for at, name in self._tables:
                table: Any = flat[at]
                if PLAIN_LIBRARY_OF[type(table)] != "numpy" or not NUMBERS.taken[0][table.dtype]:
                    _require_table(table, name)
            override = self._choice(flat)
            implementation: Callable[..., R] = self.reference if override is None else override.function
            return implementation(*positional)
        except FOREIGN as error:
            if (own := misfit(self.reference, positional, {}, error)) is None:
                raise
            raise own from error


@overload
def op(reference: Callable[P, R]) -> Operation[P, R]: ...


@overload
def op(
    *,
    examples: Callable[[BlocksProblem], tuple[Any, ...]] | None = None,
    products: Callable[[ProductProblem], tuple[Any, ...]] | None = None,
    record: tuple[str, type[Any]] | None = None,
) -> Callable[[Callable[P, R]], Operation[P, R]]: ...


def op(
    reference: Callable[P, R] | None = None,
    *,
    examples: Callable[[BlocksProblem], tuple[Any, ...]] | None = None,
    products: Callable[[ProductProblem], tuple[Any, ...]] | None = None,
    record: tuple[str, type[Any]] | None = None,
) -> Operation[P, R] | Callable[[Callable[P, R]], Operation[P, R]]:
    """Turn an array API function into an :class:`Operation` that backends can override.

    Parameters
    ----------
    reference : callable
        The implementation that runs everywhere.
    examples, products : callable, optional
        Makes arguments for the conformance suite, as :class:`Operation` describes.
    record : tuple of str and type, optional
        Name and class of an argument that is a record.

    Returns
    -------
    Operation
        Callable exactly like ``reference``; a decorator if ``reference`` is not given.
    """
    if reference is None:
        return lambda function: Operation(function, examples, products, record)
    return Operation(reference, examples, products, record)
