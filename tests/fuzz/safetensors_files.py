"""Safetensors files in parts: reading and writing them without the library, and mutations of their tensors."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tests.fuzz.mutate import NAMES, Pairs, to_json

if TYPE_CHECKING:
    import random

__all__ = ["DTYPES", "Tensors", "as_arrays", "content", "is_finite", "mutated_tensors", "read", "with_value", "written"]

#: Dtype, shape and bytes of each tensor by name.
Tensors = dict[str, tuple[str, list[int], bytes]]

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
}
_FLOATS = (np.nan, np.inf, -np.inf, -0.0, -1.0, 3e38, -3e38, 1e-45, 0.0, 2.0)


def read(data: bytes) -> tuple[dict[str, Any], Tensors]:
    """Return the metadata and the tensors of a file, or raise ValueError, KeyError or TypeError."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: (own["dtype"], own["shape"], rest[slice(*own["data_offsets"])]) for name, own in header.items()
    }


def written(metadata: dict[str, Any], tensors: Tensors) -> bytes:
    """Return a file; tensors are stored by size of their numbers, then by name, as the library does."""
    header: list[tuple[str, Any]] = [("__metadata__", metadata)]
    rest = b""
    for name in sorted(tensors, key=lambda name: (-_itemsize(tensors[name][0]), name)):
        dtype, shape, own = tensors[name]
        offsets = [len(rest), len(rest) + len(own)]
        header.append((name, {"dtype": dtype, "shape": shape, "data_offsets": offsets}))
        rest += own
    coded = to_json(Pairs(header)).encode("utf-8", errors="surrogatepass")
    coded += b" " * (-len(coded) % 8)
    return len(coded).to_bytes(8, "little") + coded + rest


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1


def as_arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    """Return the tensors as arrays, or raise ValueError or KeyError if their bytes do not fit."""
    return {
        name: np.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape) for name, (dtype, shape, data) in tensors.items()
    }


def content(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return dtypes, shapes and bytes, to compare arrays exactly."""
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


def is_finite(array: np.ndarray) -> bool:
    """Return whether an array of any dtype has no NaN and no infinity."""
    with np.errstate(invalid="ignore"):  # signaling NaNs
        return bool(np.isfinite(array.astype(np.complex128)).all())


def with_value(tensors: Tensors, name: str, index: int, value: float) -> Tensors:
    """Return the tensors with another number at an index of one of them."""
    dtype, shape, data = tensors[name]
    array = np.frombuffer(data, dtype=DTYPES[dtype]).copy()
    with np.errstate(all="ignore"):
        array[index] = value
    return tensors | {name: (dtype, shape, array.tobytes())}


def mutated_tensors(rng: random.Random, tensors: Tensors) -> tuple[Tensors, str]:
    """Return the tensors after one mutation: of a shape or dtype, of numbers, or of names."""
    if not tensors:
        return tensors, "nothing"
    return rng.choice((_change_tensor, _change_tensor, _change_values, _change_names))(rng, tensors)


def _change_tensor(rng: random.Random, tensors: Tensors) -> tuple[Tensors, str]:
    """Change the dtype, shape or length of a tensor, most often so that its bytes still fit."""
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    kind = rng.choice(("view", "cast", "reshape", "shorten", "lengthen", "empty"))
    if kind == "view":
        other = rng.choice(list(DTYPES))
        made = (other, [len(data) // DTYPES[other].itemsize], data)
    elif kind == "cast" and dtype in DTYPES and not len(data) % DTYPES[dtype].itemsize:
        other = rng.choice(list(DTYPES))
        with np.errstate(all="ignore"):
            values = np.frombuffer(data, dtype=DTYPES[dtype])
            values = values.real if dtype == "C64" else values
            made = (other, shape, values.astype(DTYPES[other]).tobytes())
    elif kind == "reshape":
        count = math.prod(shape)
        made = (dtype, rng.choice(([count], [count, 1], [1, count], [1, *shape], shape[::-1], [*shape, 1, 1])), data)
    elif kind == "shorten" and shape and shape[0]:
        made = (dtype, [shape[0] - 1, *shape[1:]], data[: len(data) // shape[0] * (shape[0] - 1)])
    elif kind == "lengthen" and shape and shape[0]:
        made = (dtype, [shape[0] * 2, *shape[1:]], data * 2)
    else:
        made = (dtype, [0, *shape[1:]], b"")
    return tensors | {name: made}, f"{kind} {name[:40]!r}"


def _change_values(rng: random.Random, tensors: Tensors) -> tuple[Tensors, str]:
    """Change numbers of a tensor."""
    names = [name for name, (dtype, _, data) in tensors.items() if data and dtype in DTYPES]
    if not names:
        return tensors, "nothing"
    name = rng.choice(names)
    dtype, _, data = tensors[name]
    # bfloat16 is of kind V. An earlier mutation may have left half of a number.
    if DTYPES[dtype].kind in "fV" and rng.random() < 0.6 and not len(data) % DTYPES[dtype].itemsize:
        value = rng.choice(_FLOATS)
        index = rng.randrange(len(data) // DTYPES[dtype].itemsize)
        return with_value(tensors, name, index, value), f"{value} in {name!r}"
    changed_data = bytearray(data)
    for _ in range(rng.choice((1, 4))):
        changed_data[rng.randrange(len(data))] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
    own = (dtype, tensors[name][1], bytes(changed_data))
    return tensors | {name: own}, f"bytes of {name[:40]!r}"


def _change_names(rng: random.Random, tensors: Tensors) -> tuple[Tensors, str]:
    """Remove, rename, add or exchange tensors."""
    tensors = dict(tensors)
    name, kind = rng.choice(list(tensors)), rng.choice(("remove", "rename", "add", "exchange"))
    if kind == "remove":
        del tensors[name]
    elif kind == "rename":
        matrix = name.partition(".quantized.")[0]
        tensors[rng.choice((rng.choice(NAMES), f"{matrix}.quantized.{rng.choice(NAMES)}", f"{name}.more"))] = (
            tensors.pop(name)
        )
    elif kind == "add":
        matrix = name.partition(".quantized.")[0]
        tensors[rng.choice((rng.choice(NAMES), f"{matrix}.quantized.{rng.choice(NAMES)}"))] = ("F32", [2], bytes(8))
    else:
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return tensors, f"{kind} {name[:40]!r}"
