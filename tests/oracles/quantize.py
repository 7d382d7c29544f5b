"""Oracle of quantization: one entry at a time, in NumPy scalars."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from lqlora.codebooks import Trellis
from lqlora.formats import ScaleFormat
from tests.oracles import trellis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora.formats import BlockFormat

STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


# --- codes as bytes


def pack(codes: Sequence[int], bits: int) -> bytes:
    """Return codes as bytes: one long number, least significant bit first, cut into bytes."""
    stream = [code >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return bytes(
        sum(bit << place for place, bit in enumerate(stream[start : start + 8])) for start in range(0, len(stream), 8)
    )


def unpack(packed: bytes, bits: int, count: int) -> list[int]:
    stream = [byte >> place & 1 for byte in packed for place in range(8)]
    return [sum(stream[i * bits + bit] << bit for bit in range(bits)) for i in range(count)]


# --- the nearest level


def nearest(value: float, levels: np.ndarray) -> int:
    """Return the index of the nearest level; at a midpoint, rounded to float32 as it is stored, the lower one."""
    for index, boundary in enumerate(_boundaries(levels.tobytes())):
        if value <= boundary:
            return index
    return len(levels) - 1


@functools.cache
def _boundaries(levels: bytes) -> list[float]:
    numbers = np.frombuffer(levels, dtype=np.float32).tolist()
    return [_boundary(low, high) for low, high in itertools.pairwise(numbers)]


def _boundary(low: float, high: float) -> float:
    if low == high == 0.0:  # between -0.0 and 0.0 the upper one
        return -1.1754943508222875e-38
    return float(np.float32((low + high) / 2))


# --- where the blocks are


def lines_of(array: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the array with the lines that blocks follow as rows."""
    if axis is None:
        return array.reshape(1, -1)
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(moved.size // moved.shape[-1] if moved.size else 0, moved.shape[-1])


def dense_of(values: Sequence[Any], shape: tuple[int, ...], axis: int | None, dtype: Any = np.float32) -> np.ndarray:
    """Return entries in block order at their places in the array."""
    array = np.array(values, dtype=dtype)
    if axis is None:
        return array.reshape(shape)
    moved = list(shape)
    moved.append(moved.pop(axis))
    return np.moveaxis(array.reshape(moved), -1, axis)


def blocks_of(flat: np.ndarray, size: int) -> list[np.ndarray]:
    return [flat[start : start + size] for start in range(0, len(flat), size)]


class Place(NamedTuple):
    """A block and the index of its line."""

    block: np.ndarray
    line: int


def places(array: np.ndarray, fmt: BlockFormat) -> list[Place]:
    return [
        Place(block, number)
        for number, line in enumerate(lines_of(array, fmt.axis))
        for block in blocks_of(line, fmt.block_size)
    ]


def set_of(line: int, fmt: BlockFormat) -> int:
    return line // fmt.levels if isinstance(fmt.levels, int) else 0


# --- scales


def absmax(block: np.ndarray) -> Any:
    largest = block.dtype.type(0)
    for value in block:
        largest = max(largest, abs(value))
    return largest


def signed_maximum(block: np.ndarray) -> Any:
    """Return the entry of largest magnitude; of x and -x the positive one."""
    found = block.dtype.type(0)
    for value in block:
        if abs(value) > abs(found) or (abs(value) == abs(found) and value > found):
            found = value
    return found


def extremes(block: np.ndarray) -> tuple[Any, Any]:
    low = high = block.dtype.type(0)
    for value in block:
        low, high = min(low, value), max(high, value)
    return low, high


@np.errstate(over="ignore")
def statistic(block: np.ndarray, fmt: BlockFormat) -> Any:
    """Return the scale that maps the extreme entries of a block to the extreme levels."""
    levels = fmt.codebook.levels
    if fmt.codebook.normalization == "affine":
        low, high = extremes(block)
        return (high - low) / block.dtype.type(levels[-1])
    if fmt.codebook.normalization == "signed":
        return signed_maximum(block) / block.dtype.type(levels[-1])
    if fmt.codebook.normalization == "rms":
        return np.sqrt(halved_sum([float(value) ** 2 for value in block]) / len(block))
    return absmax(block) / block.dtype.type(absmax(levels))


def halved_sum(terms: list[float]) -> float:
    """Return a sum: add the second half to the first until one number is left; an odd last one is kept for later."""
    if len(terms) < 2:
        return terms[0] if terms else 0.0
    half = len(terms) // 2
    return halved_sum([terms[i] + terms[half + i] for i in range(half)] + terms[2 * half :])


def offset_of(scales: np.ndarray, kind: str) -> Any:
    """Return the offset of the scales of an array."""
    if kind == "none" or not len(scales):
        return np.float32(0)
    if kind == "min":
        return min(scales)
    return np.float32(halved_sum([float(scale) for scale in scales]) / len(scales))


def zero_point(block: np.ndarray, scale: Any, fmt: BlockFormat) -> int:
    """Return the zero point: the code of 0.0 if the smallest entry has code zero."""
    if not scale > 0:
        return 0
    with np.errstate(over="ignore"):
        quotient = float(-extremes(block)[0] / block.dtype.type(scale))
    steps = round(min(quotient, 1e9))  # Python also rounds half to even
    return min(max(steps, 0), int(fmt.codebook.levels[-1]))


@np.errstate(over="ignore")
def store_scales(scales: np.ndarray, scale_format: str | ScaleFormat) -> tuple[dict[str, bytes], np.ndarray]:
    """Return the stored arrays of the scales as bytes, and the decoded scales."""
    if not isinstance(scale_format, ScaleFormat):
        stored = scales.astype(STORAGE[scale_format])
        return {"scales": stored.tobytes()}, stored.astype(np.float32)
    scales = scales.astype(np.float32)
    levels, last = scale_format.levels.levels, len(scale_format.levels) - 1
    offset = offset_of(scales, scale_format.offset)
    centered = scales - offset if scale_format.offset != "none" else scales
    blocks = blocks_of(centered, scale_format.block_size)
    statistics = np.array([statistic(block, scale_format.format) for block in blocks], dtype=np.float32)
    second, decoded_second = store_scales(statistics, scale_format.dtype)
    codes = []
    decoded = []
    for index, scale in enumerate(scales):
        unit = decoded_second[index // scale_format.block_size]
        code = nearest(float(centered[index] / unit), levels) if unit != 0 else nearest(0.0, levels)
        # A positive scale decodes to a positive number if any code does, and a negative one to a negative number.
        while scale > 0 and code < last and levels[code] * unit + offset <= 0:
            code += 1
        while scale < 0 and code > 0 and levels[code] * unit + offset >= 0:
            code -= 1
        codes.append(code)
        decoded.append(levels[code] * unit + offset if scale_format.offset != "none" else levels[code] * unit)
    stored = {"codes": pack(codes, scale_format.bits)} | second
    if scale_format.offset != "none":
        stored["offset"] = np.float32(offset).tobytes()
    return {f"scales.{key}": value for key, value in stored.items()}, np.array(decoded, dtype=np.float32)


# --- weights


@np.errstate(over="ignore")
def codes_of(
    array: np.ndarray,
    scales: np.ndarray,
    fmt: BlockFormat,
    zero_points: Sequence[int] | None = None,
    levels: np.ndarray | None = None,
) -> list[int]:
    """Return codes in block order, the nearest for the given scales; ``levels`` has a row for each set."""
    codes = []
    for index, (block, line) in enumerate(places(array, fmt)):
        table = fmt.codebook.levels if levels is None else levels[set_of(line, fmt)]
        scale = block.dtype.type(scales[index])
        zero = block.dtype.type(0 if zero_points is None else zero_points[index])
        if isinstance(fmt.codebook, Trellis):
            quotients = block / scale if scale != 0 else block * 0
            codes += [code for own in trellis.sequences_of(quotients) for code in trellis.codes_of(own, fmt.codebook)]
            continue
        for value in block:
            quotient = value / scale if scale != 0 else block.dtype.type(0)
            codes += [nearest(float(quotient + zero), table)]
    return codes


@np.errstate(over="ignore")
def decode(
    codes: Sequence[int],
    scales: np.ndarray,
    fmt: BlockFormat,
    shape: tuple[int, ...] | None = None,
    zero_points: Sequence[int] | None = None,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """Return the decoded array of codes in block order; a flat one if no shape is given."""
    shape = (len(codes),) if shape is None else shape
    values, remaining = [], iter(codes)
    for index, (block, line) in enumerate(places(np.empty(shape, dtype=np.int8), fmt)):
        table = fmt.codebook.levels if levels is None else levels[set_of(line, fmt)]
        zero = np.float32(0 if zero_points is None else zero_points[index])
        if isinstance(fmt.codebook, Trellis):
            own = list(itertools.islice(remaining, len(block)))
            units = [unit for part in trellis.sequences_of(own) for unit in trellis.values_of(part, fmt.codebook)]
            values += [unit * np.float32(scales[index]) for unit in units]
            continue
        values += [(table[next(remaining)] - zero) * np.float32(scales[index]) for _ in block]
    return dense_of(values, shape, fmt.axis)


def quantize(w: np.ndarray, fmt: BlockFormat) -> tuple[dict[str, bytes], np.ndarray]:
    """Return the stored arrays as bytes, and the decoded array."""
    w = w if w.dtype == np.float64 else w.astype(np.float32)
    blocks = [place.block for place in places(w, fmt)]
    statistics = np.array([statistic(block, fmt) for block in blocks], dtype=w.dtype)
    stored, scales = store_scales(statistics, fmt.scales)
    zero_points = levels = None
    if fmt.codebook.normalization == "affine":
        zero_points = [zero_point(block, scale, fmt) for block, scale in zip(blocks, scales, strict=True)]
        stored["zero_points"] = pack(zero_points, fmt.codebook.zero_point_bits)
    if fmt.levels != "codebook":
        levels = np.array([fmt.codebook.levels] * fmt.level_sets(w.shape), dtype=np.float32)
        stored["levels"] = levels.tobytes()
    codes = codes_of(w, scales, fmt, zero_points, levels)
    return {"codes": pack(codes, fmt.bits)} | stored, decode(codes, scales, fmt, w.shape, zero_points, levels)


def lq_lora_scales(
    statistics: np.ndarray, bits: int, block_size: int, dtype: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Double quantization as LQ-LoRA publishes it: unsigned codes, second-level scales, decoded scales.

    The smallest scale of the whole tensor is subtracted; each block of what remains is divided by its maximum, cast to
    the storage dtype; the quotient is rounded to ``k / (2**bits - 1)``.
    """
    levels = np.array([k / (2**bits - 1) for k in range(2**bits)], dtype=np.float32)
    smallest = min(statistics)
    codes: list[int] = []
    second: list[np.float32] = []
    decoded: list[np.float32] = []
    for block in blocks_of(statistics - smallest, block_size):
        scale = np.float32(STORAGE[dtype](max(block)))
        block_codes = [nearest(float(s / scale), levels) if scale > 0 else 0 for s in block]
        codes += block_codes
        second.append(scale)
        decoded += [levels[code] * scale + smallest for code in block_codes]
    return codes, np.array(second, dtype=np.float32), np.array(decoded, dtype=np.float32)
