"""Perplexity of SmolLM2-135M by a plan, against one format for all matrices at the same bits per weight.

Model and texts are those of ``experiments/smollm2.py``, and the norm is LQ-LoRA's rank-one Fisher information. Costs are
errors after one iteration with fitted levels and scales; the models that are measured had four iterations. With
``--record`` the figures go into ``docs/measurements/plans.json``, which ``docs/how-to/choosing_bits.md`` draws.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from smollm2 import FITTED, FOUR, RANK, arguments, decomposed, prepared, rank_one_fisher

import lqlora as lq
from benchmarks.records import origin
from lqlora._parallel import map_matrices

RECORD = Path(__file__).parents[1] / "docs" / "measurements" / "plans.json"
BUDGETS = (2.5, 2.75, 3.0, 3.5)
SCALES = "u8/256:float32"
FORMATS = [lq.BlockFormat.parse(f"nf{bits}/{block}:{SCALES}") for bits in (2, 3, 4) for block in (16, 32, 64)]
RANKS = (16, 32, 64, 128)


def cost_table(layers, formats, ranks, store):
    weights = {layer.name: layer.weight for layer in layers}
    weighting = {layer.name: rank_one_fisher(layer) for layer in layers}
    return lq.cost_table(weights, formats, ranks=ranks, weighting=weighting, max_iter=1, store=store, **FITTED)


def one_format(bits):
    """Return the format within the bits that has the most levels, and of those the smallest blocks."""
    for codebook in ("nf4", "nf3", "nf2"):
        for block in range(4, 1025):
            fmt = lq.BlockFormat.parse(f"{codebook}/{block}:{SCALES}")
            if fmt.bits_per_weight <= bits:
                return fmt
    raise ValueError(bits)


def by_plan(plan):
    def compress(layer):
        options = {**FOUR, "weighting": rank_one_fisher(layer)}
        return decomposed(layer, plan.formats[layer.name], plan.ranks[layer.name], **options)

    return partial(map_matrices, compress)


def by_format(fmt):
    return partial(map_matrices, lambda layer: decomposed(layer, fmt, RANK, **FOUR, weighting=rank_one_fisher(layer)))


def figures(name, cells, layers):
    """Return the figures of a printed row for the documentation; factors are printed in 32 bits and counted in 16."""
    bits, factors, measured = map(float, cells[1:4])
    size = sum(layer.weight.size for layer in layers)
    return {"name": name, "bits": bits, "bytes": round((bits + factors / 2) * size / 8), "perplexity": measured}


def compare(measure, layers, folder):
    found = {"uniform": [], "planned": []}
    table = cost_table(layers, FORMATS, [RANK], folder / "formats.costs" if folder else None)
    for bits in BUDGETS:
        fmt = one_format(bits)
        name = str(fmt).split(":")[0]
        found["uniform"].append(figures(name, measure(f"{bits} bits, {name}", by_format(fmt)), layers))
        plan = lq.allocate(table, bits_per_weight=bits)
        cells = measure(f"{bits} bits, plan (gap {plan.gap:.1g})", by_plan(plan))
        found["planned"].append(figures("plan", cells, layers))
    return found


def compare_ranks(measure, layers, folder):
    """Compare plans of several ranks with plans of one rank at equal bytes, factors counted in 16 bits."""
    found = {f"rank {RANK}": [], "ranks": []}
    formats = [fmt for fmt in FORMATS if fmt.block_size == 64]
    table = cost_table(layers, formats, RANKS, folder / "ranks.costs" if folder else None)
    fixed = cost_table(layers, formats, [RANK], folder / "rank.costs" if folder else None)
    for bits in BUDGETS:
        plan = lq.allocate(fixed, bits_per_weight=bits)
        joint = lq.allocate(table, total_bytes=-(-(plan.storage_bits + sum(plan.factor_bits.values())) // 8))
        cells = measure(f"{bits} bits, plan of rank {RANK}, objective {plan.objective:.4g}", by_plan(plan))
        found[f"rank {RANK}"].append(figures(f"plan of rank {RANK}", cells, layers))
        cells = measure(f"the same bytes, plan of ranks and formats, objective {joint.objective:.4g}", by_plan(joint))
        found["ranks"].append(figures("plan of ranks and formats", cells, layers))
    return found


def keep(found, full):
    """Write the figures of this part into the record, and keep those of the other part."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known |= {**origin(["torch", "transformers"]), "full precision": round(full, 3), **found}
    RECORD.write_text(json.dumps(known, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", action="store_true", help="compare plans of several ranks, not formats alone")
    parser.add_argument("--record", action="store_true", help="keep the figures for the documentation")
    options = arguments(parser)
    layers, measure, full = prepared(options, gradients=True)
    found = (compare_ranks if options.ranks else compare)(measure, layers, options.cache)
    if options.record:
        keep(found, full)


if __name__ == "__main__":
    main()
