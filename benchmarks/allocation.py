"""Benchmark of allocation for whole models: CPU time to a proven gap of 1e-6, the solver, and peak memory.

``--cache FILE`` keeps the measured errors for later runs; measuring them takes half a minute.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time

import numpy as np
from instances import SHAPES_7B, SHAPES_70B, cached_errors, replicate

import lqlora as lq
from lqlora.solvers import Budget, Problem, SolveOptions, solve

SIZES = {224: SHAPES_7B, 560: SHAPES_70B, 100_000: SHAPES_7B + SHAPES_70B}
NAMES = {224: "LLaMA-2 7B", 560: "LLaMA-2 70B", 100_000: "both, in turn"}
BITS = (2.25, 2.75, 3.25, 4.0)

#: Draws of scales, noise and samples, and budgets in bits per weight, for medians and worst cases.
DRAWS, MORE_BITS = 5, tuple(np.linspace(2.1, 6.0, 14))


def timed(problem, **options):
    begin = time.process_time()
    found = solve(problem, options=SolveOptions(**options))
    return found, time.process_time() - begin


def rows(count, errors, formats):
    cost, size, weights = replicate(errors, formats, SIZES[count], count)
    for bits in BITS:
        found, seconds = timed(Problem(cost, size, budgets=[Budget(upper=int(bits * weights))]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        name = f"{NAMES[count]}, {count} matrices | {bits}"
        print(
            f"| {name} | {seconds:.2f} | {found.gap:.1e} | {found.status.name} | {found.solver} | {peak:.2f} |",
            flush=True,
        )


def worst(count, errors, formats, rel_gap):
    seconds, solvers = [], []
    for seed in range(DRAWS):
        cost, size, weights = replicate(errors, formats, SIZES[count], count, seed=10 + seed)
        for bits in MORE_BITS:
            found, spent = timed(Problem(cost, size, budgets=[Budget(upper=int(bits * weights))]), rel_gap=rel_gap)
            seconds.append(spent)
            solvers.append(found.solver if found.status.name == "OPTIMAL" else "none")
    who = ", ".join(f"{name} {solvers.count(name)}" for name in sorted(set(solvers)))
    print(f"| {NAMES[count]} | {rel_gap:.0e} | {np.median(seconds):.2f} | {max(seconds):.2f} | {who} |", flush=True)


def stages(count, errors, formats, layers):
    """Print a row for a budget on the total and limits on each layer, which overlap and so need a general solver."""
    cost, size, weights = replicate(errors, formats, SIZES[count], count)
    numel = np.array([a * b for a, b in SIZES[count]] * layers)
    budgets = [Budget(upper=int(2.75 * weights))]
    for layer in range(layers):
        members = np.arange(count) // len(SIZES[count]) == layer
        budgets.append(Budget(int(3.3 * numel[members].sum()), int(2.3 * numel[members].sum()), members))
    found, seconds = timed(Problem(cost, size, budgets=budgets), time_limit=60.0)
    print(f"| {NAMES[count]} | {seconds:.2f} | {found.gap:.1e} | {found.stopped.name} | {found.solver} |")


def main(arguments):
    formats = lq.paper_grid("code")
    errors = cached_errors(formats, arguments.cache)
    if arguments.count:
        rows(arguments.count, errors, formats)
        return
    print(f"{len(formats)} formats, one thread; NumPy {np.__version__}, Python {platform.python_version()}\n")
    print(
        "| problem | bits per weight | CPU s | gap | status | solver | peak GiB |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for count in SIZES:  # each in a process of its own, which has its own peak of memory
        cache = ["--cache", arguments.cache] if arguments.cache else []
        subprocess.run([sys.executable, __file__, "--count", str(count), *cache], check=True)
    print(f"\n{DRAWS} draws, {len(MORE_BITS)} budgets from {MORE_BITS[0]} to {MORE_BITS[-1]} bits each:\n")
    print("| problem | gap asked for | median CPU s | worst CPU s | closed by |\n|---|---|---|---|---|", flush=True)
    for count in (224, 560):
        for rel_gap in (1e-6, 0.0):
            worst(count, errors, formats, rel_gap)
    print("\nA total of 2.75 bits, and 2.3 to 3.3 bits in each layer:\n")
    print("| problem | CPU s | gap | stopped | solver |\n|---|---|---|---|---|", flush=True)
    stages(224, errors, formats, 32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", help="file for the measured errors (.npy)")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    main(parser.parse_args())
