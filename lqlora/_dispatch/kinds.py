"""Kinds of arrays: which arguments are computed with, and why others are refused.

A class decides most of it: masked arrays, matrices and tensors that hide their entries are refused by their class. The
rest needs the array itself, namely its dtype, and the layout of a tensor. :class:`Dtypes` caches the answers, so that the
question costs one look-up. All sentences about arrays that are refused are written in this module.
"""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "FLOATS",
    "NUMBERS",
    "STORABLE",
    "STORABLE_FLOATS",
    "Dtypes",
    "class_fault",
    "facts_of",
    "fault_of",
    "is_native",
    "spelled",
]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

#: Attributes of a tensor that decide whether it is a dense array with entries.
_TENSOR = attrgetter("dtype", "layout", "is_meta", "is_nested")
_DTYPE = attrgetter("dtype")


def _typed_dtype(array: Any) -> tuple[type, Any]:
    """Return the dtype behind its class: comparing dtypes of two libraries may raise."""
    return type(array.dtype), array.dtype


def spelled(dtype: Any) -> str:
    """Return the name of a dtype without the name of its library.

    Parameters
    ----------
    dtype : object
        A dtype of any library.

    Returns
    -------
    str
        Name, such as ``"float32"``. NumPy's dtypes in another byte order keep their sign: ``">f4"``.
    """
    return str(dtype).rpartition(".")[2]


def is_native(dtype: Any) -> bool:
    """Return whether a dtype has the byte order of this machine.

    Parameters
    ----------
    dtype : object
        A dtype of any library.

    Returns
    -------
    bool
        True for libraries that have one byte order.
    """
    return bool(getattr(dtype, "isnative", True))


class Dtypes:
    """Dtypes that a function computes with, and caches of the answers for the arrays that it is given.

    Parameters
    ----------
    names : tuple of str or None
        Names of the dtypes. None takes every dtype that stands for numbers.
    sentence : str
        The dtypes in words, for errors.
    takes_meta : bool, default False
        Whether tensors on the device meta are taken: arrays are moved then, and not computed with.

    Attributes
    ----------
    taken : tuple of dict
        Answers by the facts of an array, for NumPy and CuPy, for torch, and for other libraries.
    """

    def __init__(self, names: tuple[str, ...] | None, sentence: str, *, takes_meta: bool = False) -> None:
        self.names, self.sentence, self.takes_meta = names, sentence, takes_meta
        self.taken = (_Answers(self._takes_dtype), _Answers(self._takes_tensor), _Answers(self._takes_name))

    def _takes_dtype(self, dtype: Any) -> bool:
        if self.names is None:
            return dtype.isbuiltin == 2 or (dtype.kind in "biufc" and is_native(dtype))  # 2: dtypes of ml_dtypes
        return dtype.name in self.names and is_native(dtype)

    def _takes_tensor(self, facts: tuple[Any, Any, bool, bool]) -> bool:
        dtype, layout, is_meta, is_nested = facts
        if str(layout) != "torch.strided" or is_nested or (is_meta and not self.takes_meta):
            return False
        return self._takes_name((type(dtype), dtype))

    def _takes_name(self, facts: tuple[type, Any]) -> bool:
        name = spelled(facts[1])
        return name in self.names if self.names is not None else not name.startswith(("qint", "quint", "bits"))


class _Answers(dict[Any, bool]):
    """Cache of answers: the first question computes the answer, later ones cost one look-up."""

    def __init__(self, answer: Callable[[Any], bool]) -> None:
        self._answer = answer

    # Dtypes and layouts are few, so the cache is not bounded.
    def __missing__(self, facts: Any) -> bool:
        self[facts] = answer = self._answer(facts)
        return answer


#: The dtypes that lqlora computes with. Complex numbers, bool, extended precision and float8 are in none of its formulas.
NUMBERS = Dtypes((*_FLOATS, *_INTEGERS), f"{', '.join(_FLOATS)} or an integer dtype")
FLOATS = Dtypes(_FLOATS, "float16, bfloat16, float32 or float64")
STORABLE = Dtypes(None, "a dtype of numbers", takes_meta=True)
STORABLE_FLOATS = Dtypes(_FLOATS, FLOATS.sentence, takes_meta=True)


def facts_of(library: str | None) -> tuple[int, Callable[[Any], Any]]:
    """Return where :class:`Dtypes` keeps the answers for a library, and the function of an array that they depend on.

    Parameters
    ----------
    library : str or None
        Name of the library.

    Returns
    -------
    tuple of int and callable
        Index in ``Dtypes.taken``, and a function, which is one in C for NumPy, CuPy and torch.
    """
    if library == "torch":
        return 1, _TENSOR
    return (0, _DTYPE) if library in ("numpy", "cupy") else (2, _typed_dtype)


def class_fault(cls: type) -> str:
    """Return why no array of a class is computed with, or an empty text.

    Parameters
    ----------
    cls : type
        Class of an argument.

    Returns
    -------
    str
        What the argument must be, what it is, and what to do: a sentence without its subject. Empty for classes of
        NumPy and torch that are computed with, and for classes of other libraries.
    """
    masked, matrix, tensor = _imported("numpy.ma:MaskedArray"), _imported("numpy:matrix"), _imported("torch:Tensor")
    if masked is not None and issubclass(cls, masked):
        return "must not be a masked array, whose masked entries have no values. Fill it first, with x.filled(value)."
    if matrix is not None and issubclass(cls, matrix):
        return "must not be a numpy.matrix, whose products have another meaning. Pass numpy.asarray(x)."
    if tensor is None or not issubclass(cls, tensor):
        return ""
    hides = getattr(cls, "__torch_dispatch__", None) is not tensor.__torch_dispatch__
    if hides or any(base.__name__ == "UninitializedTensorMixin" for base in cls.__mro__):
        return (
            f"must be a plain tensor with entries, got {_class_name(cls)}, which has none of its own. Pass the tensor that "
            "it stands for."
        )
    return ""


def fault_of(value: Any, library: str | None, dtypes: Dtypes) -> str:
    """Return why an argument is not computed with, or an empty text.

    Parameters
    ----------
    value : object
        The argument.
    library : str or None
        Its library; None for what is not an array.
    dtypes : Dtypes
        The dtypes that are computed with.

    Returns
    -------
    str
        A sentence without its subject, such as ``"must be a dense tensor, got layout torch.sparse_coo. …"``.
    """
    if fault := class_fault(type(value)):
        return fault
    if library is None:
        return (
            f"must be an array of NumPy, torch, CuPy or another array API library, got {_class_name(type(value))}. "
            "Convert it first, as numpy.asarray does."
        )
    at, facts = facts_of(library)
    if dtypes.taken[at][facts(value)]:
        return ""
    return (_tensor_fault(value) if library == "torch" else "") or _dtype_fault(value.dtype, dtypes)


def _tensor_fault(tensor: Any) -> str:
    if tensor.is_nested:
        return "must be a tensor of one shape, got a nested tensor. Pass the tensors of x.unbind() one by one."
    if tensor.is_meta:
        return "must be a tensor with entries, got one on the device meta. Load its values first."
    if str(tensor.layout) != "torch.strided":
        return f"must be a dense tensor, got one of layout {spelled(tensor.layout)}. Pass x.to_dense()."
    return ""


def _dtype_fault(dtype: Any, dtypes: Dtypes) -> str:
    name = spelled(dtype)
    if not is_native(dtype):
        return f"must have the byte order of this machine, got {name[:40]}. Pass x.astype(x.dtype.newbyteorder('='))."
    if name.startswith(("qint", "quint")):
        return f"must be {dtypes.sentence}, got {name}. Pass x.dequantize()."
    return f"must be {dtypes.sentence}, got {name[:80]}."


def _class_name(cls: type) -> str:
    """Return the name of a class with the package that it comes from."""
    package = cls.__module__.partition(".")[0]
    return cls.__name__[:80] if package == "builtins" else f"{package}.{cls.__name__}"[:80]


def _imported(place: str) -> Any:
    """Return a class of a module, or None if the module is not imported: there are no objects of the class then."""
    module, _, name = place.partition(":")
    return getattr(sys.modules.get(module), name, None)
