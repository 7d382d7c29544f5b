"""Host time of small calls: quantize, dequantize, matmul and LQLinear on 64 x 64 matrices, one thread.

On matrices this small nearly all the time is Python. ``--against CHECKOUT`` measures another checkout in the same run: the
two take turns, so that a busy machine slows both. Prints microseconds of CPU time per call, medians of the turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
FORMATS = ("nf4/64:float32", "nf4/64:u8/256:float32")
CALLS, TURNS = 200, 15


def calls():
    """Return the measured calls by name."""
    import numpy as np
    import torch

    import lqlora as lq
    from lqlora.nn import LQLinear

    torch.set_num_threads(1)
    rng, found = np.random.default_rng(0), {}
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (1, 64)))
    for text in FORMATS:
        fmt = lq.BlockFormat.parse(text)
        q = lq.quantize(w, fmt)
        layer = LQLinear(lq.quantize(torch.from_numpy(w), fmt), torch.zeros(8, 64), torch.zeros(64, 8))
        rows = torch.from_numpy(x)
        found[f"quantize, {text}"] = lambda fmt=fmt: lq.quantize(w, fmt)
        found[f"dequantize, {text}"] = lambda q=q: lq.dequantize(q)
        found[f"matmul, {text}"] = lambda q=q: lq.matmul(x, q)
        found[f"LQLinear.forward, {text}"] = lambda layer=layer, rows=rows: layer(rows)
        found[f"LQLinear.forward in inference mode, {text}"] = torch.inference_mode()(
            lambda layer=layer, rows=rows: layer(rows)
        )
    return found


def work():
    """Measure one turn for each line of standard input, and print its times."""
    measured = calls()
    for call in measured.values():
        call()
    print(*measured, sep="\t", flush=True)
    for _ in sys.stdin:
        times = []
        for call in measured.values():
            start = time.process_time()
            for _ in range(CALLS):
                call()
            times.append(1e6 * (time.process_time() - start) / CALLS)
        print(*times, sep="\t", flush=True)


class Worker:
    """A process that measures one checkout, a turn at a time."""

    def __init__(self, checkout):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "LQLORA_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, cwd=checkout, stdin=pipe, stdout=pipe, text=True)
        self.names = self.process.stdout.readline().strip().split("\t")

    def turn(self):
        """Return the microseconds of each call in the next turn."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [float(value) for value in self.process.stdout.readline().split("\t")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout, whose kernels are compiled")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work()
    checkouts = [HERE] if options.against is None else [options.against.resolve(), HERE]
    workers = [Worker(checkout) for checkout in checkouts]
    turns = [[worker.turn() for worker in workers] for _ in range(TURNS)]
    medians = [[statistics.median(column) for column in zip(*own, strict=True)] for own in zip(*turns, strict=True)]
    head = ("µs",) if options.against is None else ("before, µs", "after, µs", "ratio")
    print(f"| call | {' | '.join(head)} |")
    print("|---|" + "--:|" * len(head))
    for name, *times in zip(workers[0].names, *medians, strict=True):
        ratio = f" | {times[1] / times[0]:.2f}" if len(times) == 2 else ""
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in times)}{ratio} |")
    return None


if __name__ == "__main__":
    main()
