r"""4-bit weights of bitsandbytes (NF4 and FP4), read and written without bitsandbytes.

A state dict of bitsandbytes, or a safetensors file of one, has these tensors for a weight ``w`` of ``n`` entries in
``b = ceil(n / block size)`` blocks::

    w                                    uint8, (ceil(n / 2), 1)   codes, two in a byte, the first in the high half
    w.absmax                             float32 or uint8, (b,)    scales, or their codes under double quantization
    w.quant_map                          float32, (16,)            the levels by code
    w.nested_absmax                      float32, (ceil(b / 256),) scales of the scales
    w.nested_quant_map                   float32, (256,)           levels of the scales by code
    w.quant_state.bitsandbytes__nf4      uint8                     JSON: block size, dtype, shape, offset of the scales

The last key ends in ``fp4`` for FP4. FP4 codes are bit patterns whose first bit is the sign, so their order is not the
order of the levels. Only double quantization has the two nested tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, get_args

import array_api_compat
import numpy as np

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import namespace, plain_array
from lqlora._documents import LONGEST, Reader
from lqlora._messages import shortened, shown
from lqlora.codebooks import is_standard
from lqlora.errors import FormatError
from lqlora.formats import BlockFormat, ScaleFormat
from lqlora.integrations._schema import MOST_DIMENSIONS, BlockSize, Dtype, NestedState, State
from lqlora.quantized import QuantizedArray
from lqlora.quantized.array import require_quantized

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = [
    "BitsandbytesWeight",
    "described_shape",
    "find_bitsandbytes",
    "from_bitsandbytes",
    "layout_fault",
    "list_parts",
    "read_bitsandbytes",
    "to_bitsandbytes",
]

_DTYPES = get_args(Dtype)
#: Scales of double quantization: bitsandbytes subtracts the mean of all absmax values, then stores the differences as
#: codes of its signed dynamic map in blocks of 256. The mean is the offset of ``d8``.
_NESTED = "d8/256:float32"
_STATE = ".quant_state.bitsandbytes__"

#: Codebook, and bitsandbytes' codes in ascending order of their levels, by bitsandbytes' name. FP4 has two zeros: code 8
#: (negative) comes before code 0.
_KINDS = {
    "nf4": ("nf4", tuple(range(16))),
    "fp4": ("fp4-bnb", (11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3)),
}

#: bitsandbytes' code of the level zero. It fills the low half of the last byte if the number of codes is odd.
_ZERO = {"nf4": 7, "fp4": 0}


@dataclass(frozen=True, eq=False)
class BitsandbytesWeight:
    """A weight that was read from a state dict of bitsandbytes.

    Parameters
    ----------
    quantized : QuantizedArray
        Codes and scales.
    dtype : {"float32", "float16", "bfloat16"}
        Dtype of the weight before it was quantized. bitsandbytes decodes to it.
    """

    quantized: QuantizedArray
    dtype: str


@annotated
def find_bitsandbytes(tensors: Mapping[str, Array]) -> list[str]:
    """Return the names of the 4-bit weights in a state dict.

    Parameters
    ----------
    tensors : mapping of str to array
        A state dict. Only its keys are read.

    Returns
    -------
    list of str
        Names such as ``"model.layers.0.mlp.up_proj.weight"``, in the order of the state dict.

    Examples
    --------
    >>> find_bitsandbytes({"up.weight": None, "up.weight.quant_state.bitsandbytes__nf4": None, "norm.weight": None})
    ['up.weight']
    """
    described = re.compile(rf"(.+){re.escape(_STATE)}(?:{'|'.join(_KINDS)})", re.DOTALL)
    return list(dict.fromkeys(match[1] for match in map(described.fullmatch, tensors) if match))


@annotated
def list_parts(tensors: Collection[str], name: str) -> list[str]:
    """Return the names of the tensors that store one 4-bit weight. The time does not depend on the number of tensors.

    Parameters
    ----------
    tensors : set or mapping of str
        Names of the tensors of a state dict.
    name : str
        Name of the weight.

    Returns
    -------
    list of str
        Those names of the layout that are among ``tensors``.

    Examples
    --------
    >>> list_parts({"up.weight", "up.weight.absmax", "down.weight.absmax"}, "up.weight")
    ['up.weight', 'up.weight.absmax']
    """
    ends = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *(f"{_STATE}{kind}" for kind in _KINDS))
    return [name + end for end in ends if name + end in tensors]


@annotated
def described_shape(description: Array, *, is_nested: bool = False) -> tuple[int, ...]:
    """Return the shape of a 4-bit weight from its description, without its codes.

    Parameters
    ----------
    description : array of uint8
        The tensor whose name ends in ``quant_state.bitsandbytes__nf4`` or ``__fp4``: JSON.
    is_nested : bool, default False
        Whether the weight has a tensor ``nested_absmax``.

    Returns
    -------
    tuple of int
        Shape of the decoded weight.

    Raises
    ------
    FormatError
        If the description is not one of bitsandbytes.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.ones((4, 16), dtype=np.float32), lq.BlockFormat(lq.NF4, 64))
    >>> described_shape(to_bitsandbytes(q, "up.weight")["up.weight.quant_state.bitsandbytes__nf4"])
    (4, 16)
    """
    return tuple(_state_of(plain_array(description, "description"), "description", is_nested=is_nested)[1].shape)


def read_bitsandbytes(tensors: Mapping[str, Array]) -> Iterator[tuple[str, BitsandbytesWeight]]:
    """Yield each 4-bit weight of a state dict of bitsandbytes with its name.

    Each key is visited once. :func:`from_bitsandbytes` visits all of them for one weight.

    Parameters
    ----------
    tensors : mapping of str to array
        A state dict, or the tensors of a safetensors file, of any array library. Other tensors are ignored.

    Yields
    ------
    tuple of str and BitsandbytesWeight
        Name and weight, in the order of :func:`find_bitsandbytes`. A weight is read when it is asked for, and may raise what
        :func:`from_bitsandbytes` does.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.linspace(-1, 1, 64, dtype=np.float32), lq.BlockFormat(lq.NF4, 64))
    >>> [name for name, weight in read_bitsandbytes(to_bitsandbytes(q, "a") | to_bitsandbytes(q, "b"))]
    ['a', 'b']
    """
    keys: dict[str, list[str]] = {name: [] for name in find_bitsandbytes(tensors)}
    for key in tensors:
        begins = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        for name in (*begins, key):
            if name in keys:
                keys[name].append(key)
    for name, own in keys.items():
        yield name, from_bitsandbytes({key: tensors[key] for key in own}, name)


@annotated
def from_bitsandbytes(tensors: Mapping[str, Array], name: str = "weight") -> BitsandbytesWeight:
    """Read one 4-bit weight from a state dict of bitsandbytes.

    All keys are visited, to refuse those of the weight that are unknown. Use :func:`read_bitsandbytes` for many weights.

    Parameters
    ----------
    tensors : mapping of str to array
        A state dict, or the tensors of a safetensors file, of any array library. Tensors of other weights are ignored.
    name : str, default "weight"
        Name of the weight, such as ``"model.layers.0.mlp.up_proj.weight"``.

    Returns
    -------
    BitsandbytesWeight
        Quantized array of the library and on the device of the tensors, and the dtype it had. The format is
        ``nf4/<block size>`` or ``fp4-bnb/<block size>`` with scales ``float32`` or ``d8/256:float32``. Scales share the
        memory of ``tensors``.

    Raises
    ------
    FormatError
        If a tensor is missing, unknown, or of a dtype or shape that differs from the layout, the description is not JSON
        of bitsandbytes, or a table of levels differs from the one that bitsandbytes writes.
    NonFiniteError
        If a scale is NaN or infinite.
    UnsupportedArrayError
        If a value is not an array.
    MixedArraysError
        If the tensors belong to two libraries.

    Notes
    -----
    Reading is lossless: :func:`to_bitsandbytes` returns the bytes that bitsandbytes wrote.

    Under double quantization bitsandbytes decodes a scale as ``level * nested_absmax + nested_offset``. Levels may be
    negative, so a small scale in the same block as a large one may decode to a negative number. Such a weight decodes to
    the same values as in bitsandbytes.

    References
    ----------
    NF4 and double quantization: QLoRA, arXiv 2305.14314, section 3. Codes of scales: Dettmers et al., 8-bit Optimizers
    via Block-wise Quantization, arXiv 2110.02861, section 2.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.linspace(-1, 1, 64, dtype=np.float32), lq.BlockFormat(lq.NF4, 64))
    >>> back = from_bitsandbytes(to_bitsandbytes(q))
    >>> str(back.quantized.format), back.dtype, bool((back.quantized.packed == q.packed).all())
    ('nf4/64:float32', 'float32', True)
    """
    parts = _parts_of(tensors, name)
    kind, state = _take_state(parts, name)
    shape, offset = tuple(state.shape), getattr(state, "nested_offset", None)
    codebook, order = _KINDS[kind]
    fmt = BlockFormat.parse(f"{codebook}/{state.blocksize}:{_NESTED if offset is not None else 'float32'}")
    count = prod(shape)
    blocks = -(-count // fmt.block_size)
    packed = _take(parts, name, "", "uint8", (-(-count // 2), 1))
    absmax = _take(parts, name, ".absmax", "uint8" if offset is not None else "float32", (blocks,))
    _check_table(_take(parts, name, ".quant_map", "float32", (16,)), _quant_map(fmt, order), f"{name}.quant_map")
    arrays = {"codes": _codes_from(packed, kind, count, name)}
    if offset is not None:
        arrays |= {"scales.codes": absmax} | _take_nested(parts, name, fmt, offset, blocks)
    else:
        arrays["scales"] = absmax
        ops.require_finite(absmax, f"{name}.absmax")
    if parts:
        raise FormatError(
            f"tensors must not include {shown(name + min(parts), 200)}, which is not part of the 4-bit layout of bitsandbytes."
        )
    try:
        quantized = QuantizedArray.from_arrays(arrays, fmt, shape)
    except FormatError as error:
        raise FormatError(
            shortened(f"Weight {shown(name, 150)} has values that its format does not have: {error}")
        ) from error
    return BitsandbytesWeight(quantized, state.dtype)


@annotated
def to_bitsandbytes(q: QuantizedArray, name: str = "weight", dtype: str = "float32") -> dict[str, Array]:
    """Return a quantized array as the tensors of a 4-bit weight of bitsandbytes.

    Parameters
    ----------
    q : QuantizedArray
        Array of codebook ``nf4`` or ``fp4-bnb``, in blocks of 32, 64, … 4096, with scales ``float32`` or
        ``d8/256:float32``.
    name : str, default "weight"
        Name of the weight, with which every key begins.
    dtype : {"float32", "float16", "bfloat16"}
        Dtype that bitsandbytes decodes the weight to.

    Returns
    -------
    dict of str to array
        Tensors listed in :mod:`lqlora.integrations.bitsandbytes`, of the library and on the device of ``q``.

    Raises
    ------
    FormatError
        If the layout does not have the codebook, block size, scales or dtype, or cannot hold the array: one without
        dimensions, a stack, fitted levels, or blocks along an axis that are not those of the row-major order.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.linspace(-1, 1, 8, dtype=np.float32), lq.BlockFormat(lq.NF4, 64))
    >>> for key, array in to_bitsandbytes(q, "up.weight", "bfloat16").items():
    ...     print(key, array.shape)
    up.weight (4, 1)
    up.weight.absmax (1,)
    up.weight.quant_map (16,)
    up.weight.quant_state.bitsandbytes__nf4 (73,)
    """
    require_quantized(q)
    kind = _require_exportable(q, dtype)
    order = _KINDS[kind][1]
    stored = q.to_arrays()
    for key in ("scales", "scales.scales", "scales.offset"):
        if key in stored:
            ops.require_finite(stored[key], key)
    state = {"quant_type": kind, "blocksize": q.format.block_size, "dtype": dtype, "shape": list(q.shape)}
    arrays = {name: _codes_to(q.packed, kind, prod(q.shape))}
    tables = {"quant_map": _quant_map(q.format, order)}
    if isinstance(q.format.scales, ScaleFormat):
        arrays |= {f"{name}.absmax": stored["scales.codes"], f"{name}.nested_absmax": stored["scales.scales"]}
        tables["nested_quant_map"] = q.format.scales.format.codebook.levels
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        # A float64, which holds each float32, is written with the digits that restore it: no bit of the offset is lost.
        state["nested_offset"] = float(stored["scales.offset"][0])
    else:
        arrays[f"{name}.absmax"] = stored["scales"]
    arrays |= {f"{name}.{key}": _like(q.packed, table) for key, table in tables.items()}
    schema = NestedState if "nested_offset" in state else State
    text = Reader("q", FormatError).write(state, schema)
    arrays[f"{name}{_STATE}{kind}"] = _like(q.packed, np.frombuffer(text.encode(), dtype=np.uint8))
    return arrays


@annotated
def layout_fault(q: QuantizedArray) -> str:
    """Return why the layout of bitsandbytes cannot hold a quantized array; nothing if it can.

    Parameters
    ----------
    q : QuantizedArray
        Array of any library.

    Returns
    -------
    str
        The sentence with which :func:`to_bitsandbytes` would refuse it.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.ones(8, dtype=np.float32), lq.BlockFormat.parse("nf3/64:float32"))
    >>> layout_fault(q)
    'codebook must be nf4 or fp4-bnb for bitsandbytes, got nf3.'
    """
    require_quantized(q)
    try:
        _require_exportable(q, "float32")
    except FormatError as error:
        return str(error)
    return ""


def _require_exportable(q: QuantizedArray, dtype: str) -> str:
    """Return bitsandbytes' name of the codebook, or raise if its layout cannot hold the array."""
    fmt, shape = q.format, q.shape
    kinds = {codebook: kind for kind, (codebook, _) in _KINDS.items()}
    kind = kinds.get(fmt.codebook.name)
    if kind is None or not is_standard(fmt.codebook):
        raise FormatError(f"codebook must be {' or '.join(kinds)} for bitsandbytes, got {fmt.codebook.name}.")
    if fmt.block_size not in get_args(BlockSize):
        raise FormatError(f"block_size must be 32, 64, 128, … or 4096 for bitsandbytes, got {fmt.block_size}.")
    if str(fmt.scales) not in ("float32", _NESTED):
        raise FormatError(f"scales must be float32 or {_NESTED} for bitsandbytes, got {fmt.scales}.")
    if fmt.levels != "codebook":
        raise FormatError(
            f"levels must be those of the codebook for bitsandbytes, which cannot hold fitted ones, got {fmt}."
        )
    if fmt.rotation is not None:
        raise FormatError(f"rotation must be None for bitsandbytes, which stores weights as they are, got {fmt}.")
    if q.batch_shape:
        raise FormatError(
            f"q must be a single array for bitsandbytes, got a stack of shape {q.batch_shape}. Unstack it."
        )
    if not 1 <= len(shape) <= MOST_DIMENSIONS or max(shape) > LONGEST:
        raise FormatError(
            f"q must have 1 to {MOST_DIMENSIONS} dimensions for bitsandbytes, of at most {LONGEST} each, got shape "
            f"{shape}. Reshape it first."
        )
    if not _follows_rows(fmt, shape):
        raise FormatError(
            f"axis of blocks must be None for bitsandbytes, or the blocks those of the row-major order, got {fmt} for "
            f"shape {shape}."
        )
    if dtype not in _DTYPES:
        raise FormatError(f"dtype must be {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]} for bitsandbytes, got {dtype!r}.")
    return kind


def _follows_rows(fmt: BlockFormat, shape: tuple[int, ...]) -> bool:
    """Return whether blocks are those of the row-major order: no axis is moved, and no block ends early in a line."""
    if fmt.axis is None:
        return True
    lines, length = fmt.lines(shape)
    moved = prod(shape[fmt.axis % len(shape) + 1 :]) != 1
    return not moved and (lines == 1 or length % fmt.block_size == 0)


def _parts_of(tensors: Mapping[str, Array], name: str) -> dict[str, Array]:
    """Return the tensors of one weight, with its name removed from their keys."""
    if name not in tensors:
        raise FormatError(f"tensors must include {name!r}, which is missing.")
    parts = {
        key.removeprefix(name): plain_array(tensors[key], repr(key))
        for key in tensors
        if key == name or key.startswith(f"{name}.")
    }
    namespace(*parts.values())
    return parts


def _take(parts: dict[str, Array], name: str, key: str, dtype: str, shape: tuple[int, ...]) -> Array:
    if key not in parts:
        raise FormatError(f"tensors must include {shown(name + key, 200)}, which is missing.")
    array = parts.pop(key)
    found = ops.dtype_name(array), tuple(array.shape)
    if found != (dtype, shape):
        raise FormatError(
            f"Tensor {shown(name + key, 200)} must be {dtype} of shape {shape}, got {found[0]} of {found[1]}."
        )
    return array


def _take_state(parts: dict[str, Array], name: str) -> tuple[str, State]:
    """Remove the JSON description of a weight from its tensors; return it with every field checked."""
    keys = [key for key in parts if key.startswith(_STATE)]
    kind = keys[0].removeprefix(_STATE) if len(keys) == 1 else None
    if kind not in _KINDS:
        raise FormatError(
            f"Weight {shown(name, 150)} must have one tensor …{_STATE}nf4 or …fp4, got {len(keys)}: {shown(keys[:2])}."
        )
    array = parts.pop(keys[0])
    reader, state = _state_of(array, f"Tensor {shown(name + keys[0], 200)}", is_nested=".nested_absmax" in parts)
    if state.quant_type != kind:
        raise reader.fault("quant_type", f"must be {kind!r}, as in the name of the tensor, got {state.quant_type!r}.")
    return kind, state


def _state_of(array: Array, where: str, *, is_nested: bool) -> tuple[Reader, State]:
    """Return the JSON description in a tensor, with the reader that words further errors."""
    if ops.dtype_name(array) != "uint8" or len(array.shape) != 1:
        raise FormatError(f"{where} must be uint8 of one dimension, got {ops.dtype_name(array)} of {array.shape}.")
    reader = Reader(where, FormatError)
    return reader, reader.read(ops.convert(array, np).tobytes(), NestedState if is_nested else State)


def _take_nested(parts: dict[str, Array], name: str, fmt: BlockFormat, offset: float, blocks: int) -> dict[str, Array]:
    """Return the arrays of double quantization under their names in a QuantizedArray."""
    assert isinstance(fmt.scales, ScaleFormat)
    nested_map = _take(parts, name, ".nested_quant_map", "float32", (256,))
    _check_table(nested_map, fmt.scales.format.codebook.levels, f"{name}.nested_quant_map")
    second = _take(parts, name, ".nested_absmax", "float32", (-(-blocks // 256),))
    ops.require_finite(second, f"{name}.nested_absmax")
    return {"scales.scales": second, "scales.offset": _like(second, np.array([offset], dtype=np.float32))}


def _check_table(table: Array, expected: npt.NDArray[np.float32], what: str) -> None:
    if ops.convert(table, np).tobytes() != expected.tobytes():
        raise FormatError(f"Tensor {what!r} must be the table of levels that bitsandbytes writes, got other levels.")


def _quant_map(fmt: BlockFormat, order: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return the levels in the order of bitsandbytes' codes. It writes both zeros of FP4 without a sign."""
    table = np.empty(len(order), dtype=np.float32)
    table[list(order)] = fmt.codebook.levels + np.float32(0)
    return table


def _like(array: Array, values: npt.NDArray[Any]) -> Array:
    """Return a copy of a NumPy array in the library and on the device of another array."""
    return ops.convert(values.copy(), namespace(array), array_api_compat.device(array))


def _bytes_between(order: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the table that maps a byte of bitsandbytes to a byte of this library.

    The two codes of a byte swap their halves, and each code ``c`` becomes the index ``i`` with ``order[i] == c``. The
    inverse table is the ``argsort`` of this one, because it is a permutation of the 256 bytes.
    """
    # Codes c0, c1 of two neighboring weights are the byte  c0 << 4 | c1  there, and  i0 | i1 << 4  here.
    index = np.argsort(order)
    first, second = np.divmod(np.arange(256), 16)
    return (index[first] | index[second] << 4).astype(np.uint8)


def _recode(packed: Array, table: npt.NDArray[Any]) -> Array:
    xp = namespace(packed)
    return xp.take(_like(packed, table.astype(np.uint8)), xp.astype(packed, xp.int64))


def _codes_from(weight: Array, kind: str, count: int, name: str) -> Array:
    # bitsandbytes pads an odd number of weights with a zero, whose code fills the low half of the last byte. Here unused
    # bits are 0. Another filling could not be restored by to_bitsandbytes, so it is refused.
    xp = namespace(weight)
    if count % 2 and int(weight[-1, 0]) & 15 != _ZERO[kind]:
        raise FormatError(
            f"Tensor {name!r} must be padded with the code of zero, {_ZERO[kind]}, in its last byte, got {int(weight[-1, 0]) & 15}."
        )
    packed = _recode(xp.reshape(weight, (-1,)), _bytes_between(_KINDS[kind][1]))
    return xp.concat([packed[:-1], packed[-1:] & 15]) if count % 2 else packed


def _codes_to(packed: Array, kind: str, count: int) -> Array:
    xp = namespace(packed)
    weight = xp.reshape(_recode(packed, np.argsort(_bytes_between(_KINDS[kind][1]))), (-1, 1))
    return xp.concat([weight[:-1, :], weight[-1:, :] & 240 | _ZERO[kind]]) if count % 2 else weight
