"""Fork again and again while threads work, and count the children that hang or compute something else.

``python -m tests.fuzz.forking FORKS`` prints one line of JSON: how many children ended with each status.
"""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time

import numpy as np

import lqlora as lq

#: Seconds after which a child hangs. It works for a hundredth of a second if the machine is idle.
PATIENCE = 60

FORMATS = [lq.BlockFormat.parse(text) for text in ("nf4/16:float32", "nf3/16:u8/4:float32")]


def work(seed: int) -> bytes:
    """Return the bytes of a table of costs, of quantized weights and of a product."""
    chance = np.random.default_rng(seed)
    weights = {name: chance.standard_normal((24, 32)).astype(np.float32) for name in "ab"}
    table = lq.cost_table(weights, FORMATS, rank=1)
    quantized = lq.quantize(weights["a"], FORMATS[1])
    product = lq.matmul(weights["b"], quantized)
    return b"".join([table.costs.tobytes(), quantized.packed.tobytes(), product.tobytes()])


def main(forks: int) -> None:
    """Fork while eight threads work, and print how the children ended."""
    expected = [work(seed) for seed in range(4)]
    stop, wrong = threading.Event(), []

    def repeat(seed: int) -> None:
        while not stop.is_set():
            if work(seed % 4) != expected[seed % 4]:
                wrong.append(seed)

    threads = [threading.Thread(target=repeat, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    chance, ended = random.Random(0), collections.Counter[int]()
    try:
        for number in range(forks):
            time.sleep(chance.uniform(0, 0.01))
            ended[_end(_fork(number % 4, expected))] += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    sys.stdout.write(json.dumps({"ended": ended, "wrong": wrong}))


def _fork(seed: int, expected: list[bytes]) -> int:
    child = os.fork()
    if not child:
        status = 3
        try:
            faulthandler.dump_traceback_later(PATIENCE - 5)  # says where it hangs
            status = 0 if work(seed) == expected[seed] else 1
        finally:
            os._exit(status)
    return child


def _end(child: int) -> int:
    """Return how a child ends; the signal that ends it here if it hangs, as a negative number."""
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    main(int(sys.argv[1]))
