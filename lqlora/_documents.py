"""Reader and writer of JSON documents: every value is compared with a schema before it is used or written.

A schema is a class of msgspec, whose fields have the types and the ranges that are allowed. Whatever a file holds, reading
it returns an object of that class, or raises one error that names the file, the place in it and the value.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from lqlora._messages import shortened, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lqlora.errors import LQLoRAError

__all__ = [
    "LONGEST",
    "Count",
    "Length",
    "Number",
    "Reader",
    "Size",
    "Text",
    "json_values",
    "key_step",
    "present_fields",
]

_T = TypeVar("_T")

#: Largest finite float64. JSON has no infinity, but ``1e999`` is valid JSON, and Python reads it as infinity.
_LARGEST = sys.float_info.max

#: Levels of nesting that a part of free form may have, far below what Python's own functions can handle.
_MAX_DEPTH = 200

#: Entries of a list that are converted together in the search for one that is refused.
_CHUNK = 1024

#: Digits that an integer may have. Python's own limit is 4300 by default, and can be removed.
_MAX_DIGITS = 4300

#: Halves of characters in Python's texts, and their escapes in JSON: a pair of them is one character.
_LONE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u[dD][89a-fA-F]..")

#: A finite number.
Number = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]

#: A finite number of at least 0, such as a squared error.
Size = Annotated[float, Meta(ge=0, le=_LARGEST)]

#: A whole number of at least 0 that int64 holds, such as a number of bits.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]

#: Largest length of a dimension. The product of two such lengths is below 2**62.
LONGEST = 2**31 - 1

#: Length of a dimension.
Length = Annotated[int, Meta(ge=0, le=LONGEST)]

#: A name or another text.
Text = Annotated[str, Meta(max_length=2**16)]


@dataclass(frozen=True)
class _Refused:
    """Placeholder for a value that is refused before the schema is checked: a repeated key, NaN, or too many digits."""

    why: str


@dataclass(frozen=True)
class Reader:
    """Reader of one document.

    Parameters
    ----------
    source : str
        What the document is, as messages begin: a file, a line of it, or an argument.
    error : class
        Class of the errors.

    Examples
    --------
    >>> from lqlora.errors import InvalidArgumentError
    >>> Reader("text", InvalidArgumentError).read('{"a.b": [1, -2]}', dict[str, list[Count]])
    Traceback (most recent call last):
    lqlora.errors.InvalidArgumentError: text: ['a.b'][1] must be a whole number from 0 to 9223372036854775807, got -2.
    """

    source: str
    error: type[LQLoRAError]

    def read(self, text: str | bytes, schema: type[_T]) -> _T:
        """Return the document of a text as an object of a schema.

        Parameters
        ----------
        text : str or bytes
            JSON; bytes are UTF-8.
        schema : class
            Struct of msgspec, or another type that it knows.

        Returns
        -------
        object
            An object of the class. Every field has its type and is in its range.
        """
        return self.convert(self.parse(text), schema)

    def parse(self, text: str | bytes) -> Any:
        """Return the values of a JSON text, which no schema has seen yet.

        Parameters
        ----------
        text : str or bytes
            JSON; bytes are UTF-8.

        Returns
        -------
        object
            Dicts, lists, texts, numbers, booleans and None. Keys differ, and numbers are not NaN.
        """
        if not isinstance(text, str | bytes | bytearray):
            raise self.fault("", f"must be text, got {shown(text)}.")
        try:
            text = text if isinstance(text, str) else text.decode()
            plain, refused = _loads(text)
        except RecursionError:
            raise self.fault("", "must be valid JSON, but it is nested too deep.") from None
        except UnicodeDecodeError as error:
            raise self.fault("", f"must be valid JSON in UTF-8, got the byte {error.object[error.start]:#x}.") from None
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise self.fault("", f"must be valid JSON, got an error in {place}: {error.msg}.") from None
        if _may_hold_surrogates(text):
            self._check_unicode(plain)
        if refused:
            place, mark = _find(plain, lambda own: isinstance(own, _Refused)) or ("", refused[0])
            raise self.fault(place, f"{mark.why}.")
        return plain

    def convert(self, plain: Any, schema: type[_T], place: str = "") -> _T:
        """Return values of JSON as an object of a schema.

        Parameters
        ----------
        plain : object
            Values of JSON.
        schema : class
            Struct of msgspec, or another type that it knows.
        place : str, optional
            Where the values are in the document.

        Returns
        -------
        object
            An object of the class.
        """
        try:
            return msgspec.convert(plain, schema)
        except msgspec.ValidationError:
            # Its message does not say the keys of dicts and the value.
            where, why = _locate(plain, schema, place)
            raise self.fault(where, f"{why}.") from None

    def write(self, plain: Any, schema: Any, *, indent: int | None = None) -> str:
        """Return the JSON text of values, or raise if :meth:`read` would refuse it.

        Parameters
        ----------
        plain : object
            Dicts, lists, tuples, texts, numbers, booleans and None.
        schema : class
            Struct of msgspec, or another type that it knows.
        indent : int, optional
            Spaces of each level, as :func:`json.dumps` has it. By default the text is one line.

        Returns
        -------
        str
            Text in ASCII.
        """
        try:
            text = json.dumps(plain, allow_nan=False, indent=indent)
        except (RecursionError, TypeError, ValueError) as error:
            raise self.fault("", f"cannot be written as JSON: {error}.") from None
        # Values that fit need not be read. Others may fit as JSON gives them: numbers of NumPy, or keys that are numbers.
        if _may_hold_surrogates(text) or not _fits(plain, schema):
            self.read(text, schema)
        return text

    def check_depth(self, plain: Any, place: str) -> None:
        """Raise if values of free form are nested so deep that functions that walk them could fail.

        Parameters
        ----------
        plain : object
            Values of JSON.
        place : str
            Where the values are in the document.
        """
        level, depth = [plain], 0
        while level:
            if depth >= _MAX_DEPTH:
                raise self.fault(place, f"must be nested at most {_MAX_DEPTH} levels deep, got more.")
            children = (own.values() if isinstance(own, dict) else own for own in level)
            level = [child for own in children for child in own if isinstance(child, dict | list)]
            depth += 1

    def _check_unicode(self, plain: Any) -> None:
        def lone(own: Any) -> str | None:
            texts = [own] if isinstance(own, str) else own if isinstance(own, dict) else ()
            return next(filter(_LONE.search, texts), None)

        if (found := _find(plain, lambda own: lone(own) is not None)) is not None:
            raise self.fault(found[0], f"must hold texts of Unicode characters, got {shown(lone(found[1]))}.")

    def fault(self, place: str, why: str) -> LQLoRAError:
        """Return the error for a part of the document.

        Parameters
        ----------
        place : str
            The part, such as ``"matrices['a.b'].shape[1]"``; an empty text is the whole document.
        why : str
            What is wrong with it, as the rest of a sentence.

        Returns
        -------
        LQLoRAError
            The error to raise, with a printable message of bounded length.
        """
        between = "" if why.startswith(":") else " "
        return self.error(shortened(f"{self.source}: {place.removeprefix('.') or 'the document'}{between}{why}"))


def key_step(key: str | int) -> str:
    """Return the step from a part of a document to one of its entries, as in ``matrices['a.b'].shape[1]``.

    Parameters
    ----------
    key : str or int
        Name of an entry, or index in a list.

    Returns
    -------
    str
        The key in brackets. Fields of a schema are written with a dot instead.

    Examples
    --------
    >>> key_step("a.b") + ".shape" + key_step(1)
    "['a.b'].shape[1]"
    """
    return f"[{shown(key)}]"


def json_values(values: Mapping[str, Any], name: str, error: type[LQLoRAError]) -> dict[str, Any]:
    """Return a mapping as a reader of JSON will see it: tuples become lists, and keys that are numbers become text.

    Parameters
    ----------
    values : mapping
        What a document will hold.
    name : str
        Name of the argument.
    error : class
        Class of the error if the mapping cannot be written, or a reader would refuse it.

    Returns
    -------
    dict
        Values that JSON writes and reads unchanged.

    Examples
    --------
    >>> from lqlora.errors import InvalidArgumentError
    >>> json_values({"ranks": (8, 16), 3: None}, "settings", InvalidArgumentError)
    {'ranks': [8, 16], '3': None}
    """
    reader = Reader(f"{name} must hold JSON values only", error)
    plain: dict[str, Any] = reader.parse(reader.write(dict(values), Any))
    reader.check_depth(plain, "")
    return plain


def present_fields(row: msgspec.Struct, *names: str) -> dict[str, Any]:
    """Return the optional fields that a document has.

    Parameters
    ----------
    row : Struct
        An object of a schema.
    *names : str
        Names of the fields.

    Returns
    -------
    dict of str to object
        Values of the fields that are not left out, by name.
    """
    return {name: value for name in names if (value := getattr(row, name)) is not msgspec.UNSET}


class _Loader:
    """Functions that json.loads calls for what it would accept and this reader refuses.

    They put marks into the document, whose places are known when all of it has been read.
    """

    def __init__(self) -> None:
        self.refused: list[_Refused] = []

    def load(self, text: str, parse_int: Callable[[str], Any] | None = None) -> Any:
        return json.loads(text, object_pairs_hook=self._pairs, parse_constant=self._constant, parse_int=parse_int)

    def integer(self, digits: str) -> int | _Refused:
        count = len(digits.lstrip("-"))
        return int(digits) if count <= _MAX_DIGITS else self._mark(f"must be a shorter number, got {count} digits")

    def _pairs(self, found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) < len(found):
            counts = Counter(key for key, _ in found)
            made |= {key: self._mark("must occur once, but the key is repeated") for key in made if counts[key] > 1}
        return made

    def _constant(self, word: str) -> _Refused:
        return self._mark(f"must be a number of JSON, got {word}")

    def _mark(self, why: str) -> _Refused:
        self.refused.append(_Refused(why))
        return self.refused[-1]


def _loads(text: str) -> tuple[Any, list[_Refused]]:
    """Return the values of a JSON text, and the marks of the parts that are refused; they are among the values."""
    loader = _Loader()
    try:
        return loader.load(text), loader.refused
    except json.JSONDecodeError:
        raise
    except ValueError:  # int() has a limit. A function is called for every integer, so it is used only here.
        loader = _Loader()
        return loader.load(text, loader.integer), loader.refused


def _may_hold_surrogates(text: str) -> bool:
    """Return whether the values of a JSON text must be searched for surrogates that are not part of a pair."""
    # UTF-8 cannot hold them, so msgspec fails. The searches are fast for texts that have no such escapes.
    if not text.isascii() and _LONE.search(text):
        return True
    if "\\ud" not in text and "\\uD" not in text:
        return False
    # A backslash may be escaped itself: then the expression could take the text behind it for a half.
    return "\\\\u" in text or any(len(found[0]) == 6 for found in _ESCAPED.finditer(text))


def _find(plain: Any, is_wanted: Callable[[Any], bool]) -> tuple[str, Any] | None:
    """Return the place and the value of the first part of a document with a property, or None; without recursion."""
    keys: list[str | int] = []
    waiting: list[Iterator[tuple[Any, Any]]] = [iter([("", plain)])]
    while waiting:
        for key, own in waiting[-1]:
            if is_wanted(own):
                return "".join(map(_guessed_step, [*keys, key][1:])), own
            if isinstance(own, dict | list):
                keys.append(key)
                waiting.append(iter(own.items()) if isinstance(own, dict) else enumerate(own))
                break
        else:
            waiting.pop()
            del keys[-1:]
    return None


def _guessed_step(key: str | int) -> str:
    """Return the step to a part of a document whose schema is not known: a short word may be the name of a field."""
    is_word = isinstance(key, str) and key.isidentifier() and key.isascii() and len(key) <= 40
    return f".{key}" if is_word else key_step(key)


def _fits(value: Any, schema: Any) -> bool:
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError:
        return False
    return True


def _first_refused(values: list[Any], schema: Any) -> int | None:
    """Return the index of the first value that a type refuses, or None."""
    # Lists may be long, and a call for each entry takes longer than its conversion.
    for start in range(0, len(values), _CHUNK):
        low, high = start, min(start + _CHUNK, len(values))
        if not _fits(values[low:high], list[schema]):
            while high - low > 1:  # an entry below `high` is refused, and none below `low`
                middle = (low + high) // 2
                low, high = (middle, high) if _fits(values[low:middle], list[schema]) else (low, middle)
            return low
    return None


def _locate(value: Any, schema: Any, place: str) -> tuple[str, str]:
    """Return the place of the first part of a value that a schema refuses, and what is wrong with it."""
    # Only the part that is refused is followed: the document is converted a few times more for each of its levels.
    kind = _only_kind(schema)
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        return _locate_field(value, kind, place)
    if origin is dict and isinstance(value, dict):
        keys = list(value)
        if (index := _first_refused(keys, arguments[0])) is not None:
            return place + key_step(keys[index]), f"must have a key that is {_described(arguments[0])}"
        if (index := _first_refused(list(value.values()), arguments[1])) is not None:
            return _locate(value[keys[index]], arguments[1], place + key_step(keys[index]))
    elif isinstance(value, list) and (origin is list or (origin is tuple and ... in arguments)):
        if (index := _first_refused(value, arguments[0])) is not None:
            return _locate(value[index], arguments[0], place + key_step(index))
    elif isinstance(value, list) and origin is tuple and len(value) == len(arguments):
        index = next(index for index, own in enumerate(arguments) if not _fits(value[index], own))
        return _locate(value[index], arguments[index], place + key_step(index))
    return place, f"must be {_described(schema)}, got {shown(value)}"


def _locate_field(value: dict[str, Any], kind: type[msgspec.Struct], place: str) -> tuple[str, str]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, own in value.items():
        if key in fields and not _fits(own, fields[key].type):
            return _locate(own, fields[key].type, f"{place}.{key}")
    if kind.__struct_config__.forbid_unknown_fields and not value.keys() <= fields.keys():
        unknown = next(key for key in value if key not in fields)
        return place + key_step(unknown), f"is unknown. Known are {', '.join(fields)}"
    missing = next(field.encode_name for field in _required(kind) if field.encode_name not in value)
    return f"{place}.{missing}", "is missing"


def _required(kind: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    return [field for field in msgspec.structs.fields(kind) if field.required]


def _only_kind(schema: Any) -> Any:
    """Return a type without its limits, and without the alternative that it is null or left out."""
    bare = get_args(schema)[0] if get_origin(schema) is Annotated else schema
    if get_origin(bare) in (Union, UnionType):
        kinds = [own for own in get_args(bare) if own not in (NoneType, msgspec.UnsetType)]
        return _only_kind(kinds[0]) if len(kinds) == 1 else bare
    return bare


def _described(schema: Any) -> str:
    """Return what values of a type are, for a message."""
    limits = next((own for own in get_args(schema)[1:] if isinstance(own, Meta)), Meta())
    bare = get_args(schema)[0] if get_origin(schema) is Annotated else schema
    arguments = get_args(bare)
    if get_origin(bare) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_described(own) for own in arguments if own is not msgspec.UnsetType))
    if get_origin(bare) is Literal:
        return " or ".join(map(shown, arguments))
    if get_origin(bare) is tuple and ... not in arguments:
        return f"a list of {len(arguments)} entries"
    words = {
        bool: "true or false", int: "a whole number", float: "a finite number", str: "text", list: "a list",
        tuple: "a list", NoneType: "null",
    }  # fmt: skip
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        return f"an object with the fields {', '.join(field.encode_name for field in _required(bare))}"
    return words.get(get_origin(bare) or bare, "an object") + _range(limits)


def _range(limits: Meta) -> str:
    if limits.min_length is not None:
        most = "" if limits.max_length is None else f" to {limits.max_length}"
        return f" of {limits.min_length}{most} entries" if most else f" of at least {limits.min_length} entries"
    if limits.max_length is not None:
        return f" of at most {limits.max_length} characters"
    if limits.ge in (None, -_LARGEST):
        return ""
    return f" of at least {limits.ge}" if limits.le in (None, _LARGEST) else f" from {limits.ge} to {limits.le}"
