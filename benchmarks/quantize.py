"""Quantize and dequantize: every override against the reference it stands for, and against a plain copy.

Run by ``scripts/bench`` on one thread. Prints medians and, to compare across machines, ratios within the run.
"""

import statistics
import sys
import time

import numpy as np
import torch

import lqlora as lq

SHAPE = (4096, 4096)
FORMATS = [*(f"nf{bits}/64:float32" for bits in (2, 3, 4, 5, 6, 8)), "nf4/64:u8/256:float32"]
REPEATS = 5


def median_ms(function):
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
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


def main():
    torch.set_num_threads(1)
    weight = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    target = np.empty_like(weight)
    copy_ms = median_ms(lambda: np.copyto(target, weight))
    print(f"{SHAPE[0]} x {SHAPE[1]} float32, one thread, median of {REPEATS}; numpy.copyto takes {copy_ms:.1f} ms;")
    print(f"NumPy {np.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}\n")
    print("| library | operation | format | ms | reference, ms | times faster | times copyto |")
    print("|---|---|---|---|---|---|---|")
    for library, array in (("NumPy", weight), ("torch", torch.from_numpy(weight))):
        for row in rows(library, array, copy_ms):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
