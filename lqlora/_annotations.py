"""Errors for arguments of a wrong kind: after a call has failed, its arguments are compared with the annotations."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from lqlora._messages import given
from lqlora.errors import InvalidArgumentError, LQLoRAError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["annotated", "annotated_class"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

#: What Python and NumPy raise when an object of a wrong kind is used.
_FOREIGN = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)

#: Digits of the longest integer that float64 can hold.
_DIGITS = 309


def annotated(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function whose errors about arguments of a wrong kind are those of lqlora.

    Use it for public functions that are not called in loops. Nothing is compared before the function has failed, so objects that
    work in place of the annotated kind are taken. An error stays as it is if every argument fits its annotation.

    Parameters
    ----------
    function : callable
        The function, with annotations.

    Returns
    -------
    callable
        It does what ``function`` does, and nothing else until an error occurs.
    """
    if inspect.isgeneratorfunction(function):  # of a context manager

        @functools.wraps(function)
        def _generate(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                yield from function(*args, **kwargs)
            except _FOREIGN as error:
                if isinstance(error, LQLoRAError) or (own := _misfit(function, args, kwargs)) is None:
                    raise
                raise own from error

        return _generate

    @functools.wraps(function)
    def _call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except _FOREIGN as error:
            if isinstance(error, LQLoRAError) or (own := _misfit(function, args, kwargs)) is None:
                raise
            raise own from error

    return _call


def annotated_class(cls: C) -> C:
    """Return a class whose constructor is :func:`annotated`.

    Parameters
    ----------
    cls : type
        The class, which is changed.

    Returns
    -------
    type
        The class.
    """
    cls.__init__ = annotated(cls.__init__)  # type: ignore[misc]
    return cls


def _misfit(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> InvalidArgumentError | None:
    """Return the error for the first argument that does not fit its annotation, or None."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    for name, value in bound.items():
        parameter = signature.parameters[name]
        text = parameter.annotation
        if not isinstance(text, str) or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if not _fits(value, text):
            return InvalidArgumentError(f"{name} must have the type {text[:200]}, got {given(value)}.")
        if isinstance(value, int) and value.bit_length() > _DIGITS * 10 // 3:
            return InvalidArgumentError(f"{name} must be an integer of at most {_DIGITS} digits, got {given(value)}.")
    return None


def _fits(value: object, text: str) -> bool:
    """Return whether a value has the type of an annotation; True for annotations that are not understood."""
    return any(_fits_one(value, one) for one in _split(text, "|"))


def _split(text: str, separator: str) -> list[str]:
    """Split a text at a separator outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _fits_one(value: object, text: str) -> bool:
    head, _, rest = text.partition("[")
    head, arguments = head.rpartition(".")[2], _split(rest.removesuffix("]"), ",") if rest else []
    if head in _PLAIN:
        return _PLAIN[head](value)
    if head == "Literal":
        return type(value) in (str, int, bool, type(None)) and value in ast.literal_eval(f"({', '.join(arguments)},)")
    if head in ("Mapping", "dict"):
        return isinstance(value, Mapping) and all(
            _fits(own, kind) for pair in value.items() for own, kind in zip(pair, arguments, strict=False)
        )
    if head in _LISTS:
        return (
            isinstance(value, Iterable)
            and isinstance(value, _LISTS[head])
            and _is_list(value, [own for own in arguments if own != "..."])
        )
    return _is_instance(value, head)


def _is_list(value: Iterable[object], kinds: list[str]) -> bool:
    if (isinstance(value, str | bytes) and kinds != ["str"]) or getattr(value, "shape", None) == ():
        return False
    # Other iterables may be used up by a look at their entries.
    entries = list(value) if isinstance(value, Collection) else []
    if len(kinds) == 1:
        return all(_fits(own, kinds[0]) for own in entries)
    return not kinds or (len(entries) == len(kinds) and all(map(_fits, entries, kinds)))


def _is_instance(value: object, name: str) -> bool:
    """Return whether the class of a value has a name, or the name is not that of a class."""
    if name in _ALIASES or re.fullmatch("[A-Z]", name):  # a single letter is a type variable
        return True
    ours = [vars(module).get(name) for key, module in list(sys.modules.items()) if key.partition(".")[0] == "lqlora"]
    known = next((own for own in ours if own is not None), None)
    if get_origin(known) is Literal:
        return isinstance(value, str) and value in get_args(known)
    if known is not None and (not isinstance(known, type) or getattr(known, "_is_protocol", False)):
        return True
    return any(own.__name__ == name for own in type(value).__mro__)


_LISTS: dict[str, type] = {
    "Collection": Collection,
    "Iterable": Iterable,
    "Iterator": Iterator,
    "Sequence": Sequence,
    "list": Sequence,
    "tuple": Sequence,
}

#: Names of types that exist for type checkers only, and those of arrays, which have checks of their own.
_ALIASES = {"Array", "FloatName", "NDArray", "ArrayLike", "Namespace", "Pattern", "Patterns", "Tensor"}

_PLAIN: dict[str, Callable[[Any], bool]] = {
    "Any": lambda _: True,
    "object": lambda _: True,
    "None": lambda own: own is None,
    "int": lambda own: isinstance(own, Integral) and not isinstance(own, bool),
    "float": lambda own: isinstance(own, Real) and not isinstance(own, bool),
    "bool": lambda own: isinstance(own, bool),
    "str": lambda own: isinstance(own, str),
    "Callable": callable,
    "PathLike": lambda own: hasattr(own, "__fspath__"),
}
