"""Cost of dispatch: a call of an operation minus a call of the override it picks, and the checks of every function.

Run by ``scripts/bench`` on one thread. The override does nothing, and its record asks for everything a record can.
Prints medians of CPU time in microseconds.
"""

import statistics
import sys
import time

import numpy as np
import torch

import lqlora as lq
from lqlora._dispatch import namespace, op
from lqlora.backends import Takes

CALLS, REPEATS = 20_000, 9

#: The record of one array, and of the four that decoding takes.
ONE = Takes({"packed": ("uint8",)}, bits=(2, 4), contiguous=("packed",))
FOUR = Takes(
    {"packed": ("uint8",), "scales": ("float32",), "zero_points": ("uint8", None), "out": ("float32", "float16")},
    bits=(2, 4),
    contiguous=("packed", "scales", "zero_points", "out"),
)


def microseconds(function):
    function()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(CALLS):
            function()
        times.append(time.process_time() - start)
    return 1e6 * statistics.median(times) / CALLS


@op
def with_one_array(packed, bits):
    """Do nothing."""


@op
def with_four_arrays(packed, scales, zero_points, levels, bits, block_size, out):
    """Do nothing."""


def nothing(*arguments):
    return arguments


def rows(library, convert):
    packed, scales, zeros = (convert(np.ones(4, dtype=dtype)) for dtype in (np.uint8, np.float32, np.uint8))
    out = convert(np.ones(8, dtype=np.float32))
    four = (packed, scales, zeros, lq.NF4.levels, 4, 64, out)
    for title, operation, takes, arguments in (
        ("an operation of one array", with_one_array, ONE, (packed, 4)),
        ("an operation of four arrays", with_four_arrays, FOUR, four),
    ):
        operation.register(library, takes=takes)(nothing)
        with lq.forced("reference"):
            forced = microseconds(lambda f=operation, a=arguments: f(*a))
        direct = microseconds(lambda a=arguments: nothing(*a))
        yield title, microseconds(lambda f=operation, a=arguments: f(*a)) - direct
        yield f"{title}, forced to the reference", forced - direct
    yield "namespace() of one array", microseconds(lambda: namespace(out))
    yield "namespace() of two arrays", microseconds(lambda: namespace(out, scales))
    yield "widen()", microseconds(lambda: lq.ops.widen(out))
    yield "dtype_name()", microseconds(lambda: lq.ops.dtype_name(out))


def main():
    torch.set_num_threads(1)
    print(f"NumPy {np.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}\n")
    found = {name: dict(rows(name, convert)) for name, convert in (("numpy", np.asarray), ("torch", torch.from_numpy))}
    print("| µs a call | NumPy | torch |\n|---|---|---|")
    for title, own in found["numpy"].items():
        print(f"| {title} | {own:.2f} | {found['torch'][title]:.2f} |")


if __name__ == "__main__":
    main()
