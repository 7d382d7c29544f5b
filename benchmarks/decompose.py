"""Wall time of decomposing many matrices: a thread for each matrix against threads of BLAS.

The matrices are Gaussian plus a low-rank part, in the shapes of a small language model.
"""

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import lqlora as lq
from lqlora._parallel import map_matrices

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)] * 4
FORMAT = lq.BlockFormat.parse("nf3/64:u8/256:float32")


def matrices():
    rng = np.random.default_rng(0)
    for rows, columns in SHAPES:
        low_rank = rng.standard_normal((rows, 32)) @ rng.standard_normal((32, columns)) / 8
        yield (rng.standard_normal((rows, columns)) + low_rank).astype(np.float32)


def one(matrix):
    return lq.decompose(matrix, FORMAT, 32, max_iter=5, rtol=0.0).relative_error


def timed(function):
    function()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure():
    work = list(matrices())
    cores = len(os.sched_getaffinity(0))
    print(f"{len(work)} matrices, rank 32, {FORMAT}, 5 iterations, {cores} cores, seconds (median of 3)\n")
    print("| how | seconds |\n|---|---|")
    print(f"| a loop, BLAS on all cores | {timed(lambda: [one(matrix) for matrix in work]):.2f} |")
    with ThreadPoolExecutor(cores) as pool:
        print(f"| a thread per core, BLAS on all cores | {timed(lambda: list(pool.map(one, work))):.2f} |")
    print(f"| a thread per core, BLAS on one (map_matrices) | {timed(lambda: map_matrices(one, work)):.2f} |")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure()
    else:  # scripts/bench holds BLAS to one thread; this comparison needs all of them
        environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        subprocess.run([sys.executable, __file__, "--measure"], env=environment, check=True)
