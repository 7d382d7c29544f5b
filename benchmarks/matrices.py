"""Benchmark of models with thousands of small matrices, such as mixtures of experts: CPU seconds beside the bytes.

Matrices of 64 x 64 take little time themselves, so the rows show what each matrix costs besides its bytes. Rows that begin
with "bare" are what other libraries, or the decompositions, take for the same tensors, layers and bytes alone.
"""

import hashlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from records import Record

import lqlora as lq
from lqlora import nn

FORMATS = [f"nf{bits}/64:u8/256:float32" for bits in (2, 3, 4)]
SIDE, RANK, COUNTS = 64, 4, (5_000, 20_000)


def names(count):
    return [f"layers.{i // 384}.experts.{i // 3 % 128}.{('gate', 'up', 'down')[i % 3]}_proj" for i in range(count)]


def table(count):
    """Return a cost table with costs that were drawn and sizes that are exact."""
    formats = list(map(lq.BlockFormat.parse, FORMATS))
    configurations = tuple(lq.costs.Configuration(fmt, RANK) for fmt in formats)
    costs = np.sort(np.random.default_rng(0).lognormal(size=(count, len(formats))))[:, ::-1].copy()
    sizes = np.tile([fmt.storage_bits((SIDE, SIDE)) for fmt in formats], (count, 1))
    factors = np.full_like(sizes, 32 * RANK * 2 * SIDE)
    return lq.CostTable(tuple(names(count)), ((SIDE, SIDE),) * count, configurations, costs, sizes, factors)


def model(count):
    """Return a model of that many layers, 100 to a list."""
    layers = (torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(count))
    return torch.nn.ModuleList(torch.nn.ModuleList(next(layers) for _ in range(100)) for _ in range(count // 100))


def seconds(call):
    begin = time.process_time()
    result = call()
    return time.process_time() - begin, result


def measured(count, folder):
    """Return CPU seconds by task, for a number of matrices."""
    found, file, costs = {}, folder / "matrices.safetensors", table(count)
    found["plan: table to JSON"], text = seconds(costs.to_json)
    found["plan: table from JSON"], _ = seconds(lambda: lq.CostTable.from_json(text))
    found["plan: allocate"], plan = seconds(lambda: lq.allocate(costs, bits_per_weight=3.0))
    found["plan: to JSON"], text = seconds(plan.to_json)
    found["plan: from JSON"], _ = seconds(lambda: lq.Plan.from_json(text))
    w = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    matrices = dict.fromkeys(names(count), lq.decompose(w, lq.BlockFormat.parse(FORMATS[-1]), RANK))
    found["lqlora.save"], _ = seconds(lambda: lq.save(file, matrices))
    found["lqlora.load"], _ = seconds(lambda: lq.load(file))
    found["lqlora.verify"], _ = seconds(lambda: lq.verify(file))
    found |= reference("its", file)
    found["bare: nn.Linear for each matrix"], own = seconds(lambda: model(count))
    fmt, weights = (
        lq.BlockFormat(lq.NF4, 64),
        [layer.weight.detach().numpy() for layer in nn.select_linears(own).values()],
    )
    found["bare: lq.decompose for each matrix"], _ = seconds(lambda: [lq.decompose(own, fmt, 0) for own in weights])
    found["nn.quantize_model"], _ = seconds(lambda: nn.quantize_model(own, fmt, rank=0))
    found["nn.save_model"], _ = seconds(lambda: nn.save_model(file, own))
    fresh = model(count)
    found["nn.load_model"], _ = seconds(lambda: nn.load_model(file, fresh))
    return found | reference("model's", file)


def reference(whose, file):
    """Return the CPU seconds that safetensors and SHA-256 take for the same bytes."""
    read, arrays = seconds(lambda: safetensors.numpy.load_file(file))
    write, _ = seconds(lambda: safetensors.numpy.save_file(arrays, file.with_suffix(".bare")))
    hashed, _ = seconds(lambda: hashlib.sha256(file.read_bytes()))
    return {
        f"bare: safetensors writes {whose} tensors": write,
        f"bare: safetensors reads {whose} tensors": read,
        f"bare: SHA-256 of {whose} bytes": hashed,
    }


def main():
    counts = tuple(map(int, filter(str.isdigit, sys.argv[1:]))) or COUNTS
    record = Record("matrices", ["numpy", "safetensors", "torch"])
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(count, Path(folder)) for count in counts]
    rows = ([task, *(f"{own[task]:.2f}" for own in found)] for task in found[0])
    header = ["CPU seconds", *(f"{count:,} matrices" for count in counts)]
    record.table(
        "Matrices of 64 x 64: double quantization and rank 4, or single quantization and rank 0 in nn", header, rows
    )


if __name__ == "__main__":
    main()
