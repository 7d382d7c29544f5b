"""Curves of fine-tuning: held-out loss of SmolLM2-135M while the factors, or the scales, train from each starting point.

All 210 linear layers are quantized, and nothing else trains. Each run takes every training sequence once, in an order that its
seed draws, with AdamW and a learning rate that falls to zero. The loss is measured on a held-out text of the same kind, and on
a text of another kind that is never trained on. Runs take a quarter of an hour or more each, so each is written to
``docs/measurements/fine_tuning.json`` when it ends, and those in the file are not repeated. ``--only REGEX`` chooses methods.
"""

import argparse
import re
import time
from pathlib import Path

import torch
from curves import METHODS, converted, record, recorded, sizes, trained
from smollm2 import collected

from lqlora import nn, recipes
from lqlora.integrations.gguf import load_llama, packaged_smollm2

RECORD = Path(__file__).parents[1] / "docs" / "measurements" / "fine_tuning.json"
FACTORS, SCALE_RATE = 5e-4, 5e-5  # learning rates


def loss(model, sequences):
    """Return the mean loss of all predictions, in nats per token."""
    with torch.inference_mode():
        return sum(float(nn.causal_lm_loss(model, own[None]).sum()) for own in sequences) / len(sequences)


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

    def fishers():
        return collected("fisher", fisher, calibration, options.cache)

    for name, (decompose, scales_train) in METHODS.items():
        missing = [seed for seed in options.seeds if f"{name}, seed {seed}" not in results["runs"]]
        if not (options.only.search(name) and missing):
            continue
        decompositions = decompose(layers, fishers, options.rank)
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
            groups = [
                {
                    "params": [own for own in run.parameters() if own.requires_grad],
                    "lr": SCALE_RATE if scales_train else FACTORS,
                }
            ]
            batches = training[order].split(1)
            curve = trained(groups, batches, lambda batch, run=run: nn.causal_lm_loss(run, batch), measure)
            results["runs"][f"{name}, seed {seed}"] = {
                "method": name, **sizes(decompositions, scales_train=scales_train), "curve": curve,
                "cpu seconds": round(time.process_time() - start),
            }  # fmt: skip
            record(options.record, results)


if __name__ == "__main__":
    main()
