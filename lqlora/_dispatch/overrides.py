"""What an override takes, declared: the record decides which calls it is given, and is what the table of them shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lqlora._dispatch.libraries import PLAIN_LIBRARY_OF, dense_test, host_test, known_libraries, spelled
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Mapping

__all__ = ["Override", "Takes"]


@dataclass(frozen=True)
class Takes:
    """Which calls an override takes: those whose arguments fit everything that is declared.

    Parameters
    ----------
    dtypes : mapping of str to tuple of str or None
        For each argument that is an array of the library, the names of the dtypes taken; None among them if the
        argument may be None. Arrays of another library, and arguments that are no arrays, do not fit.
        Levels and boundaries, which every library is given as read-only NumPy arrays, are not listed.
    bits : tuple of int, optional
        Values of the argument ``bits``; any by default.
    memory : {"host", "device"}
        Where the arrays are.
    contiguous : tuple of str
        Arguments that have to be dense, row-major and aligned.
    condition : callable, optional
        What else has to hold: called with the arguments of the call, by position.
    sentence : str
        The condition in words, such as ``"more than 15 boundaries"``.

    Examples
    --------
    >>> Takes({"packed": ("uint8",)}, bits=(4,)).memory
    'host'
    """

    dtypes: Mapping[str, tuple[str | None, ...]]
    bits: tuple[int, ...] | None = None
    memory: Literal["host", "device"] = "host"
    contiguous: tuple[str, ...] = ()
    condition: Callable[..., bool] | None = None
    sentence: str = ""


class _ArrayCheck(NamedTuple):
    """What is asked of one argument."""

    position: int
    optional: bool
    dtypes: _ByDtype
    contiguous: bool
    name: str


class _ByDtype(dict[Any, bool]):
    """Whether a dtype is taken: the first question looks its name up, later ones cost one look-up."""

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self._names = names

    def __missing__(self, dtype: Any) -> bool:
        self[dtype] = taken = spelled(dtype) in self._names
        return taken


class Override:
    """An implementation of an operation for the arrays of one library.

    Parameters
    ----------
    name : str
        The backend and the function, such as ``"numpy.decode_lookup"``.
    library : str
        Whose arrays it takes.
    function : callable
        The implementation, called as the operation is.
    takes : Takes
        The calls it takes.
    signature : inspect.Signature
        That of the operation.
    """

    def __init__(
        self, name: str, library: str, function: Callable[..., Any], takes: Takes, signature: inspect.Signature
    ) -> None:
        self.name, self.library, self.function, self.takes = name, library, function, takes
        self.backend = name.partition(".")[0]
        parameters = list(signature.parameters)
        unknown = {*takes.dtypes, *takes.contiguous, *(() if takes.bits is None else ("bits",))} - set(parameters)
        if unknown or set(takes.contiguous) - set(takes.dtypes):
            wrong = ", ".join(sorted(unknown or set(takes.contiguous) - set(takes.dtypes)))
            raise InvalidArgumentError(f"{name} declares {wrong}, which is no array argument of the operation.")
        self._arrays = [
            _ArrayCheck(parameters.index(name), None in names, _ByDtype(names), name in takes.contiguous, name)
            for name, names in takes.dtypes.items()
        ]
        self._bits = None if takes.bits is None else (parameters.index("bits"), frozenset(takes.bits))
        self._asks_more = takes.bits is not None or takes.condition is not None
        self._is_dense, self._is_on_host = dense_test(library), host_test(library)
        known = known_libraries().get(library)
        self._one_memory = known is not None and known.memory == takes.memory
        self._on_host = takes.memory == "host"

    def fault(self, args: tuple[Any, ...]) -> str:
        """Return why a call is declined, nothing if it is taken.

        Parameters
        ----------
        args : tuple
            All arguments of the call, by position.

        Returns
        -------
        str
            A clause, or an empty text.
        """
        library, one_memory = self.library, self._one_memory
        for position, optional, dtypes, contiguous, name in self._arrays:
            value = args[position]
            if value is None and optional:
                continue
            if PLAIN_LIBRARY_OF[type(value)] != library:
                return f"{name} is no plain array of {library}"
            if not dtypes[value.dtype]:
                return f"{name} is not of {' or '.join(filter(None, self.takes.dtypes[name])) or 'any dtype'}"
            if not one_memory and self._is_on_host(value) is not self._on_host:
                return f"{name} is not in the memory of the {self.takes.memory}"
            if contiguous and not self._is_dense(value):
                return f"{name} is not contiguous"
        return self._fault_of_others(args) if self._asks_more else ""

    def _fault_of_others(self, args: tuple[Any, ...]) -> str:
        if self._bits is not None and args[self._bits[0]] not in self._bits[1]:
            return f"bits is none of {', '.join(map(str, self.takes.bits or ()))}"
        if self.takes.condition is not None and not self.takes.condition(*args):
            return f"it is for {self.takes.sentence}"
        return ""
