"""Load a large model in two ways, train a step, and record the anonymous memory: run by test_offload in a process."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import lqlora as lq

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, LAYERS = 8192, 8


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def most(call: Callable[[], object]) -> int:
    """Return the most anonymous memory while a function runs."""
    found, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return max(found)


def main(folder: Path) -> None:
    """Write the file, then load it: what was written is freed before."""
    torch.set_num_threads(1)
    fmt = lq.BlockFormat.parse("nf4/64:u8/256:float32")
    q = lq.quantize(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)), fmt)
    factors = torch.zeros(4, SIZE), torch.ones(SIZE, 4)
    # One array stands for all layers, so that the process that writes is small. The file holds each of them.
    lq.save(folder / "model", {f"{i}": lq.StoredMatrix(q, *factors) for i in range(LAYERS)}, metadata={"tied": {}})
    codes = LAYERS * q.nbytes
    del q
    before = anonymous()
    model = nn.Sequential(*[nn.utils.skip_init(nn.Linear, SIZE, SIZE, bias=False) for _ in range(LAYERS)])
    lq.nn.load_model(folder / "model", model, offload="*")
    found = {"codes": codes, "loaded": anonymous() - before}
    y = model(torch.ones(2, SIZE, requires_grad=True))
    y.square().mean().backward()
    found["trained"] = anonymous() - before
    lq.nn.onload_model(model)
    found["onloaded"] = anonymous() - before
    del model, y
    before = anonymous()
    with torch.device("meta"):
        skeleton = nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)])
    found["from meta"] = most(lambda: lq.nn.load_model(folder / "model", skeleton)) - before
    (folder / "memory.json").write_text(json.dumps({name: own / 2**20 for name, own in found.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
