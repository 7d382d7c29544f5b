"""Standard codebooks by name, such as ``nf4``, and codebooks without a standard name as JSON or text."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from lqlora._annotations import annotated
from lqlora.codebooks.abnormal import AF4, abnormal_float
from lqlora.codebooks.codebook import Codebook
from lqlora.codebooks.dynamic import dynamic8
from lqlora.codebooks.geometric import logarithmic
from lqlora.codebooks.integers import affine, uniform
from lqlora.codebooks.normal import normal_float
from lqlora.codebooks.optimal import block_optimal
from lqlora.codebooks.small_floats import FP4_BNB, fp4, small_float
from lqlora.codebooks.student import student_float
from lqlora.codebooks.trellis import trellis_code
from lqlora.errors import FormatError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "by_name",
    "check_work",
    "codebook_from_json",
    "codebook_from_text",
    "codebook_to_json",
    "codebook_to_text",
    "is_standard",
]


class _Family(NamedTuple):
    """A family of names: its text for messages, its pattern, and the function called with the numbers in the name.

    ``is_slow`` is true if the levels are solved for: that takes up to 0.1 s, and there are 2**32 such codebooks.
    """

    spelling: str
    pattern: str
    make: Callable[..., Codebook]
    is_slow: bool = False


#: Levels that may be solved for to read a document, and levels that take as long as the density of a block size.
_MAX_WORK, _WORK = 4096, 16

_DIGIT, _NUMBER = "([0-9])", "([1-9][0-9]{0,9})"

_FAMILIES = (
    _Family("nf2…nf8", f"nf{_DIGIT}", normal_float),
    _Family("int2…int8", f"int{_DIGIT}", uniform),
    _Family("int2s…int8s", f"int{_DIGIT}s", functools.partial(uniform, normalization="signed")),
    _Family("uint1…uint8", f"uint{_DIGIT}", functools.partial(uniform, signed=False)),
    _Family("affine1…affine8", f"affine{_DIGIT}", affine),
    _Family("affine{bits}-{zero point bits}", f"affine{_DIGIT}-{_NUMBER}", affine),
    _Family("e{exponent bits}m{mantissa bits}", f"e{_DIGIT}m{_DIGIT}", small_float),
    _Family("fp4", "fp4", fp4),
    _Family("fp4-bnb", "fp4-bnb", lambda: FP4_BNB),
    _Family("dynamic8", "dynamic8", dynamic8),
    _Family("udynamic8", "udynamic8", functools.partial(dynamic8, signed=False)),
    _Family("log3…log8", f"log{_DIGIT}", logarithmic),
    _Family("af4", "af4", lambda: AF4),
    _Family("af{bits}-{block size}", f"af{_DIGIT}-{_NUMBER}", abnormal_float, is_slow=True),
    _Family("bof{bits}-{block size}", f"bof{_DIGIT}-{_NUMBER}", block_optimal, is_slow=True),
    _Family(
        "bof{bits}s-{block size}",
        f"bof{_DIGIT}s-{_NUMBER}",
        functools.partial(block_optimal, signed=True),
        is_slow=True,
    ),
    _Family("sf2…sf8", f"sf{_DIGIT}", student_float),
    _Family("sf{bits}-{degrees of freedom}", f"sf{_DIGIT}-{_NUMBER}", student_float),
    _Family("tcq1…tcq4", f"tcq{_DIGIT}", trellis_code),
    _Family("tcq{bits}-{state bits}", f"tcq{_DIGIT}-{_NUMBER}", trellis_code),
)


@annotated
def by_name(name: str) -> Codebook:
    """Return the standard codebook of a name, which formats, plans and files use.

    Parameters
    ----------
    name : str
        Name that a function of ``lqlora.codebooks`` gives to its result: ``nf4``, ``int8``, ``uint8``, ``affine4``,
        ``affine2-4``, ``e2m1``, ``fp4``, ``fp4-bnb``, ``dynamic8``, ``udynamic8``, ``log8``, ``af4``, ``af4-128``, ``bof4-64``,
        ``bof4s-64``, ``sf4``, ``sf4-3``, ``tcq2``, ``tcq2-12``, …

    Returns
    -------
    Codebook
        The codebook. Functions cache their last results, so equal names usually give the same object.

    Raises
    ------
    FormatError
        If the name is unknown, or a number in it is out of range.

    Examples
    --------
    >>> from lqlora.codebooks import NF4
    >>> by_name("nf4") is NF4, by_name("bof4s-64").normalization
    (True, 'signed')
    """
    family, numbers = _split(name)
    try:
        return family.make(*numbers)
    except InvalidArgumentError as error:
        raise FormatError(f"codebook {name!r} does not exist: {error}") from None


@functools.lru_cache(maxsize=256)
def _split(name: str) -> tuple[_Family, tuple[int, ...]]:
    """Return the family of a name and the numbers in it. Results are cached: a file names a codebook per matrix."""
    for family in _FAMILIES:
        match = re.fullmatch(family.pattern, name)
        if match is not None:
            return family, tuple(map(int, match.groups()))
    known = ", ".join(family.spelling for family in _FAMILIES)
    raise FormatError(f"codebook must be one of {known}, got {name[:40]!r}.")


def check_work(names: Iterable[str]) -> None:
    """Raise if the levels of the codebooks that a document names would take long to compute.

    The levels of ``af{bits}-{block size}`` and ``bof{bits}-{block size}`` are solved for, which takes milliseconds for
    each codebook, and up to 0.1 s for 8 bits. A short document could name any number of them.

    Parameters
    ----------
    names : iterable of str
        Names of codebooks. Those of other families are ignored.

    Raises
    ------
    FormatError
        If the different codebooks of these two families have too many levels.

    Examples
    --------
    >>> check_work(["nf4", "bof4-64", "bof4-64", "bof4-128"])
    """
    slow = [family.pattern for family in _FAMILIES if family.is_slow]
    matches = [re.fullmatch("|".join(slow), name) for name in dict.fromkeys(names)]
    # Time is proportional to the number of levels, after the density has been computed.
    work = [_WORK + 2 ** int(next(filter(None, match.groups()))) for match in matches if match is not None]
    if sum(work) > _MAX_WORK:
        raise FormatError(
            f"codebooks of one document that are computed for a block size may have {_MAX_WORK} levels together, where "
            f"each codebook counts {_WORK} more, got {len(work)} codebooks with {sum(work)}."
        )


@annotated
def is_standard(codebook: Codebook) -> bool:
    """Return whether a codebook can be restored from its name alone.

    Parameters
    ----------
    codebook : Codebook
        Any codebook.

    Returns
    -------
    bool
        True if :func:`by_name` returns the same levels and normalization for its name.

    Examples
    --------
    >>> from lqlora.codebooks import NF4, Codebook
    >>> is_standard(NF4), is_standard(Codebook([-1, 0, 1], name="nf4"))
    (True, False)
    """
    try:
        return by_name(codebook.name) == codebook
    except FormatError:
        return False


@annotated
def codebook_to_json(codebook: Codebook) -> dict[str, Any]:
    """Return the JSON fields that restore a codebook together with its name.

    A format as text contains the name of its codebook, so documents add only these fields.

    Parameters
    ----------
    codebook : Codebook
        Any codebook.

    Returns
    -------
    dict
        Empty if :func:`by_name` restores the codebook. Otherwise ``"levels"``, a list of numbers that float32 holds
        exactly, and ``"normalization"``.

    Examples
    --------
    >>> from lqlora.codebooks import NF4, Codebook
    >>> codebook_to_json(NF4), codebook_to_json(Codebook([-1, 0, 1], name="ternary"))
    ({}, {'levels': [-1.0, 0.0, 1.0], 'normalization': 'absmax'})
    """
    if is_standard(codebook):
        return {}
    return {"levels": codebook.levels.tolist(), "normalization": codebook.normalization}


def codebook_from_json(name: str, document: Mapping[str, Any]) -> Codebook | None:
    """Read the fields that :func:`codebook_to_json` writes.

    Parameters
    ----------
    name : str
        Name of the codebook, as ``lqlora.formats.codebook_name`` finds it in the text of a format.
    document : mapping
        Any JSON object. Fields other than ``"levels"`` and ``"normalization"`` are ignored.

    Returns
    -------
    Codebook or None
        None if the object has neither field: the name then stands for a standard codebook.

    Raises
    ------
    InvalidArgumentError
        If one of the two fields is missing, or the fields do not describe a codebook.

    Examples
    --------
    >>> codebook_from_json("ternary", {"levels": [-1, 0, 1], "normalization": "absmax"}).levels.tolist()
    [-1.0, 0.0, 1.0]
    >>> codebook_from_json("nf4", {"rank": 8}) is None
    True
    """
    fields = {key: document[key] for key in ("levels", "normalization") if key in document}
    if not fields:
        return None
    if len(fields) < 2:
        raise InvalidArgumentError(f"levels and normalization of codebook {name!r} must both be given, got {fields!r}.")
    levels = fields["levels"]
    if not isinstance(levels, list) or any(isinstance(own, bool) or not isinstance(own, int | float) for own in levels):
        raise InvalidArgumentError(f"levels of codebook {name!r} must be a list of numbers, got {str(levels)[:80]}.")
    return Codebook(levels, name, fields["normalization"])


@annotated
def codebook_to_text(codebook: Codebook) -> str | None:
    """Return the text that restores a codebook together with its name.

    Parameters
    ----------
    codebook : Codebook
        Any codebook.

    Returns
    -------
    str or None
        Normalization and levels, separated by spaces. None if :func:`by_name` restores the codebook.

    Examples
    --------
    >>> from lqlora.codebooks import Codebook
    >>> codebook_to_text(Codebook([-1, 0, 1], name="ternary"))
    'absmax -1.0 0.0 1.0'
    """
    fields = codebook_to_json(codebook)
    return " ".join([fields["normalization"], *map(repr, fields["levels"])]) if fields else None


def codebook_from_text(name: str, text: str | None) -> Codebook | None:
    """Read the text that :func:`codebook_to_text` writes.

    Parameters
    ----------
    name : str
        Name of the codebook.
    text : str or None
        Normalization and levels, separated by spaces.

    Returns
    -------
    Codebook or None
        None if there is no text: the name then stands for a standard codebook.

    Raises
    ------
    FormatError
        If the text does not describe a codebook.

    Examples
    --------
    >>> codebook_from_text("ternary", "absmax -1.0 0.0 1.0").levels.tolist()
    [-1.0, 0.0, 1.0]
    """
    if text is None:
        return None
    normalization, *levels = text.split() or [""]
    try:
        return Codebook([float(level) for level in levels], name, normalization)  # type: ignore[arg-type]
    except ValueError as error:  # of float() or of the codebook
        raise FormatError(
            f"codebook must be a normalization and levels, such as 'absmax -1.0 0.0 1.0', got {text[:80]!r}: {error}"
        ) from None
