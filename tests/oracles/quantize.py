"""Quantization written as slowly and as plainly as it can be: one entry at a time, in NumPy scalars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from lqlora.formats import ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora.formats import BlockFormat

STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def pack(codes: Sequence[int], bits: int) -> bytes:
    """Write the codes into one long number, least significant bit first, and cut it into bytes."""
    stream = [code >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return bytes(
        sum(bit << place for place, bit in enumerate(stream[start : start + 8])) for start in range(0, len(stream), 8)
    )


def unpack(packed: bytes, bits: int, count: int) -> list[int]:
    stream = [byte >> place & 1 for byte in packed for place in range(8)]
    return [sum(stream[i * bits + bit] << bit for bit in range(bits)) for i in range(count)]


def nearest(value: float, levels: np.ndarray) -> int:
    """Index of the nearest level; at a midpoint (rounded to float32, as it is stored) the lower one."""
    for index, (low, high) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
        if value <= float(np.float32((low + high) / 2)):
            return index
    return len(levels) - 1


def absmax(block: np.ndarray) -> Any:
    largest = block.dtype.type(0)
    for value in block:
        largest = max(largest, abs(value))
    return largest


def blocks_of(flat: np.ndarray, size: int) -> list[np.ndarray]:
    return [flat[start : start + size] for start in range(0, len(flat), size)]


@np.errstate(over="ignore")
def codes_of(flat: np.ndarray, scales: np.ndarray, fmt: BlockFormat) -> list[int]:
    codes = []
    for block, scale in zip(blocks_of(flat, fmt.block_size), scales.astype(flat.dtype), strict=True):
        codes += [nearest(float(value / scale) if scale > 0 else 0.0, fmt.codebook.levels) for value in block]
    return codes


@np.errstate(over="ignore")
def decode(codes: Sequence[int], scales: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    values = [fmt.codebook.levels[code] * scales[i // fmt.block_size] for i, code in enumerate(codes)]
    return np.array(values, dtype=np.float32)


def quantize(w: np.ndarray, fmt: BlockFormat) -> tuple[dict[str, bytes], np.ndarray]:
    """Return the stored arrays as bytes, and the flat dense array that they stand for."""
    flat = w.reshape(-1)
    if flat.dtype != np.float64:
        flat = flat.astype(np.float32)
    statistics = np.array([absmax(block) for block in blocks_of(flat, fmt.block_size)], dtype=flat.dtype)
    stored, scales = _store_scales(statistics, fmt.scales)
    codes = codes_of(flat, scales, fmt)
    return {"codes": pack(codes, fmt.bits)} | stored, decode(codes, scales, fmt)


def _store_scales(statistics: np.ndarray, scales: str | ScaleFormat) -> tuple[dict[str, bytes], np.ndarray]:
    if not isinstance(scales, ScaleFormat):
        stored = statistics.astype(STORAGE[scales])
        return {"scales": stored.tobytes()}, stored.astype(np.float32)
    statistics = statistics.astype(np.float32)
    if scales.offset == "none":
        inner, decoded = quantize(statistics, scales.format)
        return {f"scales.{key}": value for key, value in inner.items()}, decoded
    offset = np.array([min(statistics)] if len(statistics) else [0], dtype=np.float32)
    inner, decoded = quantize(statistics - offset, scales.format)
    inner["offset"] = offset.tobytes()
    return {f"scales.{key}": value for key, value in inner.items()}, decoded + offset


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
