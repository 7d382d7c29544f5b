"""The CUDA kernels on a device: GB/s next to a copy, products next to dense ones, and whole calls with their host time.

Run by hand: ``python benchmarks/cuda_kernels.py [--record]``. Without CuPy or a device it says so, in one sentence.

The device waits before the first of a few calls, until the host has issued them all. Its own clock then measures its work
alone, without that of the host. Arrays are larger than the cache of the device, or used in turns.
"""

import functools
import importlib
import statistics
import sys
import time

import numpy as np
from records import Record

import lqlora as lq
from lqlora import ops
from lqlora.backends.cuda.registration import kernels_run

SIDE, BLOCK = 8192, 64
CALLS, REPEATS = 8, 9
#: Ticks of the device's clock, some milliseconds: longer than the host takes for the calls.
WAIT = 'extern "C" __global__ void wait(long long ticks) { long long t = clock64(); while (clock64() - t < ticks); }'


class Timer:
    """Medians of times on the device, in microseconds for one call."""

    def __init__(self, cupy):
        self._cupy, self._wait = cupy, cupy.RawKernel(WAIT, "wait")
        self._ticks = 10_000_000

    def device(self, *functions):
        """Return the time of one function. Several of them take turns, so that their input is not in a cache."""
        for function in functions:
            function()
        return statistics.median(self._one(functions) for _ in range(REPEATS))

    def _one(self, functions):
        """Return the time of one call. If the host was too slow, measure again with twice the waiting time, a few times."""
        for _ in range(6):
            events = self._cupy.cuda.Event(), self._cupy.cuda.Event()
            self._cupy.cuda.Device().synchronize()
            self._wait((1,), (1,), (np.int64(self._ticks),))
            events[0].record()
            for call in range(CALLS):
                functions[call % len(functions)]()
            events[1].record()
            waited = not events[0].done
            events[1].synchronize()
            if waited:
                return 1e3 * self._cupy.cuda.get_elapsed_time(*events) / CALLS
            self._ticks *= 2
        raise RuntimeError("The device was faster than the host: nothing was measured.")

    def host(self, function):
        """Time from call to return, while the device has little to do."""
        for _ in range(10):
            function()
        times = []
        for _ in range(100):
            self._cupy.cuda.Device().synchronize()
            begin = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - begin))
        return statistics.median(times)


def codebook(bits):
    return lq.normal_float(bits) if bits > 1 else lq.Codebook(np.array([-1, 1], np.float32))


def copy_speed(cupy, timer):
    """Return the GB/s of a copy, read and written."""
    source, target = (cupy.zeros(SIDE * SIDE, dtype="float32") for _ in range(2))
    return 2 * source.nbytes / timer.device(lambda: cupy.copyto(target, source)) / 1e3


def kernels(cupy, timer, speed):
    """Yield rows: what each kernel reads and writes, and how fast."""

    def row(what, moved, function):
        us = timer.device(function)
        return [what, f"{us:.0f}", f"{moved / us / 1e3:.0f}", f"{100 * moved / us / 1e3 / speed:.0f}"]

    count = SIDE * SIDE
    for dtype in ("float32", "float16"):
        w = cupy.random.standard_normal(count, dtype="float32").astype(dtype)
        scales = ops.block_absmax(w, BLOCK)
        moved = w.nbytes + scales.nbytes
        yield row(f"block_absmax, {dtype}", moved, lambda w=w: ops.block_absmax(w, BLOCK))
        yield row(f"block_extremes, {dtype}", moved + scales.nbytes, lambda w=w: ops.block_extremes(w, BLOCK))
        for bits in (1, 2, 3, 4, 6, 8):
            encoding = (w, scales, None, codebook(bits).boundaries, bits, BLOCK)
            packed, out = ops.encode_packed(*encoding), cupy.empty_like(w)
            moved = w.nbytes + packed.nbytes + scales.nbytes
            yield row(f"encode_packed, {dtype}, {bits} bits", moved, lambda a=encoding: ops.encode_packed(*a))
            stored = ops.PackedBlocks(packed, scales, None, codebook(bits).levels, bits, BLOCK)
            yield row(f"decode, {dtype}, {bits} bits", moved, lambda q=stored, o=out: ops.decode(q, o))
        for bits in (2, 3):
            stored, out = trellis_weight(cupy, SIDE, bits), cupy.empty_like(w)
            moved = w.nbytes + stored.packed.nbytes + stored.scales.nbytes
            yield row(f"decode_trellis, {dtype}, {bits} bits", moved, lambda q=stored, o=out: ops.decode_trellis(q, o))
    for bits in (3, 4):
        codes = cupy.random.randint(0, 2**bits, count).astype("uint8")
        packed = ops.pack_codes(codes, bits)
        moved = codes.nbytes + packed.nbytes
        yield row(f"pack_codes, {bits} bits", moved, lambda c=codes, b=bits: ops.pack_codes(c, b))
        yield row(f"unpack_codes, {bits} bits", moved, lambda p=packed, b=bits: ops.unpack_codes(p, b, count))


def products(cupy, timer):
    """Yield rows: products of a few rows with packed weights, and with dense ones by cuBLAS."""
    side = 4096
    for dtype in ("float16", "bfloat16", "float32"):
        for bits in (2, 3, 4, 8):
            weights = [packed_weight(cupy, side, bits) for _ in range(CALLS)]
            for inputs in (1, 2, 4, 8, 16):
                x = cupy.random.standard_normal((inputs, side), dtype="float32").astype(dtype)
                out, levels = cupy.empty((inputs, side), dtype=x.dtype), codebook(bits).levels
                stored = [ops.PackedBlocks(*weight, None, levels, bits, BLOCK) for weight in weights]
                ours = timer.device(*(lambda q=q, x=x, o=out: ops.matmul_packed(x, q, o) for q in stored))
                yield [dtype, bits, inputs, f"{ours:.1f}", f"{dense_us(timer, dtype, inputs, side):.1f}"]


def trellis_products(cupy, timer):
    """Yield rows: products of a few rows with weights in trellis codes, and with dense ones by cuBLAS."""
    side = 4096
    for dtype in ("float16", "float32"):
        for bits in (2, 3):
            weights = [trellis_weight(cupy, side, bits) for _ in range(CALLS)]
            for inputs in (1, 4, 16):
                x = cupy.random.standard_normal((inputs, side), dtype="float32").astype(dtype)
                out = cupy.empty((inputs, side), dtype=x.dtype)
                ours = timer.device(*(lambda q=q, x=x, o=out: ops.matmul_trellis(x, q, o) for q in weights))
                yield [dtype, bits, inputs, f"{ours:.1f}", f"{dense_us(timer, dtype, inputs, side):.1f}"]


def trellis_weight(cupy, side, bits):
    """Return a square weight of random trellis codes, whose search would take long."""
    packed = cupy.random.randint(0, 256, ops.packed_size(side * side, bits)).astype("uint8")
    scales = cupy.ones(side * side // BLOCK, dtype="float32")
    return ops.PackedTrellis(packed, scales, lq.codebooks.trellis_code(bits).levels, bits, BLOCK, side)


def packed_weight(cupy, side, bits):
    w = cupy.random.standard_normal(side * side, dtype="float32")
    scales = ops.block_absmax(w, BLOCK)
    return ops.encode_packed(w, scales, None, codebook(bits).boundaries, bits, BLOCK), scales


@functools.cache  # one measurement for all bits
def dense_us(timer, dtype, inputs, side):
    torch = importlib.import_module("torch")
    like = {"device": "cuda", "dtype": getattr(torch, dtype)}
    x, weights = torch.randn(inputs, side, **like), [torch.randn(side, side, **like) for _ in range(CALLS)]
    return timer.device(*(lambda w=w: torch.mm(x, w.T) for w in weights))


def low_rank_parts(timer):
    """Yield rows: the low-rank part of a few rows of inputs, added; and the same by torch.mm and torch.addmm."""
    torch, side = importlib.import_module("torch"), 4096
    for dtype in ("float16", "float32"):
        for rank in (8, 64):
            like = {"device": "cuda", "dtype": getattr(torch, dtype)}
            factors = [(torch.randn(rank, side, **like), torch.randn(side, rank, **like)) for _ in range(CALLS)]
            for inputs in (1, 4, 16):
                x, y = torch.randn(inputs, side, **like), torch.randn(inputs, side, **like)
                ours = timer.device(*(lambda a=a, b=b, x=x, y=y: ops.add_low_rank(y, x, a, b, 0.5) for a, b in factors))
                theirs = timer.device(
                    *(lambda a=a, b=b, x=x, y=y: torch.addmm(y, torch.mm(x, a.T), b.T, alpha=0.5) for a, b in factors)
                )
                yield [dtype, rank, inputs, f"{ours:.1f}", f"{theirs:.1f}"]


def layers(timer):
    """Yield rows: layers one after the other in a CUDA graph, dense ones with the same factors, and calls without a graph."""
    torch, nn = importlib.import_module("torch"), importlib.import_module("lqlora.nn")
    like = {"device": "cuda", "dtype": torch.float16}
    factors = torch.randn(64, 4096, device="cuda"), torch.randn(4096, 64, device="cuda")
    narrow = [factor.half() for factor in factors]
    weights = [torch.randn(4096, 4096, **like) for _ in range(CALLS)]
    dense = [functools.partial(dense_layer, torch, w, *narrow) for w in weights]
    for name in ("nf4/64", "nf4/64:u8/256:float32"):
        fmt = lq.BlockFormat.parse(name)
        own = [
            nn.LQLinear(lq.quantize(w, fmt), *factors).to("cuda").requires_grad_(requires_grad=False) for w in weights
        ]
        for rows in (1, 4, 16, 256):
            x = torch.randn(rows, 4096, **like)
            times = [timer.device(graph_of(torch, some, x)) / CALLS for some in (own, dense)]
            yield [name, rows, *(f"{us:.1f}" for us in times), f"{timer.host(lambda x=x, f=own[0]: f(x)):.0f}"]


def dense_layer(torch, weight, lora_A, lora_B, x):
    return torch.addmm(torch.mm(x, weight.T), torch.mm(x, lora_A.T), lora_B.T)


def graph_of(torch, functions, x):
    """Return a function that runs all functions from one CUDA graph."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for function in functions:
            function(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function(x) for function in functions]
    return lambda: (graph.replay(), kept)


def calls(cupy, timer):
    """Yield rows: whole calls on arrays of either library, and the host time they take."""
    torch = importlib.import_module("torch")
    w = cupy.random.standard_normal((4096, 4096), dtype="float32")
    for library, array in (("CuPy", w), ("torch", torch.from_dlpack(w))):
        for name in ("nf4/64", "nf4/64:u8/256:float32"):
            fmt = lq.BlockFormat.parse(name)
            q, rows = lq.quantize(array, fmt), {n: array[:n] for n in (1, 16, 256)}
            own = {
                "quantize": lambda a=array, f=fmt: lq.quantize(a, f),
                "dequantize": lambda q=q: lq.dequantize(q),
                **{f"matmul, {n} rows": lambda x=x, q=q: lq.matmul(x, q) for n, x in rows.items()},
            }
            for what, function in own.items():
                yield [library, name, what, f"{timer.host(function):.0f}", f"{whole_us(cupy, function):.0f}"]


def fits(cupy, timer):
    """Yield rows: the parts of a fit and their times, for the blocks of a 4096 x 4096 weight."""
    rows = 4096 * 4096 // BLOCK
    entries = cupy.random.standard_normal((rows, BLOCK), dtype="float32")
    entries /= cupy.abs(entries).max(axis=1, keepdims=True)
    weights = cupy.random.random((rows, BLOCK), dtype="float32")
    grid = np.linspace(0.6, 1.1, 30, dtype=np.float32).tolist()
    for bits in (2, 3, 4, 8):
        book = lq.normal_float(bits)
        for what, own in (("", None), (", weighted", weights)):
            searched = (entries, own, book.levels, book.boundaries, None, grid, 2)
            us = timer.device(lambda a=searched: ops.best_ratios(*a))
            yield [f"best_ratios, {bits} bits, 30 ratios{what}", f"{us:.0f}"]
        ratios, sets = cupy.ones(rows, dtype="float32"), cupy.zeros(rows, dtype="int64")
        codes = ops.nearest_codes(entries, book.boundaries)
        summed = (entries, weights, ratios.astype("float64"), ratios, codes, sets, len(book), 1)
        yield [f"level_sums, {bits} bits, until done", f"{whole_us(cupy, lambda a=summed: ops.level_sums(*a)):.0f}"]
    for shape in ((rows, BLOCK), (4096, 4096), (1, rows)):
        for dtype in ("float32", "float64"):
            terms = entries.reshape(-1)[: shape[0] * shape[1]].reshape(shape).astype(dtype)
            us = timer.device(lambda x=terms: ops.row_sums(x))
            yield [f"row_sums, {shape[0]} x {shape[1]} {dtype}", f"{us:.0f}"]


def whole_us(cupy, function):
    """Time of one call until the device is done."""
    times = []
    for _ in range(20):
        cupy.cuda.Device().synchronize()
        begin = time.perf_counter()
        function()
        cupy.cuda.Device().synchronize()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def main():
    if not kernels_run():
        print("No CUDA kernel was timed: CuPy is not installed, or finds no CUDA device.")
        return
    cupy = importlib.import_module("cupy")
    record, timer = Record("gpu", ("numpy", "torch", "cupy-cuda12x", "cupy-cuda13x")), Timer(cupy)
    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    speed = copy_speed(cupy, timer)
    title = f"{device}: {SIDE} x {SIDE}, blocks of {BLOCK}; a copy of as many float32 moves {speed:.0f} GB/s"
    record.table(title, ["kernel", "us", "GB/s", "percent of the copy"], kernels(cupy, timer, speed))
    if "--fast" in sys.argv[1:]:
        return
    title = f"{device}: rows of inputs times a 4096 x 4096 weight, in blocks of {BLOCK}"
    record.table(title, ["dtype", "bits", "rows", "packed, us", "dense, us"], products(cupy, timer))
    title = f"{device}: rows of inputs times a 4096 x 4096 weight in trellis codes, in blocks of {BLOCK}"
    record.table(title, ["dtype", "bits", "rows", "packed, us", "dense, us"], trellis_products(cupy, timer))
    title = f"{device}: low-rank parts of 4096 x 4096 weights, added to rows"
    record.table(title, ["dtype", "rank", "rows", "kernels, us", "torch, us"], low_rank_parts(timer))
    record.table(f"{device}: operations of fits", ["operation", "us"], fits(cupy, timer))
    title = f"{device}: whole calls, 4096 x 4096 float32"
    record.table(title, ["library", "format", "call", "host, us", "until done, us"], calls(cupy, timer))
    title = f"{device}: layers of 4096 x 4096 weights with factors of rank 64, float16 rows"
    heads = ["format", "rows", "in a graph, us", "dense float16 in a graph, us", "host without a graph, us"]
    record.table(title, heads, layers(timer))


if __name__ == "__main__":
    main()
