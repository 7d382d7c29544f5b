"""Curves of fine-tuning: held-out loss of SmolLM2-135M while the factors, or the scales, train from each starting point.

All 210 linear layers are quantized, and nothing else trains. Each run takes every training sequence once, in an order that its
seed draws, with AdamW and a learning rate that falls to zero. The loss is measured on a held-out text of the same kind, and on
a text of another kind that is never trained on. Runs take a quarter of an hour or more each, so each is written to
``docs/measurements/fine_tuning.json`` when it ends, and those in the file are not repeated. ``--only REGEX`` chooses methods.
"""

import argparse
import datetime as dt
import json
import re
import sys
import time
from pathlib import Path

import torch
from smollm2 import collected

import lqlora as lq
from lqlora import nn, recipes
from lqlora.integrations.gguf import load_llama, packaged_smollm2
from lqlora.weighting import Elementwise

RECORD = Path(__file__).parents[1] / "docs" / "measurements" / "fine_tuning.json"
SCALES = "u8/256:float32"
NF3, NF4 = (lq.BlockFormat.parse(f"nf{bits}/64:{SCALES}") for bits in (3, 4))
GRID = [lq.BlockFormat.parse(f"nf{bits}/{block}:{SCALES}") for bits in (2, 3, 4) for block in (16, 32, 64)]
BUDGET = 2.75
PARTS = 6  # measurements after the first
FACTORS, SCALE_RATE = 5e-4, 5e-5  # learning rates


def by_plan(layers, fishers, rank):
    """Decompose as LQ-LoRA: formats by an integer program under a budget, errors weighted by Fisher information."""
    weighting = {name: Elementwise(fisher, sweeps=0) for name, fisher in fishers.items()}
    options = {"weighting": weighting, "fit": "levels+scale"}
    table = lq.cost_table(layers, GRID, rank=rank, max_iter=1, **options)
    plan = lq.allocate(table, bits_per_weight=BUDGET)
    return {
        name: lq.decompose(w, plan.formats[name], rank, weighting=weighting[name], fit="levels+scale", max_iter=4)
        for name, w in layers.items()
    }


def by(initializer, fmt):
    return lambda layers, _, rank: {name: initializer(w, fmt, rank) for name, w in layers.items()}


def scales_of(fmt):
    """Quantize to the scales with the least error, and let these train. There are no factors."""
    return lambda layers, *_: {name: lq.decompose(w, fmt, 0, fit="scale", max_iter=1) for name, w in layers.items()}


#: Functions that decompose all layers, and whether scales train instead of factors.
METHODS = {
    "QLoRA, 3 bits": (by(lq.initializers.qlora, NF3), False),
    "LoftQ, 3 bits": (by(lq.initializers.loftq, NF3), False),
    f"LQ-LoRA, {BUDGET} bits": (by_plan, False),
    "PEQA, 4 bits": (scales_of(NF4), True),
    "PEQA, 3 bits": (scales_of(NF3), True),
}


def converted(model, decompositions, *, scales_train):
    """Replace the linear layers of a model by quantized ones."""
    model.requires_grad_(requires_grad=False)
    for name, decomposition in decompositions.items():
        layer = (
            nn.PEQALinear(decomposition.quantized) if scales_train else nn.LQLinear.from_decomposition(decomposition)
        )
        model.set_submodule(name, layer)


def loss(model, sequences):
    """Return the mean loss of all predictions, in nats per token."""
    with torch.inference_mode():
        return sum(float(nn.causal_lm_loss(model, own[None]).sum()) for own in sequences) / len(sequences)


def trained(model, sequences, rate, measure):
    """Train as ``lq.recipes.fine_tune`` does, and measure at equal distances; return the measurements."""
    parameters = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(sequences))
    found = [measure(0)]
    for step, sequence in enumerate(sequences, 1):
        optimizer.zero_grad(set_to_none=True)
        nn.causal_lm_loss(model, sequence[None]).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, len(sequences) // PARTS) == 0:
            found.append(measure(step))
    return found


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("training", "evaluation", "second"):
        parser.add_argument(f"--{name}-text", type=Path, required=True, help=f"file with the {name} text")
    parser.add_argument("--only", type=re.compile, default=re.compile("."), help="methods whose name it is found in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sequence; a step takes one sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--evaluated", type=int, default=24, help="sequences that each text is evaluated on")
    parser.add_argument("--calibration", type=int, default=96, help="sequences for Fisher information")
    parser.add_argument("--cache", type=Path, help="folder that keeps Fisher information between runs")
    parser.add_argument("--record", type=Path, default=RECORD, help="file of the results")
    return parser.parse_args()


def recorded(path, settings):
    """Return the results so far, which must have the same settings."""
    if not path.exists():
        return {"date": dt.datetime.now(dt.UTC).date().isoformat(), "settings": settings, "full": None, "runs": {}}
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        sys.exit(f"{path} has other settings: {found['settings']}, not {settings}.")
    return found


def main():
    options = arguments()
    model, tokenizer = load_llama(packaged_smollm2())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def sequences(path):
        return recipes.token_sequences(tokenizer, recipes.read_text(path), options.tokens)

    own = sequences(options.training_text)
    calibration, training = own[: options.calibration], own[options.calibration :]
    held_out, second = (sequences(path)[: options.evaluated] for path in (options.evaluation_text, options.second_text))
    names = {key: str(getattr(options, f"{key}_text").name) for key in ("training", "evaluation", "second")}
    numbers = {key: getattr(options, key) for key in ("steps", "tokens", "rank", "evaluated", "calibration")}
    results = recorded(options.record, {**names, **numbers, "factor rate": FACTORS, "scale rate": SCALE_RATE})
    results["full"] = results["full"] or [loss(model, held_out), loss(model, second)]
    layers = {name: own.weight.detach().numpy() for name, own in nn.select_linears(model).items()}

    def fisher(sequences):
        return nn.collect_fisher(model, sequences.split(1))

    for name, (decompose, scales_train) in METHODS.items():
        missing = [seed for seed in options.seeds if f"{name}, seed {seed}" not in results["runs"]]
        if not (options.only.search(name) and missing):
            continue
        fishers = collected("fisher", fisher, calibration, options.cache) if decompose is by_plan else None
        decompositions = decompose(layers, fishers, options.rank)
        size = sum(own.quantized.nbytes for own in decompositions.values())
        factors = 0 if scales_train else 2 * sum(own.lora_A.size + own.lora_B.size for own in decompositions.values())
        for seed in missing:
            start = time.process_time()
            run, _ = load_llama(packaged_smollm2())
            run.load_state_dict(state)
            converted(run, decompositions, scales_train=scales_train)

            def measure(step, run=run, name=name, seed=seed):
                found = [step, loss(run, held_out), loss(run, second)]
                print(f"{name}, seed {seed}, step {step}: {found[1]:.4f}, second text {found[2]:.4f}", flush=True)
                return found

            order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[: options.steps]
            curve = trained(run, training[order], SCALE_RATE if scales_train else FACTORS, measure)
            results["runs"][f"{name}, seed {seed}"] = {
                "method": name, "bytes": size, "factor bytes in 16 bits": factors, "curve": curve,
                "cpu seconds": round(time.process_time() - start),
            }  # fmt: skip
            options.record.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
