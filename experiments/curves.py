"""Curves of fine-tuning: the methods that are compared, the training loop, and the record of the results.

``experiments/fine_tuning.py`` and ``experiments/classification.py`` use these functions on a language model and on a classifier.
"""

import json
import sys

import torch

import lqlora as lq
from benchmarks.records import origin
from lqlora import nn
from lqlora.weighting import Elementwise

SCALES = "u8/256:float32"
NF2, NF3, NF4 = (lq.BlockFormat.parse(f"nf{bits}/{block}:{SCALES}") for bits, block in ((2, 32), (3, 64), (4, 64)))
TRELLIS = lq.BlockFormat.parse(f"tcq2/64:{SCALES}")
GRID = [lq.BlockFormat.parse(f"nf{bits}/{block}:{SCALES}") for bits in (2, 3, 4) for block in (16, 32, 64)]
PARTS = 6  # measurements after the first


def weighted(fishers):
    """Return the norms of LQ-LoRA."""
    return {name: Elementwise(fisher, sweeps=0) for name, fisher in fishers.items()}


def planned(bits):
    """Decompose as LQ-LoRA: formats by an integer program under a budget, errors weighted by Fisher information."""

    def decompose(layers, fishers, rank):
        weighting, fit = weighted(fishers()), "levels+scale"
        table = lq.cost_table(layers, GRID, rank=rank, max_iter=1, weighting=weighting, fit=fit)
        plan = lq.allocate(table, bits_per_weight=bits)
        return {
            name: lq.decompose(w, plan.formats[name], rank, weighting=weighting[name], fit=fit, max_iter=4)
            for name, w in layers.items()
        }

    return decompose


def in_trellis_codes(layers, fishers, rank):
    """Decompose in trellis codes of two bits, in the norms of LQ-LoRA."""
    weighting = weighted(fishers())
    return {
        name: lq.decompose(w, TRELLIS, rank, weighting=weighting[name], fit="scale", max_iter=4)
        for name, w in layers.items()
    }


def by(initializer, fmt):
    return lambda layers, _, rank: {name: initializer(w, fmt, rank) for name, w in layers.items()}


def scales_of(fmt):
    """Quantize to the scales with the least error, and let these train. There are no factors."""
    return lambda layers, *_: {name: lq.decompose(w, fmt, 0, fit="scale", max_iter=1) for name, w in layers.items()}


#: Functions of the layers, of a function that returns their Fisher information, and of the rank, which decompose all layers, and whether
#: scales train instead of factors.
METHODS = {
    "QLoRA, 3 bits": (by(lq.initializers.qlora, NF3), False),
    "LoftQ, 3 bits": (by(lq.initializers.loftq, NF3), False),
    "LQ-LoRA, 2.75 bits": (planned(2.75), False),
    "QLoRA, 2.25 bits": (by(lq.initializers.qlora, NF2), False),
    "LoftQ, 2.25 bits": (by(lq.initializers.loftq, NF2), False),
    "LQ-LoRA, 2.25 bits": (planned(2.25), False),
    "Trellis codes, 2.13 bits": (in_trellis_codes, False),
    "PEQA, 4 bits": (scales_of(NF4), True),
    "PEQA, 3 bits": (scales_of(NF3), True),
}


def converted(model, decompositions, *, scales_train):
    """Replace the linear layers of a model by quantized ones, and freeze everything but their factors or scales."""
    model.requires_grad_(requires_grad=False)
    for name, decomposition in decompositions.items():
        bias = model.get_submodule(name).bias
        layer = (
            nn.PEQALinear(decomposition.quantized, bias=bias)
            if scales_train
            else nn.LQLinear.from_decomposition(decomposition, bias)
        )
        model.set_submodule(name, layer)


def sizes(decompositions, *, scales_train):
    """Return the bytes of the quantized layers, and of their factors in 16 bits."""
    factors = 0 if scales_train else sum(own.lora_A.size + own.lora_B.size for own in decompositions.values())
    return {
        "bytes": sum(own.quantized.nbytes for own in decompositions.values()),
        "factor bytes in 16 bits": 2 * factors,
    }


def trained(groups, batches, losses, measure, parts=PARTS):
    """Train as ``lq.recipes.fine_tune`` does, and measure at equal distances; return the measurements.

    ``groups`` are parameters with a learning rate for each group, ``losses`` returns the losses of the examples of a batch.
    """
    parameters = [own for group in groups for own in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    found = [measure(0)]
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad(set_to_none=True)
        losses(batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, len(batches) // parts) == 0:
            found.append(measure(step))
    return found


def recorded(path, settings):
    """Return the results so far, which must have the same settings."""
    if not path.exists():
        return {**origin(["torch", "transformers"]), "settings": settings, "full": None, "runs": {}}
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        sys.exit(f"{path} has other settings: {found['settings']}, not {settings}.")
    return found


def record(path, results):
    """Write the results, so that the next process goes on from them. A process that is killed meanwhile leaves the old ones."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)
