"""Time and accuracy of ``cost_table(mode="fast")`` against one decomposition for each of the 432 formats of LQ-LoRA's grid.

Every 13th format is decomposed one by one, and the time is extrapolated to the grid. ``--small`` takes matrices of
512 x 512.
"""

import sys
import time

import numpy as np

import lqlora as lq

GRID = lq.paper_grid("code")
EVERY = 13  # 34 formats, with all bits, block sizes and dtypes
SIZE, RANK = (512, 16) if "--small" in sys.argv else (4096, 64)


def matrices():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((SIZE, SIZE))
    low_rank = rng.standard_normal((SIZE, RANK)) @ rng.standard_normal((RANK, SIZE)) / 8
    yield "normal", noise
    yield "normal and low-rank", noise + low_rank
    spread = np.exp(0.5 * rng.standard_normal((1, SIZE)))
    yield "Student t, columns of different sizes", rng.standard_t(5, (SIZE, SIZE)) * spread


def table(matrix, formats, mode):
    start = time.process_time()
    found = lq.cost_table({"the matrix": matrix}, formats, rank=RANK, mode=mode)
    return time.process_time() - start, found.costs[0]


def measure(name, matrix):
    sample = GRID[::EVERY]
    seconds, exact = table(matrix, sample, "exact")
    shared, costs = table(matrix, GRID, "fast")
    own = costs[::EVERY]
    one_by_one = seconds * len(GRID) / len(sample)
    sizes = np.array([fmt.storage_bits(matrix.shape) for fmt in GRID])
    least = np.array([costs[sizes <= size].min() for size in sizes[::EVERY]])
    near = own <= 1.5 * least  # no format of at most this size costs less than two thirds
    error = 100 * (own / exact - 1)
    cells = [f"{np.median(e):+.2f}, {e.min():+.2f} to {e.max():+.2f}" for e in (error[near], error[~near])]
    print(
        f"| {name} | {one_by_one:.0f} | {shared:.1f} | {one_by_one / shared:.1f} | {near.sum()}: {cells[0]} | {(~near).sum()}: {cells[1]} |",
        flush=True,
    )


def main():
    print(f"One {SIZE} x {SIZE} float32 matrix, rank {RANK}, {len(GRID)} formats; CPU seconds on one thread.")
    print(f"One by one is extrapolated from {len(GRID[::EVERY])} formats, and those are what costs are compared on.\n")
    print(
        "| matrix | one by one, s | shared, s | times faster | cost, % off: median and range | the same, formats beaten by half |"
    )
    print("|---|---|---|---|---|---|")
    for name, matrix in matrices():
        measure(name, (0.02 * matrix).astype(np.float32))


if __name__ == "__main__":
    main()
