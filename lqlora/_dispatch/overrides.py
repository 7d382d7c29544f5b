"""Conditions under which an override takes a call, declared as a :class:`Takes` record.

The record decides which calls an override gets, words the reasons of :meth:`Operation.select`, and fills the table
in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lqlora._dispatch.kinds import spelled
from lqlora._dispatch.libraries import PLAIN_LIBRARY_OF, host_test, known_libraries, layouts
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lqlora._dispatch.arguments import Arguments

__all__ = ["Override", "Takes"]


@dataclass(frozen=True)
class Takes:
    """Calls that an override takes: the arguments must meet every condition of the record.

    Parameters
    ----------
    dtypes : mapping of str to tuple of str or None
        Names of the accepted dtypes, for each argument that is an array of the library; None among them if the
        argument may be None. Arrays of another library do not fit, and neither do values that are not arrays.
        Levels and boundaries are not listed, because operations get them as read-only NumPy arrays for every library.
    bits : tuple of int, optional
        Values of the argument ``bits``; any by default.
    memory : {"host", "device"}
        The memory that the arrays must be in.
    contiguous : tuple of str
        Arguments that must be dense, row-major and aligned.
    condition : callable, optional
        A further condition. Its parameters are named like arguments of the operation, and it is called with these.
        A callable with a ``__signature__`` is called with the arguments that the signature names.
    sentence : str
        The condition in words, such as ``"more than 15 boundaries"``.

    Examples
    --------
    >>> Takes({"packed": ("uint8",)}, bits=(4,), condition=lambda packed: packed.size > 0).memory
    'host'
    """

    dtypes: Mapping[str, tuple[str | None, ...]]
    bits: tuple[int, ...] | None = None
    memory: Literal["host", "device"] = "host"
    contiguous: tuple[str, ...] = ()
    condition: Callable[..., bool] | None = None
    sentence: str = ""


class ArrayCheck(NamedTuple):
    """The checks of one array argument, as functions in C: every call of an operation runs them.

    ``is_on_host`` is None where the library has one memory only, ``layout_of`` where any layout is taken.
    """

    position: int
    is_optional: bool
    dtypes: ByDtype
    is_on_host: Callable[[Any], bool] | None
    layout_of: Callable[[Any], Any] | None
    dense: frozenset[Any]
    name: str


class ByDtype(dict[Any, bool]):
    """Cache of whether an override takes a dtype: only the first query compares names, later ones are one look-up."""

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self._names = names

    # Operation._choice checks the class of an array before its dtype, so one cache sees the dtypes of one library only.
    # Dtypes of two libraries may have the same hash, and comparing them may raise.
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
        Name of the library whose arrays it takes.
    function : callable
        The implementation, called as the operation is.
    takes : Takes
        The calls it takes.
    arguments : Arguments
        Arguments of the operation.

    Raises
    ------
    InvalidArgumentError
        If the record names an argument that the operation does not have.
    """

    def __init__(
        self, name: str, library: str, function: Callable[..., Any], takes: Takes, arguments: Arguments
    ) -> None:
        self.name, self.library, self.function, self.takes = name, library, function, takes
        self.backend = name.partition(".")[0]
        parameters = arguments.flat
        unknown = {*takes.dtypes, *takes.contiguous, *(() if takes.bits is None else ("bits",))} - set(parameters)
        if wrong := sorted(unknown or set(takes.contiguous) - set(takes.dtypes)):
            raise InvalidArgumentError(
                f"takes of {name} declares {', '.join(wrong)}, but the operation has the arguments "
                f"{', '.join(parameters)}. Arguments in contiguous must be in dtypes too."
            )
        known = known_libraries().get(library)
        has_one_memory = known is not None and known.memory == takes.memory
        # The record is resolved here, once: into positions of arguments, tests by library, and sets. A call then runs
        # no Python function but the condition.
        self.on_host = takes.memory == "host"
        self.arrays = tuple(
            ArrayCheck(
                parameters.index(argument),
                None in dtypes,
                ByDtype(dtypes),
                None if has_one_memory else host_test(library),
                layouts(library).layout_of if argument in takes.contiguous else None,
                layouts(library).dense,
                argument,
            )
            for argument, dtypes in takes.dtypes.items()
        )
        self.bits = None if takes.bits is None else frozenset(takes.bits)
        self.bits_at = 0 if takes.bits is None else parameters.index("bits")
        self.condition = takes.condition
        self.named = None if takes.condition is None else arguments.picker(takes.condition, name)

    def fault(self, args: tuple[Any, ...]) -> str:
        """Return the reason why a call is declined, or an empty text if it is taken.

        Parameters
        ----------
        args : tuple
            All flat arguments of the call.

        Returns
        -------
        str
            A clause, or an empty text.
        """
        return self._fault_of_arrays(args) or self._fault_of_others(args)

    def _fault_of_arrays(self, args: tuple[Any, ...]) -> str:
        for check in self.arrays:
            value, name = args[check.position], check.name
            if value is None and check.is_optional:
                continue
            if PLAIN_LIBRARY_OF[type(value)] != self.library:
                return f"{name} is not a plain array of {self.library}"
            if not check.dtypes[value.dtype]:
                return f"{name} is not of {' or '.join(filter(None, self.takes.dtypes[name])) or 'any dtype'}"
            if check.is_on_host is not None and check.is_on_host(value) is not self.on_host:
                return f"{name} is not in the memory of the {self.takes.memory}"
            if check.layout_of is not None and check.layout_of(value) not in check.dense:
                return f"{name} is not contiguous"
        return ""

    def _fault_of_others(self, args: tuple[Any, ...]) -> str:
        if self.bits is not None and args[self.bits_at] not in self.bits:
            return f"bits is not among {', '.join(map(str, self.takes.bits or ()))}"
        if self.condition is not None and self.named is not None and not self.condition(*self.named(args)):
            return f"it is for {self.takes.sentence}"
        return ""
