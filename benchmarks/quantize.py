"""Quantize and dequantize, by the overrides and by the reference; then every override by itself.

Run by ``scripts/bench`` on one thread. Prints medians of CPU time, which others on the machine disturb less, and, to
compare across machines, ratios within the run.
"""

import statistics
import sys
import time

import numpy as np
import torch

import lqlora as lq

SHAPE = (4096, 4096)
FORMATS = [*(f"nf{bits}/64:float32" for bits in (2, 3, 4, 5, 6, 8)), "nf4/64@0:float32", "nf4/64:u8/256:float32"]
REPEATS = 5
PIECE = 1 << 19  # what quantize() and dequantize() hand to an operation


def median_ms(function, repeats=REPEATS):
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def rows(library, weight, copy_ms):
    for text in FORMATS:
        fmt = lq.BlockFormat.parse(text)
        quantized = lq.quantize(weight, fmt)
        for verb, call in (
            ("quantize", lambda fmt=fmt: lq.quantize(weight, fmt)),
            ("dequantize", lambda q=quantized: lq.dequantize(q)),
        ):
            fast = median_ms(call)
            with lq.forced("reference"):
                slow = median_ms(call)
            yield library, verb, text, f"{fast:.0f}", f"{slow:.0f}", f"{slow / fast:.1f}", f"{fast / copy_ms:.1f}"


def operations(convert):
    """Yield calls of every operation that has an override, on pieces."""
    rng = np.random.default_rng(0)
    values = convert(rng.standard_normal((PIECE // 64, 64), dtype=np.float32))
    for bits in (4, 5, 8):
        boundaries = lq.normal_float(bits).boundaries
        yield f"nearest_codes, {len(boundaries)} boundaries", lambda b=boundaries: lq.ops.nearest_codes(values, b)
    scales, out = (convert(np.ones(size, dtype=np.float32)) for size in (PIECE // 64, PIECE))
    for bits in (2, 3, 4, 6, 8):
        packed, levels = convert(rng.integers(0, 256, PIECE * bits // 8, dtype=np.uint8)), lq.normal_float(bits).levels
        yield (
            f"decode, {bits} bits",
            lambda p=packed, levels=levels, bits=bits: lq.ops.decode(p, scales, None, levels, bits, 64, out),
        )
    terms = convert(rng.standard_normal(PIECE))
    for count in (4, 16, 256):
        bins = convert(rng.integers(0, count, PIECE))
        yield f"bin_sums, {count} bins", lambda bins=bins, count=count: lq.ops.bin_sums(terms, bins, count)


def operation_rows(library, convert):
    for title, call in operations(convert):
        fast = median_ms(call, 21)
        with lq.forced("reference"):
            slow = median_ms(call)
        yield library, title, f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.1f}"


def main():
    torch.set_num_threads(1)
    weight = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    target = np.empty_like(weight)
    copy_ms = median_ms(lambda: np.copyto(target, weight))
    print(
        f"{SHAPE[0]} x {SHAPE[1]} float32, one thread, CPU time, median of {REPEATS}; numpy.copyto takes {copy_ms:.1f} ms;"
    )
    print(f"NumPy {np.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}\n")
    print("| library | operation | format | ms | reference, ms | times faster | times copyto |")
    print("|---|---|---|---|---|---|---|")
    for library, array in (("NumPy", weight), ("torch", torch.from_numpy(weight))):
        for row in rows(library, array, copy_ms):
            print("| " + " | ".join(row) + " |")
    print(f"\nBy themselves, on {PIECE} weights:\n")
    print("| library | operation | ms | reference, ms | times faster |\n|---|---|---|---|---|")
    for library, convert in (("NumPy", np.asarray), ("torch", torch.from_numpy)):
        for row in operation_rows(library, convert):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
