"""Overrides for NumPy with one deliberate fault each, most of them around the reference."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time

import numpy as np

from lqlora import ops
from lqlora._dispatch import Takes, forced

FLOATS = ("float32", "float64", "float16", "bfloat16")

#: Records that take every call of an operation on NumPy arrays.
TAKES = {
    "block_absmax": Takes({"flat": FLOATS}),
    "block_extremes": Takes({"flat": FLOATS}),
    "nearest_codes": Takes({"values": FLOATS}),
    "encode": Takes({"flat": FLOATS, "scales": FLOATS, "zero_points": ("uint8", None)}),
    "encode_packed": Takes({"flat": FLOATS, "scales": FLOATS, "zero_points": ("uint8", None)}),
    "decode": Takes({"packed": ("uint8",), "scales": FLOATS, "zero_points": ("uint8", None), "out": FLOATS}),
    "matmul_packed": Takes(
        {"x": FLOATS, "packed": ("uint8",), "scales": FLOATS, "zero_points": ("uint8", None), "out": FLOATS}
    ),
    "pack_codes": Takes({"codes": ("uint8",)}),
    "unpack_codes": Takes({"packed": ("uint8",)}),
    "bin_sums": Takes({"terms": ("float64",), "bins": ("int64",)}),
}


def on_flat_arguments(operation, function):
    @functools.wraps(function)
    def unpacked(*args):
        flat = operation.arguments.flatten(args)
        return function(*(args if flat is args else flat[:-1]))  # the last one is the record

    return unpacked


@contextlib.contextmanager
def planted(name, function, takes=None):
    """Make a function the first override of an operation for NumPy."""
    operation = getattr(ops, name)
    operation.overrides("numpy")  # those that there are come first, if they are not loaded yet
    before = operation._overrides.get("numpy", {})
    operation._overrides["numpy"] = {}
    operation.register("numpy", takes=takes or TAKES[name])(on_flat_arguments(operation, function))
    operation._overrides["numpy"] |= before
    try:
        yield
    finally:
        operation._overrides["numpy"] = before
        operation._ready.pop("numpy", None)


def reference(name, *arguments):
    with forced("reference"), np.errstate(all="ignore"):
        operation = getattr(ops, name)
        return operation.reference(*operation.arguments.unflatten(arguments))


def by_block(per_block, block_size, count):
    if len(per_block) != -(-count // block_size):
        raise ValueError("There must be one entry for each block.")
    return np.repeat(per_block, min(block_size, max(count, 1)))[:count]


def encoded(flat, scales, zero_points, boundaries, block_size, divide=np.divide, below=np.less):
    """Encode as the reference does, but for the steps given."""
    wide = np.float64 if flat.dtype == np.float64 else np.float32
    scale = by_block(scales, block_size, len(flat)).astype(wide)
    with np.errstate(all="ignore"):
        values = np.where(scale == 0, 0, divide(flat.astype(wide), np.where(scale == 0, 1, scale))).astype(wide)
    if zero_points is not None:
        values = values + by_block(zero_points, block_size, len(flat)).astype(wide)
    return below(boundaries.astype(wide), values[:, None]).sum(axis=1).astype(np.uint8)


def correct(flat, scales, zero_points, boundaries, block_size):
    return encoded(flat, scales, zero_points, boundaries, block_size)


def takes_the_upper_code_at_a_tie(*arguments):
    return encoded(*arguments, below=np.less_equal)


def multiplies_by_the_reciprocal(*arguments):
    return encoded(*arguments, divide=lambda weight, scale: weight * (scale.dtype.type(1) / scale))


def adds_the_zero_point_before_it_rounds(flat, scales, zero_points, boundaries, block_size):
    codes = encoded(flat.astype(np.float64), scales, zero_points, boundaries, block_size)
    return codes if zero_points is not None else encoded(flat, scales, None, boundaries, block_size)


def divides_by_zero_scales(flat, scales, zero_points, boundaries, block_size):
    return encoded(flat, np.where(scales == 0, np.float32(1e-38), scales), zero_points, boundaries, block_size)


def flushes_subnormals(flat, *rest):
    tiny = np.float32(1.1754944e-38)
    return reference("encode", np.where(np.abs(flat) < tiny, flat.dtype.type(0), flat), *rest)


def knows_full_codebooks_only(flat, scales, zero_points, boundaries, block_size):
    full = 2 ** len(boundaries).bit_length() - 1
    padded = np.append(boundaries, np.zeros(full - len(boundaries), dtype=np.float32))
    return encoded(flat, scales, zero_points, padded, block_size)


def reads_zero_points_as_signed(packed, scales, zero_points, *rest):
    signed = None if zero_points is None else zero_points.view(np.int8).astype(np.float32)
    return reference("decode", packed, scales, signed, *rest)


def returns_integers_of_the_machine(codes, bits):
    return reference("pack_codes", codes, bits).astype(np.int64)


def drops_the_last_code_of_a_broken_byte(packed, scales, zero_points, levels, bits, block_size, out):
    reference("decode", packed, scales, zero_points, levels, bits, block_size, out)
    if len(out) * bits % 8:
        out[-1] = 0
    return out


def decodes_five_bits_as_four(packed, scales, zero_points, levels, bits, block_size, out):
    reference("decode", packed, scales, zero_points, levels, bits, block_size, out)
    if bits == 5:
        out[1::2] = out[::2]
    return out


def rounds_once_to_16_bits(packed, scales, zero_points, levels, bits, block_size, out):
    if out.dtype == np.float32:
        return reference("decode", packed, scales, zero_points, levels, bits, block_size, out)
    values = levels[ops.unpack_codes(packed, bits, len(out))].astype(np.float64)
    if zero_points is not None:
        values -= by_block(zero_points, block_size, len(out))
    exact = values * by_block(scales, block_size, len(out))
    # To odd in float32, so that the second rounding is that of the exact product.
    with np.errstate(all="ignore"):
        near = exact.astype(np.float32)
    inexact = np.isfinite(near) & (near.astype(np.float64) != exact) & (near.view(np.uint32) & 1 == 0)
    toward = np.where(np.abs(near) < np.abs(exact), 1, -1).astype(np.int32)
    out[...] = np.where(inexact, (near.view(np.int32) + toward).view(np.float32), near).astype(out.dtype)
    return out


def truncates_to_16_bits(packed, scales, zero_points, levels, bits, block_size, out):
    wide = np.empty(len(out), dtype=np.float32)
    reference("decode", packed, scales, zero_points, levels, bits, block_size, wide)
    if out.dtype.name == "bfloat16":
        wide = (wide.view(np.uint32) & 0xFFFF0000).view(np.float32)
    out[...] = wide
    return out


def passes_over_nan(flat, block_size):
    return reference("block_absmax", np.where(np.isnan(flat), flat.dtype.type(0), flat), block_size)


def takes_blocks_of_one_for_pairs(flat, block_size):
    return np.resize(reference("block_absmax", flat, max(2, block_size)), -(-len(flat) // block_size))


def needs_an_entry(flat, block_size):
    flat[0]
    return reference("block_absmax", flat, block_size)


def forgets_to_mask_the_last_code(packed, bits, count):
    codes = reference("unpack_codes", packed, bits, count)
    if count and count * bits % 8:
        byte, shift = divmod((count - 1) * bits, 8)
        codes[-1] |= packed[byte] >> shift
    return codes


def takes_absolute_values_in_place(flat, block_size):
    np.abs(flat, out=flat)
    return reference("block_absmax", flat, block_size)


def drops_the_end_of_a_piece(packed, scales, zero_points, levels, bits, block_size, out):
    reference("decode", packed, scales, zero_points, levels, bits, block_size, out)
    out[32768 - 1 :: 32768] = 0
    return out


def reads_memory_in_a_row(flat, block_size):
    if flat.strides[0] > 0:
        flat = np.lib.stride_tricks.as_strided(flat, strides=(flat.itemsize,))
    return reference("block_absmax", flat, block_size)


def assumes_aligned_memory(flat, block_size):
    if not flat.flags.aligned:
        raise RuntimeError("bus error")
    return reference("block_absmax", flat, block_size)


class KeepsResults:
    """Returns the array that it returned before for the same bytes."""

    __name__ = "keeps_results"

    def __init__(self):
        self.kept = {}

    def __call__(self, packed, bits, count):
        key = packed.tobytes(), bits, count
        if key not in self.kept:
            self.kept[key] = reference("unpack_codes", packed, bits, count)
        return self.kept[key]


def returns_its_argument(packed, bits, count):
    return packed if bits == 8 and len(packed) == count else reference("unpack_codes", packed, bits, count)


class CountsItsCalls:
    """Adds a rounding error in every third call."""

    __name__ = "counts_its_calls"

    def __init__(self):
        self.calls = itertools.count()

    def __call__(self, terms, bins, count):
        sums = reference("bin_sums", terms, bins, count)
        return np.nextafter(sums, np.inf) if next(self.calls) % 3 == 2 else sums


class HasOneWorkspace:
    """Leaves its result in memory that all calls share, for a while."""

    __name__ = "has_one_workspace"

    def __init__(self):
        self.workspace = {}

    def __call__(self, packed, bits, count):
        self.workspace["codes"] = reference("unpack_codes", packed, bits, count)
        time.sleep(0.001)
        return self.workspace["codes"]


def takes_what_it_is_given(packed, scales, zero_points, levels, bits, block_size, out):
    if not isinstance(scales, np.ndarray):
        scales = np.ones(-(-len(out) // block_size), dtype=np.float32)
    return reference("decode", packed, scales, zero_points, levels, bits, block_size, out)


#: The record of the one above: says nothing of the scales.
CARELESS = Takes({"packed": ("uint8",), "out": FLOATS})


def fills_up_scales(packed, scales, zero_points, levels, bits, block_size, out):
    padded = np.append(scales, scales[-1:])[: -(-len(out) // block_size)]
    return reference("decode", packed, padded, zero_points, levels, bits, block_size, out)


def forgets_zero_points(x, packed, scales, zero_points, levels, bits, block_size, out):
    return reference("matmul_packed", x, packed, scales, None, levels, bits, block_size, out)


def shortens_scales(x, packed, scales, zero_points, levels, bits, block_size, out):
    short = (np.array(scales).view(np.uint32) & 0xFFC00000).view(np.float32)
    return reference("matmul_packed", x, packed, short, zero_points, levels, bits, block_size, out)
