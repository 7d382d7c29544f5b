"""Selecting matrices and layers by name: names, endings, shell patterns, regular expressions, functions, and exclusions."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from lqlora._messages import shown
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

T = TypeVar("T")

__all__ = [
    "DENSE_BY_NAME",
    "EMBEDDINGS",
    "OUTPUT_HEADS",
    "ROUTERS",
    "VECTORS",
    "NameIndex",
    "Pattern",
    "Patterns",
    "as_patterns",
    "list_names",
    "matches",
    "predicate_of_any",
    "select",
    "shown_patterns",
    "values_by_name",
]

#: A name or its end, a shell pattern, a compiled regular expression that matches the whole name, or a function of it.
Pattern: TypeAlias = "str | re.Pattern[str] | Callable[[str], bool]"

#: One pattern or several.
Patterns: TypeAlias = "Pattern | Iterable[Pattern]"

#: Embeddings are matrices of a model file, but not linear layers. ``wte`` and ``wpe`` are those of GPT-2, ``shared`` that of T5.
EMBEDDINGS: tuple[str, ...] = ("*embed*", "wte", "wpe", "shared", "relative_attention_bias")

#: Output heads of a model file stay as they are unless a caller asks for them: they are few, sensitive, and often tied to
#: the embedding. In a torch model the role of a layer decides (lqlora.nn.selection).
OUTPUT_HEADS: tuple[str, ...] = (
    "lm_head", "score", "classifier", "*classifier.*", "qa_outputs", "*classification_head.*", "*predictions.*",
)  # fmt: skip

#: Routers of experts are small, and a wrong choice of experts costs more than a wrong weight.
ROUTERS: tuple[str, ...] = ("*.gate", "*.gate.*", "router", "*.router.*", "shared_expert_gate")

#: Norms of heads and biases of experts have two dimensions in some models, and do not belong to linear layers. ``A_log`` belongs to
#: state-space models.
VECTORS: tuple[str, ...] = ("*norm", "*bias", "A_log")

#: Matrices of a model file that stay dense unless a caller asks for them.
DENSE_BY_NAME: tuple[str, ...] = (*EMBEDDINGS, *OUTPUT_HEADS, *ROUTERS, *VECTORS)


#: Characters that make a string a shell pattern.
_WILDCARDS = re.compile(r"[*?[]")


def as_patterns(patterns: Patterns, parameter: str = "include") -> tuple[Pattern, ...]:
    """Return one pattern, or several, as a tuple.

    Parameters
    ----------
    patterns : pattern or iterable of patterns
        One pattern, or several in any iterable.
    parameter : str, default "include"
        Argument that the patterns come from, for errors.

    Returns
    -------
    tuple of patterns
        The patterns in the same order.

    Raises
    ------
    InvalidArgumentError
        If one of them is not a string, a compiled regular expression or a callable.
    """
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        return (patterns,)
    found = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    for own in found:
        if not (isinstance(own, str | re.Pattern) or callable(own)):
            raise InvalidArgumentError(
                f"{parameter} must be a string, a compiled regular expression, a function of names, or several of them, "
                f"got {shown(own)}."
            )
    return found


def matches(name: str, pattern: Pattern) -> bool:
    """Return whether a name matches a pattern.

    Parameters
    ----------
    name : str
        Name of a matrix or layer.
    pattern : pattern
        A name is also a pattern for itself, whatever characters it has. A string without wildcards also matches the names
        that end with it after a dot.

    Returns
    -------
    bool
        True if the whole name matches.

    Examples
    --------
    >>> matches("layers.0.q", "layers.*.q"), matches("layers.0.q", re.compile("layers")), matches("a[0]", "a[0]")
    (True, False, True)
    >>> matches("layers.0.q", "q"), matches("layers.0.seq", "q")
    (True, False)
    """
    return name == pattern or bool(_predicate(pattern)(name))


def select(
    names: Collection[str],
    include: Patterns = "*",
    exclude: Patterns = (),
    *,
    what: str = "matrix",
    where: str = "",
    parameter: str = "include",
) -> list[str]:
    """Return the names that one of ``include`` matches and none of ``exclude`` does.

    A pattern may match nothing as long as another one selects a name. :class:`NameIndex` is stricter.

    Parameters
    ----------
    names : collection of str
        Names to select from.
    include, exclude : pattern or iterable of patterns
        Names or their ends (``"q_proj"``), shell patterns (``"*.attention.*"``), compiled regular expressions that match
        the whole name, or functions of it. A string that is one of the names stands for this name alone.
    what : str, default "matrix"
        Noun for one of the names, such as ``"linear layer"``, for errors.
    where : str, optional
        Owner of the names, such as ``" of model.safetensors"``, for errors.
    parameter : str, default "include"
        Argument that ``include`` comes from, for errors.

    Returns
    -------
    list of str
        Selected names, in the order of ``names``.

    Raises
    ------
    InvalidArgumentError
        If no name is selected, or a pattern is not one. The message gives the patterns and some of the names.

    Examples
    --------
    >>> select(["layers.0.q", "layers.0.k", "lm_head"], "*", ["*.k", *OUTPUT_HEADS])
    ['layers.0.q']
    """
    wanted, unwanted = as_patterns(include, parameter), as_patterns(exclude, "exclude")
    is_wanted, is_unwanted = predicate_of_any(wanted, names), predicate_of_any(unwanted, names)
    found = [name for name in names if is_wanted(name) and not is_unwanted(name)]
    if not found:
        but = f" without exclude={shown_patterns(unwanted)}" if unwanted else ""
        raise InvalidArgumentError(
            f"{parameter} must select a {what}{where}, but {shown_patterns(wanted)}{but} selects none of {len(names)} "
            f"({list_names(names)})."
        )
    return found


class NameIndex:
    """Index of named rows, which finds the rows that a pattern matches. A pattern without a match is an error.

    Parameters
    ----------
    names : sequence of str
        Names in the order of the rows. They must differ.
    what : str, default "matrix"
        Noun for one row, such as ``"matrix"``, for errors.

    Examples
    --------
    >>> NameIndex(["layers.0.q", "layers.0.k", "layers.1.q"]).rows("*.q", exclude="layers.0.*")
    [2]
    """

    def __init__(self, names: Sequence[str], what: str = "matrix") -> None:
        self.names = names
        self._row = dict(zip(names, range(len(names)), strict=True))
        self._what = what

    def rows(self, include: Patterns, exclude: Patterns = (), *, parameter: str = "include") -> list[int]:
        """Return the rows that one of ``include`` matches and none of ``exclude`` does.

        Parameters
        ----------
        include, exclude : pattern or iterable of patterns
            A string that is one of the names stands for this name alone. Another string without wildcards matches the
            names that end with it after a dot.
        parameter : str, default "include"
            Argument that the patterns of ``include`` come from, for errors.

        Returns
        -------
        list of int
            Sorted; empty if ``exclude`` leaves nothing.

        Raises
        ------
        InvalidArgumentError
            If one of the patterns matches no name.
        """
        wanted = {row for own in as_patterns(include, parameter) for row in self._matching(own, parameter)}
        if unwanted := as_patterns(exclude, "exclude"):
            wanted -= {row for own in unwanted for row in self._matching(own, "exclude")}
        return sorted(wanted)

    def _matching(self, pattern: Pattern, parameter: str) -> list[int]:
        # A tie may list thousands of names, one pattern each. A dict finds a name without comparing it with all others.
        if isinstance(pattern, str) and pattern in self._row:
            return [self._row[pattern]]
        predicate = _predicate(pattern)
        found = [row for name, row in self._row.items() if predicate(name)]
        if not found:
            raise InvalidArgumentError(
                f"{parameter} must match {'an' if self._what[0] in 'aeiou' else 'a'} {self._what}, but {shown_patterns(pattern)} matches none of {len(self._row)} "
                f"({list_names(self._row)})."
            )
        return found


def values_by_name(
    given: Mapping[Pattern, T] | Callable[[str], T], names: Sequence[str], *, parameter: str, what: str
) -> dict[str, T]:
    """Return the value of each name, from a mapping of patterns to values or a function of the name.

    Parameters
    ----------
    given : mapping of pattern to value, or callable
        The first pattern that matches a name gives its value, unless the name itself is a key. Every key must match.
    names : sequence of str
        Names that need values.
    parameter : str
        Argument that the mapping comes from, for errors.
    what : str
        Noun for one of the names, for errors.

    Returns
    -------
    dict of str to value
        Values in the order of the names. Names that no key matches are missing.

    Raises
    ------
    InvalidArgumentError
        If a key matches no name.

    Examples
    --------
    >>> values_by_name({"*.q": 8, "*": 16, "b.q": 4}, ["a.q", "b.q", "b.k"], parameter="rank", what="layer")
    {'a.q': 8, 'b.q': 4, 'b.k': 16}
    """
    if not isinstance(given, Mapping):
        return {name: given(name) for name in names}
    index = NameIndex(names, what)
    found: dict[int, T] = {}
    for pattern, value in given.items():
        rows = index.rows([pattern], parameter=parameter)
        for row in rows:
            if pattern == names[row]:
                found[row] = value
            else:
                found.setdefault(row, value)
    return {name: found[row] for row, name in enumerate(names) if row in found}


def shown_patterns(patterns: Patterns) -> str:
    """Return patterns as errors show them: functions by name, not by address.

    Parameters
    ----------
    patterns : pattern or iterable of patterns
        One pattern, or several.

    Returns
    -------
    str
        One pattern, or a list of several.

    Examples
    --------
    >>> shown_patterns(["*.q", str.isupper])
    "['*.q', function str.isupper]"
    """
    if isinstance(patterns, str | re.Pattern):
        return repr(patterns)
    if callable(patterns):
        return f"function {getattr(patterns, '__qualname__', type(patterns).__qualname__)}"
    listed = [*map(shown_patterns, patterns)]
    return listed[0] if len(listed) == 1 else f"[{', '.join(listed)}]"


def list_names(names: Collection[str], most: int = 5) -> str:
    """Return the first names and the number of the others, for errors and reports.

    Parameters
    ----------
    names : collection of str
        Names, such as those that a selection left out.
    most : int, default 5
        Largest number of names to list.

    Returns
    -------
    str
        Names separated by commas, or ``"there are none"``.

    Examples
    --------
    >>> list_names(["q", "k", "v"], 2), list_names([])
    ('q, k and 1 more', 'there are none')
    """
    listed = ", ".join([*names][:most]) or "there are none"
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")


def predicate_of_any(patterns: Sequence[Pattern], names: Collection[str]) -> Callable[[str], bool]:
    """Return a predicate that is true for names that at least one of the patterns matches.

    Parameters
    ----------
    patterns : sequence of patterns
        Patterns. A string that is one of the names stands for this name alone.
    names : collection of str
        Names that the predicate will be asked about.

    Returns
    -------
    callable
        Function of a name.

    Examples
    --------
    >>> list(filter(predicate_of_any(["q", "b.k"], ["q", "a.q", "a.b.k"]), ["q", "a.q", "a.b.k"]))
    ['q', 'a.b.k']
    """
    # Exact names are compared as text, since a name may hold characters that patterns give a meaning: as a shell pattern
    # "experts[0].w" matches "experts0.w" and not itself.
    exact = frozenset(names).intersection(own for own in patterns if isinstance(own, str))
    predicates = [_predicate(own) for own in patterns if not (isinstance(own, str) and own in exact)]
    return lambda name: name in exact or any(predicate(name) for predicate in predicates)


def _predicate(pattern: Pattern) -> Callable[[str], object]:
    """Return a predicate that is true for names that the pattern matches."""
    if not isinstance(pattern, str):
        return pattern.fullmatch if isinstance(pattern, re.Pattern) else pattern
    if not _WILDCARDS.search(pattern):
        ending = f".{pattern}"
        return lambda name: name == pattern or name.endswith(ending)
    # fnmatch.translate anchors its expression at the end, so `match` compares the whole name. fnmatch.fnmatch would
    # ignore upper and lower case on Windows, and a plan would depend on the system.
    return re.compile(fnmatch.translate(pattern)).match
