"""Arguments of an operation as dispatch sees them: flat, with the fields of a record in the record's place.

A weight that is stored in blocks is one argument, a named tuple of packed codes, scales, levels and sizes. The checks of
overrides concern single arrays. So dispatch looks at the fields as if each were an argument, and functions get the record.
"""

from __future__ import annotations

import inspect
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Arguments"]


class Arguments:
    """Names of an operation's arguments, and the conversion of calls to flat arguments and back.

    Parameters
    ----------
    signature : inspect.Signature
        Signature of the operation.
    record : tuple of str and type, optional
        Name of the argument that is a record, and its class, which :class:`typing.NamedTuple` makes.

    Examples
    --------
    >>> from typing import NamedTuple
    >>> class Pair(NamedTuple):
    ...     one: int
    ...     two: int
    >>> arguments = Arguments(inspect.signature(lambda pair, out: None), ("pair", Pair))
    >>> arguments.flat, arguments.flatten((Pair(1, 2), 3)), arguments.unflatten((1, 2, 3))
    (('one', 'two', 'out', 'pair'), (1, 2, 3, Pair(one=1, two=2)), (Pair(one=1, two=2), 3))
    """

    def __init__(self, signature: inspect.Signature, record: tuple[str, type[Any]] | None = None) -> None:
        self.names = self.flat = tuple(signature.parameters)
        self._class, self._at, self._end = None, 0, 0
        if record is not None:
            name, self._class = record
            self._at = self.names.index(name)
            self._end = self._at + len(self._class._fields)
            self.flat = (*self.names[: self._at], *self._class._fields, *self.names[self._at + 1 :], name)

    def flatten(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return all arguments of a call, by position, as flat arguments.

        Parameters
        ----------
        args : tuple
            All arguments of the signature.

        Returns
        -------
        tuple
            Values of the names in ``flat``. The record itself comes last, for conditions that name it.

        Raises
        ------
        InvalidArgumentError
            If the argument of the record is not one, for example a plain tuple.
        """
        at = self._at
        if self._class is None:
            return args
        if type(args[at]) is not self._class:
            raise InvalidArgumentError(
                f"{self.names[at]} must be a {self._class.__name__}, got {type(args[at]).__name__[:80]}."
            )
        return (*args[:at], *args[at], *args[at + 1 :], args[at])

    def unflatten(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a call from flat ones: the inverse of :meth:`flatten`.

        Parameters
        ----------
        flat : tuple
            All flat arguments. The record is made of its fields, so the one at the end may be left out.

        Returns
        -------
        tuple
            Values of the names in ``names``.
        """
        if self._class is None:
            return flat
        own = self._class(*flat[self._at : self._end])
        return (*flat[: self._at], own, *flat[self._end : len(self.flat) - 1])

    def picker(self, function: Callable[..., Any], name: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """Return a function that picks the arguments of a condition out of the flat arguments of a call.

        Parameters
        ----------
        function : callable
            The condition. Its parameters are named like flat arguments, or like the record.
        name : str
            Name of the override, for the error.

        Returns
        -------
        callable
            Function of a tuple of all flat arguments, which returns a tuple of the arguments of the condition.

        Raises
        ------
        InvalidArgumentError
            If the condition has a parameter that is not an argument of the operation.

        Examples
        --------
        >>> arguments = Arguments(inspect.signature(lambda x, y, out: None))
        >>> arguments.picker(lambda out, x: True, "numpy.fast")((1, 2, 3))
        (3, 1)
        """
        wanted = inspect.signature(function).parameters
        if wrong := [str(parameter) for key, parameter in wanted.items() if key not in self.flat]:
            raise InvalidArgumentError(
                f"condition of {name} has the parameter {', '.join(wrong)}, which the operation does not have. Use names "
                f"among {', '.join(self.flat)}."
            )
        positions = [self.flat.index(key) for key in wanted]
        # An itemgetter of one index returns the bare item, but the condition needs a tuple to unpack: a slice returns one.
        if len(positions) == 1:
            return itemgetter(slice(positions[0], positions[0] + 1))
        return itemgetter(*positions) if positions else itemgetter(slice(0, 0))
