"""Time and peak memory of one decomposition, for 1 to 100 million weights, on one thread.

``scripts/bench`` runs it. Each row is measured in a separate process, because the peak memory of a process never falls.
``benchmarks/README.md`` has the recorded table, and ``docs/explanation/runtime.md`` discusses it.
"""

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

import lqlora as lq
from lqlora.weighting import InputGram

FORMAT = lq.BlockFormat.parse("nf3/64:u8/64:float32")
RANK, ITERATIONS = 64, 5

#: Side and norm of each square matrix. A step of the Gram norm takes n**3 operations: minutes for 100 million weights.
JOBS = [(size, "Uniform") for size in (1000, 2000, 3162, 10000)] + [(size, "InputGram") for size in (1000, 2000, 3162)]


def matrix(size):
    """Return noise plus a low-rank part, computed in slices of rows to use less memory than the decomposition."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((size, size), dtype=np.float32)
    left, right = (rng.standard_normal(shape, dtype=np.float32) for shape in ((size, RANK), (RANK, size)))
    for rows in range(0, size, 500):
        w[rows : rows + 500] += left[rows : rows + 500] @ right / 8
    return w


def weighting(name, size):
    """Return the norm of a row of the table."""
    if name == "Uniform":
        return None
    inputs = np.random.default_rng(1).standard_normal((2 * size, size), dtype=np.float32)
    return InputGram(inputs.T @ inputs / len(inputs))


def measure(size, name):
    """Return CPU seconds in all and per iteration, and the peak memory in bytes, of one decomposition."""
    w, given = matrix(size), weighting(name, size)
    lq.decompose(w[:64, :64], FORMAT, 8)  # imports and tables
    marks = []
    start = time.process_time()
    lq.decompose(
        w,
        FORMAT,
        RANK,
        weighting=given,
        max_iter=ITERATIONS,
        rtol=0.0,
        callback=lambda *_: marks.append(time.process_time()),
    )
    total = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The callback sees the two safeguards first (rank 0, and one SVD of the residual), then the iterations. The time
    # before the third call includes the SVD that starts the iteration, so the mean is taken between later calls.
    per_iteration = (marks[-1] - marks[2]) / (ITERATIONS - 1)
    return {"total": total, "iteration": per_iteration, "peak": peak * 1024}


def main():
    """Print the table."""
    print(f"Rank {RANK}, {FORMAT}, one thread, CPU seconds; {ITERATIONS} iterations, with start and refit.")
    print(f"NumPy {np.__version__}, Python {sys.version.split()[0]}.\n")
    print(
        "| weights | size | weighting | s in all | s an iteration | ns a weight and iteration | peak GB | bytes a weight |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for size, name in JOBS:
        command = [sys.executable, __file__, str(size), name]
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        count = size * size
        print(
            f"| {count / 1e6:.1f} M | {size} x {size} | {name} | {found['total']:.3g} | {found['iteration']:.3g} "
            f"| {1e9 * found['iteration'] / count:.1f} | {found['peak'] / 1e9:.2f} | {found['peak'] / count:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
    else:
        main()
