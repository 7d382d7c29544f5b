"""Trellis codes and rotations on a CPU, beside scalar codes of two bits and a dense weight.

Run by ``scripts/bench`` on one thread. Prints CPU time for a 4096 x 4096 matrix: seconds of one quantization by absolute maxima, or
root mean squares, and medians of the others in milliseconds.
"""

import time

import numpy as np
from quantize import SHAPE, median_ms

import lqlora as lq

FORMATS = (
    "nf2/64", "tcq2-8/64", "tcq2/64", "tcq2-12/64", "tcq1/64", "tcq3/64", "tcq4/64", "nf2/64@0", "tcq2/64@0", "nf2/64~both", "tcq2/64@0~both",
)  # fmt: skip


def rows(weight):
    """Yield rows for each format."""
    inputs = {count: np.ones((count, SHAPE[1]), dtype=np.float32) for count in (1, 16)}
    dense = [median_ms(lambda x=x: x @ weight.T) for x in inputs.values()]
    yield "dense float32", "", "", *(f"{ms:.1f}" for ms in dense)
    out = np.empty_like(weight)
    for text in FORMATS:
        fmt = lq.BlockFormat.parse(text)
        start = time.process_time()
        q = lq.quantize(weight, fmt)
        seconds = time.process_time() - start
        decoding = median_ms(lambda q=q: lq.dequantize(q, out=out), 5)
        products = [median_ms(lambda x=x, q=q: lq.matmul(x, q), 5) for x in inputs.values()]
        yield text, f"{seconds:.2f}", f"{decoding:.1f}", *(f"{ms:.1f}" for ms in products)


def main():
    weight = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    print("| format | quantize, s | dequantize, ms | 1 row, ms | 16 rows, ms |\n|---|---|---|---|---|")
    for cells in rows(weight):
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
