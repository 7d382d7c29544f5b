"""The CUDA kernels on a device: GB/s, next to a copy within the device; and products of a few rows, next to dense ones.

Run by hand: ``python benchmarks/cuda_kernels.py``. Without CuPy or a device it says so, in one sentence.
"""

import importlib
import statistics
import sys

import numpy as np

import lqlora as lq
from lqlora import ops
from lqlora.backends.cupy.taken import kernels_run

SHAPE = (4096, 4096)
BLOCK = 64
REPEATS = 20


def median_us(cupy, function):
    """Return the median time on the device, from events around single calls."""
    for _ in range(3):
        function()
    times = []
    for _ in range(REPEATS):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(1e3 * cupy.cuda.get_elapsed_time(start, stop))
    return statistics.median(times)


def row(cupy, what, moved, copy_speed, function):
    us = median_us(cupy, function)
    speed = moved / us / 1e3
    print(f"| {what} | {us:.1f} | {speed:.0f} | {100 * speed / copy_speed:.0f} |", flush=True)


def kernels(cupy, copy_speed):
    count = SHAPE[0] * SHAPE[1]
    for dtype, width in (("float32", 4), ("float16", 2)):
        w = cupy.random.standard_normal(count).astype(dtype)
        scales = ops.block_absmax(w, BLOCK)
        row(cupy, f"block_absmax {dtype}", w.nbytes + scales.nbytes, copy_speed, lambda w=w: ops.block_absmax(w, BLOCK))
        for bits in (2, 3, 4, 8):
            book = lq.normal_float(bits)
            encoding = (w, scales, None, book.boundaries, bits, BLOCK)
            packed, out = ops.encode_packed(*encoding), cupy.empty_like(w)
            moved = count * width + packed.nbytes + scales.nbytes
            row(
                cupy, f"encode_packed {dtype}, {bits} bits", moved, copy_speed, lambda a=encoding: ops.encode_packed(*a)
            )
            decoding = (packed, scales, None, book.levels, bits, BLOCK, out)
            row(cupy, f"decode {dtype}, {bits} bits", moved, copy_speed, lambda a=decoding: ops.decode(*a))


def products(cupy):
    rows, columns = SHAPE
    book = lq.NF4
    w = cupy.random.standard_normal(rows * columns).astype("float16")
    scales = ops.block_absmax(w, BLOCK)
    packed = ops.encode_packed(w, scales, None, book.boundaries, 4, BLOCK)
    dense = w.reshape(SHAPE)
    print("\n| rows of inputs | packed, us | dense float16, us | times faster |\n|---|---|---|---|")
    for inputs in (1, 4, 16):
        x = cupy.random.standard_normal((inputs, columns)).astype("float16")
        out = cupy.empty((inputs, rows), dtype="float16")
        arguments = (x, packed, scales, None, book.levels, 4, BLOCK, out)
        ours = median_us(cupy, lambda a=arguments: ops.matmul_packed(*a))
        theirs = median_us(cupy, lambda x=x: x @ dense.T)
        print(f"| {inputs} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |", flush=True)


def fits(cupy):
    rows, columns = SHAPE[0] * SHAPE[1] // BLOCK, BLOCK
    entries = cupy.random.standard_normal((rows, columns)).astype("float32")
    entries /= cupy.abs(entries).max(axis=1, keepdims=True)
    weights = cupy.random.random((rows, columns)).astype("float32")
    grid = np.linspace(0.6, 1.1, 30, dtype=np.float32).tolist()
    print("\n| operation of fits | us |\n|---|---|")
    for bits in (2, 3, 4, 8):
        book = lq.normal_float(bits)
        for own in (None, weights):
            arguments = (entries, own, book.levels, book.boundaries, None, grid, 2)
            us = median_us(cupy, lambda a=arguments: ops.best_ratios(*a))
            print(
                f"| best_ratios, {bits} bits, 30 ratios{', weighted' if own is not None else ''} | {us:.1f} |",
                flush=True,
            )
        ratios, sets = cupy.ones(rows, dtype="float32"), cupy.zeros(rows, dtype="int64")
        codes = ops.nearest_codes(entries, book.boundaries)
        levels = (entries, weights, ratios.astype("float64"), ratios, codes, sets, len(book), 1)
        us = median_us(cupy, lambda a=levels: ops.level_sums(*a))
        print(f"| level_sums, {bits} bits | {us:.1f} |", flush=True)
    for shape in ((rows, columns), SHAPE, (1, rows), (1, rows * columns)):
        for dtype in ("float32", "float64"):
            terms = entries.reshape(-1)[: shape[0] * shape[1]].reshape(shape).astype(dtype)
            us = median_us(cupy, lambda x=terms: ops.row_sums(x))
            print(f"| row_sums, {shape[0]} x {shape[1]} {dtype} | {us:.1f} |", flush=True)


def main():
    if not kernels_run():
        print("No CUDA kernel was timed: CuPy is not installed, or finds no CUDA device.")
        return
    cupy = importlib.import_module("cupy")
    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    source, target = cupy.zeros(1 << 26, dtype=np.uint8), cupy.empty(1 << 26, dtype=np.uint8)
    us = median_us(cupy, lambda: cupy.copyto(target, source))
    copy_speed = 2 * source.nbytes / us / 1e3
    print(
        f"{device}, CuPy {cupy.__version__}, Python {sys.version.split()[0]}; {SHAPE[0]} x {SHAPE[1]}, block {BLOCK}."
    )
    print(f"A copy of 64 MiB within the device moves {copy_speed:.0f} GB/s, reading and writing.\n")
    print("| kernel | us | GB/s | percent of the copy |\n|---|---|---|---|")
    kernels(cupy, copy_speed)
    products(cupy)
    fits(cupy)


if __name__ == "__main__":
    main()
