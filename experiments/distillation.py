"""Perplexity of SmolLM2-135M before and after distillation of its low-rank factors, or of its scales, from the dense model.

All 210 linear layers are decomposed in the norm of the second moments of their inputs (``experiments/smollm2.py``), with rotation
and error feedback where there are no factors. Then the factors
train by ``lq.nn.distill`` on other sequences of the calibration text, one of 512 tokens a step, with early stopping on sequences that
are not trained on. Embeddings, norms and the head stay as they are. The texts for evaluation take no part in any choice.
Bits of the rows count all stored arrays. Factors are counted with 16 bits.
"""

import argparse
import math
import re
import time

from perplexity import gram
from smollm2 import arguments, known_layers, loaded

import lqlora as lq
from lqlora import recipes
from lqlora._parallel import map_matrices
from lqlora.integrations.gguf import load_llama, packaged_smollm2

HELD_OUT = 8  # sequences
SCALES = "u8/256:float32"
RATES = {0: 1e-3, 16: 4e-4, 64: 1.5e-4}  # of scales at rank 0, and of factors at two bits: a quarter for each bit more


def configurations():
    """Return a format, a rank and a fit for each row."""
    rows = {}
    for bits in (2, 3, 4):
        for rank in (0, 16, 64):
            place = "" if rank else "@0~both"
            rows[f"{bits} bits, rank {rank}, trellis"] = (
                lq.BlockFormat.parse(f"tcq{bits}/64{place}:{SCALES}"),
                rank,
                "scale",
            )
            rows[f"{bits} bits, rank {rank}, scalar"] = (
                lq.BlockFormat.parse(f"nf{bits}/64:{SCALES}"), rank, "levels+scale",
            )  # fmt: skip
    return rows


def rate_of(fmt, rank):
    """Return the largest learning rate."""
    return RATES[rank] * (4.0 ** (2 - fmt.bits) if rank else 1.0)


def decomposed(layers, fmt, rank, fit, iterations):
    """Decompose all layers in the norm of their inputs."""

    def one(layer):
        options = {"weighting": gram(layer), "fit": fit, "max_iter": iterations if rank else 1, "rtol": 0.0}
        if fmt.rotation is not None:
            options["quantizer"] = "gptq"
        return lq.decompose(layer.weight, fmt, rank, name=layer.name, **options)

    return dict(zip((layer.name for layer in layers), map_matrices(one, layers), strict=True))


def converted(model, decompositions):
    """Replace the linear layers of a model by quantized ones, and return the bits of codes and of factors for each weight."""
    model.requires_grad_(requires_grad=False)
    for name, own in decompositions.items():
        model.set_submodule(name, lq.nn.LQLinear.from_decomposition(own))
    size = sum(math.prod(own.quantized.shape) for own in decompositions.values())
    bits = sum(8 * own.quantized.nbytes for own in decompositions.values()) / size
    return bits, sum(16 * (own.lora_A.size + own.lora_B.size) for own in decompositions.values()) / size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", type=re.compile, default=re.compile("2 bits, rank 64"), help="rows whose name it is found in"
    )
    parser.add_argument("--steps", type=int, default=96, help="sequences of 512 tokens to train on, one a step")
    parser.add_argument("--iterations", type=int, default=6, help="iterations of the decomposition")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rate", type=float, help="learning rate, in place of that of the row")
    parser.add_argument("--scales", type=float, help="learning rate of scales, which then train beside factors too")
    options = arguments(parser)
    teacher, own, texts = loaded(options)
    calibration, held_out, rest = own.split([options.calibration, HELD_OUT, len(own) - options.calibration - HELD_OUT])
    training = rest[: options.steps]
    layers = known_layers(teacher, calibration, options.cache, gradients=False)
    full = [recipes.perplexity(teacher, text) for text in texts]
    batches, tests = list(training.split(1)), list(held_out.split(1))
    outputs = lq.nn.collect_outputs(teacher, [*batches, *tests], temperature=options.temperature)
    print(
        f"full precision: {full}; {len(batches)} steps, outputs of the teacher {outputs.nbytes / 1e6:.0f} MB\n",
        flush=True,
    )
    second = "second text | after | " if len(texts) > 1 else ""
    print(
        f"| configuration | bits per weight | factors | perplexity | after | {second}divergence | after | CPU s | distilling |"
    )
    print("|" + "---|" * (9 + 2 * (len(texts) > 1)), flush=True)
    for title, (fmt, rank, fit) in configurations().items():
        if not options.only.search(title):
            continue
        start = time.process_time()
        decompositions = decomposed(layers, fmt, rank, fit, options.iterations)
        seconds = time.process_time() - start
        model, _ = load_llama(packaged_smollm2())
        bits, factor_bits = converted(model, decompositions)
        before = [recipes.perplexity(model, text) for text in texts]
        start = time.process_time()
        rates = {"learning_rate" if rank else "scale_learning_rate": options.rate or rate_of(fmt, rank)}
        if options.scales:
            rates["scale_learning_rate"] = options.scales
        train = (("factors",) if rank else ()) + (("scales",) if "scale_learning_rate" in rates else ())
        report = lq.nn.distill(
            model, outputs, batches, held_out=tests, train=train, **rates, temperature=options.temperature, evaluate_every=12, patience=4,
        )  # fmt: skip
        distilling = time.process_time() - start
        if "scales" in train:
            lq.nn.freeze_scales(model, fmt.scales)  # they train in 32 bits, and are stored as before
        after = [recipes.perplexity(model, text) for text in texts]
        cells = [f"{value:.5g}" for pair in zip(before, after, strict=True) for value in pair]
        found = report.held_out[0], report.held_out[report.best_step]
        print(
            f"| {title} | {bits:.4f} | {factor_bits:.3f} | {' | '.join(cells)} | {found[0]:.4f} | {found[1]:.4f} | {seconds:.0f} | "
            f"{distilling:.0f} |",
            flush=True,
        )
        del model


if __name__ == "__main__":
    main()
