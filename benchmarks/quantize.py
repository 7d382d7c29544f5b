"""Quantize, dequantize and multiply on a CPU: compiled kernels, NumPy without them, and the references.

Run by ``scripts/bench`` on one thread. Prints medians of CPU time, which others on the machine disturb less, and, to
compare across machines, ratios within the run. The table of threads is of wall time. With ``--record`` the tables go
into the documentation.
"""

import statistics
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from records import Record

import lqlora as lq
from lqlora.backends.cpu import buffer_pool, loading

SHAPE = (4096, 4096)
FORMATS = [*(f"nf{bits}/64:float32" for bits in range(2, 9)), "nf4/64@0:float32", "nf4/64:u8/256:float32"]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
REPEATS = 9
PIECE = 1 << 19


def median_ms(function, repeats=REPEATS, clock=time.process_time):
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return 1e3 * statistics.median(times)


def without(word, function, repeats):
    with lq.forced(word):
        return median_ms(function, repeats)


def whole_arrays(weight, copy_ms):
    """Yield rows for both libraries: the target of dequantize is given, and is in memory already."""
    for library, array in (("NumPy", weight), ("torch", torch.from_numpy(weight))):
        target = np.zeros_like(weight) if library == "NumPy" else torch.zeros_like(array)
        for text in FORMATS:
            fmt = lq.BlockFormat.parse(text)
            quantized = lq.quantize(array, fmt)
            for verb, call in (
                ("quantize", lambda array=array, fmt=fmt: lq.quantize(array, fmt)),
                ("dequantize", lambda q=quantized, target=target: lq.dequantize(q, out=target)),
            ):
                fast = median_ms(call)
                others = without("numpy", call, 3), without("reference", call, 3)
                yield library, verb, text, f"{fast:.1f}", *(f"{ms:.0f}" for ms in others), f"{fast / copy_ms:.2f}"


def new_results(weight):
    """Yield rows of dequantize into a new array, with the pool of large results and without it, in turn."""
    for library, array in (("NumPy", weight), ("torch", torch.from_numpy(weight))):
        q = lq.quantize(array, lq.BlockFormat(lq.NF4, 64))
        times = {buffer_pool.LARGE: [], sys.maxsize: []}  # from the second size on no array is large
        for _ in range(15):
            for least, own in times.items():
                with mock.patch.object(buffer_pool, "LARGE", least):
                    own.append(median_ms(lambda q=q: lq.dequantize(q), 1))
        pooled, plain = map(statistics.median, times.values())
        yield library, f"{pooled:.1f}", f"{plain:.1f}", f"{plain / pooled:.2f}"


def dtypes(weight):
    fmt = lq.BlockFormat(lq.NF4, 64)
    for name, dtype in DTYPES.items():
        narrow = weight.astype(dtype)
        target, copied, q = np.zeros_like(narrow), np.empty_like(narrow), lq.quantize(narrow, fmt)
        copy = median_ms(lambda c=copied, n=narrow: np.copyto(c, n))
        calls = (lambda n=narrow: lq.quantize(n, fmt), lambda q=q, t=target: lq.dequantize(q, out=t))
        times = [median_ms(call) for call in calls]
        yield name, f"{copy:.1f}", *(f"{ms:.1f}" for ms in times), *(f"{ms / copy:.2f}" for ms in times)


def products(weight):
    """Yield rows of a fused product, a dense one, and the memory it takes beside input and output."""
    for text in ("nf4/64:float32", FORMATS[-1]):
        q = lq.quantize(weight, lq.BlockFormat.parse(text))
        for batch in (1, 2, 4, 8, 16, 256):
            x = np.random.default_rng(batch).standard_normal((batch, SHAPE[1]), dtype=np.float32)
            fused, dense = median_ms(lambda x=x, q=q: lq.matmul(x, q)), median_ms(lambda x=x: x @ weight.T)
            tracemalloc.start()
            y = lq.matmul(x, q)
            memory = (tracemalloc.get_traced_memory()[1] - y.nbytes) / 2**20
            tracemalloc.stop()
            yield text, batch, f"{fused:.1f}", f"{dense:.1f}", f"{fused / dense:.2f}", f"{memory:.1f}"


def trellis(weight):
    """Yield rows of trellis formats beside a scalar format of two bits, whose quantize rounds and does not search."""
    x = np.random.default_rng(0).standard_normal((1, SHAPE[1]), dtype=np.float32)
    dense, target, scalar = median_ms(lambda: x @ weight.T), np.zeros_like(weight), None
    for text in ("nf2/64:float32", "tcq2/64:float32", "tcq2-12/64:float32", "tcq3/64:float32", "tcq4/64:float32"):
        fmt = lq.BlockFormat.parse(text)
        start = time.process_time()
        q = lq.quantize(weight, fmt)
        encoding = time.process_time() - start
        decoding, row = median_ms(lambda q=q: lq.dequantize(q, out=target)), median_ms(lambda q=q: lq.matmul(x, q))
        scalar = scalar or decoding
        yield text, f"{encoding:.2f}", f"{decoding:.1f}", f"{decoding / scalar:.2f}", f"{row:.1f}", f"{row / dense:.2f}"


def threads(weight):
    """Yield rows of this library, and of reading and of writing as much memory, which no number of threads can beat."""
    target = np.zeros_like(weight)
    pools = {count: ThreadPoolExecutor(count) for count in (1, 2)}
    # More parts than threads: with one part each, a part would stay in the cache of the core that had it the last time.
    parts = [np.split(array, 16) for array in (weight, target)]
    calls = {
        "only read (numpy.max)": lambda count: list(pools[count].map(np.max, parts[0])),
        "only write (numpy.ndarray.fill)": lambda count: list(pools[count].map(lambda part: part.fill(1), parts[1])),
    }
    for name, text in (
        ("float32", FORMATS[-1]),
        *((name, f"nf{bits}/64:float32") for name in DTYPES for bits in (4, 6, 8)),
    ):
        array = weight if name == "float32" else np.tile(weight, (2, 1)).astype(DTYPES[name])
        fmt, out = lq.BlockFormat.parse(text), np.zeros_like(array)
        q = lq.quantize(array, fmt)
        calls[f"quantize {name} to {text}"] = lambda _, array=array, fmt=fmt: lq.quantize(array, fmt)
        calls[f"dequantize {name} from {text}"] = lambda _, q=q, out=out: lq.dequantize(q, out=out)
    for verb, call in calls.items():
        times = []
        for count in pools:
            lq.backends.set_num_threads(count)
            times.append(median_ms(lambda call=call, count=count: call(count), 31, time.perf_counter))
        lq.backends.set_num_threads(None)
        yield verb, *(f"{ms:.1f}" for ms in times), f"{times[0] / times[1]:.2f}"


def operations():
    """Yield calls of every operation that has an override, on pieces."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((PIECE // 64, 64), dtype=np.float32)
    flat, sets, ones = values.reshape(-1), np.zeros(PIECE // 64, np.int64), np.ones(PIECE // 64)
    scales = lq.ops.block_absmax(flat, 64)
    yield "block_absmax", lambda: lq.ops.block_absmax(flat, 64)
    yield "block_extremes", lambda: lq.ops.block_extremes(flat, 64)
    yield "row_sums", lambda: lq.ops.row_sums(values)
    matrix, across = flat.reshape(512, -1), np.empty((PIECE // 512, 512), np.float32)
    yield "copy_across", lambda: lq.ops.copy_across(matrix.T, across)
    for bits in (2, 3, 4, 5, 6, 8):
        book, out = lq.normal_float(bits), np.empty_like(flat)
        codes = lq.ops.encode(flat, scales, None, book.boundaries, 64)
        packed = lq.ops.pack_codes(codes, bits)
        yield f"nearest_codes, {bits} bits", lambda b=book: lq.ops.nearest_codes(values, b.boundaries)
        yield f"encode, {bits} bits", lambda b=book: lq.ops.encode(flat, scales, None, b.boundaries, 64)
        yield (
            f"encode_packed, {bits} bits",
            lambda b=book, bits=bits: lq.ops.encode_packed(flat, scales, None, b.boundaries, bits, 64),
        )
        yield (
            f"encode_by_absmax, {bits} bits",
            lambda b=book, bits=bits: lq.ops.encode_by_absmax(flat, b.boundaries, bits, 64),
        )
        yield (
            f"decode, {bits} bits",
            lambda b=book, p=packed, bits=bits, out=out: lq.ops.decode(
                lq.ops.PackedBlocks(p, scales, None, b.levels, bits, 64), out
            ),
        )
        yield f"pack_codes, {bits} bits", lambda c=codes, bits=bits: lq.ops.pack_codes(c, bits)
        yield f"unpack_codes, {bits} bits", lambda p=packed, bits=bits: lq.ops.unpack_codes(p, bits, PIECE)
        wide = values / np.abs(values).max(axis=1, keepdims=True)
        tables = book.levels, book.boundaries
        yield (
            f"best_ratios, {bits} bits, 13 ratios",
            lambda t=tables, w=wide: lq.ops.best_ratios(w, None, *t, None, tuple(np.linspace(0.5, 1.1, 13)), 2),
        )
        yield (
            f"rounding_errors, {bits} bits",
            lambda t=tables: lq.ops.rounding_errors(values, None, scales, None, *t),
        )
        grid, known = codes.reshape(values.shape), (ones, ones.astype(np.float32))
        yield (
            f"level_sums, {bits} bits",
            lambda g=grid, b=book, k=known: lq.ops.level_sums(values, None, *k, g, sets, len(b), 1),
        )
    # The reference of the search takes a millisecond for a few weights.
    few, table, one = flat[:4096], lq.BlockFormat.parse("tcq2/64:float32").codebook.levels, scales[:64]
    packed, out = np.zeros(PIECE // 4, np.uint8), np.empty_like(flat)
    stored = lq.ops.PackedTrellis(packed, scales, table, 2, 64, PIECE)
    yield (
        "encode_trellis, 2 bits, 4096 weights",
        lambda: lq.ops.encode_trellis(few, one, None, table, 2, 64, len(few)),
    )
    yield "decode_trellis, 2 bits", lambda: lq.ops.decode_trellis(stored, out)
    for count in (4, 16, 256):
        bins, terms = rng.integers(0, count, PIECE), rng.standard_normal(PIECE)
        yield f"bin_sums, {count} bins", lambda t=terms, b=bins, c=count: lq.ops.bin_sums(t, b, c)


def operation_rows():
    for title, call in operations():
        fast, numpy, slow = median_ms(call, 15), without("numpy", call, 5), without("reference", call, 3)
        yield title, f"{fast:.2f}", f"{numpy:.2f}", f"{slow:.2f}", f"{slow / fast:.1f}"


def main():
    torch.set_num_threads(1)
    weight = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    target = np.empty_like(weight)
    record = Record("cpu", ("numpy", "torch"))
    copy_ms = median_ms(lambda: np.copyto(target, weight))
    print(f"Compiled kernels: {loading.status()[1]}.")
    compared = ("compiled, ms", "NumPy, ms", "reference, ms")
    record.table(
        f"{SHAPE[0]} x {SHAPE[1]} float32, one thread, CPU time; numpy.copyto takes {copy_ms:.1f} ms",
        ("library", "operation", "format", *compared, "times copyto"),
        whole_arrays(weight, copy_ms),
    )
    record.table(
        "Dequantize nf4/64:float32 into a new array, one thread, CPU time; memory from the pool or from the system",
        ("library", "pool, ms", "system, ms", "times faster"),
        new_results(weight),
    )
    record.table(
        "nf4/64:float32 by dtype, one thread, CPU time",
        ("dtype", "copyto, ms", "quantize, ms", "dequantize, ms", "quantize, times copyto", "dequantize, times copyto"),
        dtypes(weight),
    )
    record.table(
        "Rows times a 4096 x 4096 weight, float32, one thread, CPU time; memory beside input and output",
        ("format", "rows", "lq.matmul, ms", "dense, ms", "times dense", "memory, MiB"),
        products(weight),
    )
    record.table(
        "Trellis codes, 4096 x 4096 float32, one thread, CPU time; one row times the weight beside a dense float32 weight",
        ("format", "quantize, s", "dequantize, ms", "times nf2", "row times weight, ms", "times dense"),
        trellis(weight),
    )
    record.table(
        "Arrays of 64 MiB, wall time",
        ("operation", "one thread, ms", "two threads, ms", "times faster"),
        threads(weight),
    )
    record.table(
        f"Operations by themselves, NumPy, {PIECE} weights in blocks of 64, one thread, CPU time",
        ("operation", *compared, "times faster than the reference"),
        operation_rows(),
    )


if __name__ == "__main__":
    main()
