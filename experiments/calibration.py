"""Error on held-out inputs, and perplexity, of SmolLM2-135M at two bits, by the number of calibration tokens and the damping.

All 210 linear layers are quantized in rotated trellis codes with error feedback. Errors of outputs are the root mean squares over the
layers of relative errors, in the norm of the inputs that each layer was quantized with, and in that of sequences at the end of the
calibration text. Both norms have the damping of :class:`lqlora.weighting.InputGram`.
"""

import argparse

import numpy as np
import torch
from smollm2 import LENGTH, arguments, known_layers, loaded

import lqlora as lq
from lqlora import recipes
from lqlora._parallel import map_matrices

FORMAT = lq.BlockFormat.parse("tcq2/64@0~both:u8/256:float32")
HELD_OUT = 32  # sequences


def quantized(layers, damping):
    """Quantize all layers with error feedback, and return them decoded."""

    def one(layer):
        q = lq.gptq(layer.weight, FORMAT, layer.gram, damping=damping, rounds=2, sweeps=1, name=layer.name)
        return lq.dequantize(q)

    return map_matrices(one, layers)


def mean_error(layers, found):
    """Return the root mean square of the errors of outputs."""
    errors = [
        lq.relative_error(layer.weight, dense, lq.weighting.InputGram(layer.gram))
        for layer, dense in zip(layers, found, strict=True)
    ]
    return float(np.sqrt(np.mean(np.square(errors))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[24, 256], help="numbers of sequences to calibrate on"
    )
    parser.add_argument("--damping", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    options = arguments(parser)
    model, own, texts = loaded(options)
    if len(own) < max(options.sequences) + HELD_OUT:
        parser.error(f"--calibration-text must have {max(options.sequences) + HELD_OUT} sequences, got {len(own)}.")
    print(f"full precision: {[recipes.perplexity(model, text) for text in texts]}\n")
    others = known_layers(model, own[-HELD_OUT:], options.cache, gradients=False)
    second = "second text | " if len(texts) > 1 else ""
    print(f"| tokens | damping | error of outputs | held out | perplexity | {second.rstrip()}")
    print("|" + "---|" * (4 + len(texts)), flush=True)
    linears = lq.nn.select_linears(model)
    # The weights of the model are replaced row after row, and the layers keep copies of the dense ones.
    known = {count: known_layers(model, own[:count], options.cache, gradients=False) for count in options.sequences}
    for count, layers in known.items():
        for damping in options.damping:
            found = quantized(layers, damping)
            with torch.no_grad():
                for layer, dense in zip(layers, found, strict=True):
                    linears[layer.name].weight.copy_(torch.from_numpy(dense))
            cells = [
                f"{count * LENGTH:,}",
                f"{damping:g}",
                f"{mean_error(layers, found):.4f}",
                f"{mean_error(others, found):.4f}",
            ]
            cells += [f"{recipes.perplexity(model, text):.5g}" for text in texts]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
