"""SmolLM2-135M within several budgets of bits, by ``lqlora.recipes.compress`` without factors and without distillation.

Rows are for the comparison with other tools at equal storage, in ``experiments/README.md``. Bits count codes and scales of the 210 linear
layers. Embeddings, norms and the head stay as they are. The texts for evaluation take no part in any choice.
"""

import argparse
import time
from collections import Counter

from smollm2 import LENGTH, arguments, loaded

from lqlora import recipes
from lqlora.integrations.gguf import load_llama, packaged_smollm2

HELD_OUT = 8  # sequences


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=[2.13, 2.5, 3.0, 3.5, 4.13], help="budgets")
    parser.add_argument("--codes", choices=["trellis", "scalar"], default="trellis")
    options = arguments(parser)
    model, own, texts = loaded(options)
    split = recipes.Split(own[: options.calibration], own[:0], own[-HELD_OUT:])
    print(
        f"{len(split.calibration) * LENGTH:,} tokens, full precision: {[recipes.perplexity(model, text) for text in texts]}\n"
    )
    second = "second text | " if len(texts) > 1 else ""
    print(f"| budget | bits per weight | MB | formats | error of outputs | held out | perplexity | {second}CPU s |")
    print("|" + "---|" * (8 + bool(second)), flush=True)
    for bits in options.bits:
        model, _ = load_llama(packaged_smollm2())
        start = time.process_time()
        report = recipes.compress(model, split, bits, rank=0, codes=options.codes, progress=False).quantization
        seconds = time.process_time() - start
        layers = report.layers.values()
        errors = [
            (sum(getattr(layer, key) ** 2 for layer in layers) / len(layers)) ** 0.5
            for key in ("relative_error", "held_out_error")
        ]
        formats = ", ".join(
            f"{count} {own.codebook.name}" for own, count in Counter(layer.format for layer in layers).items()
        )
        cells = [f"{bits:g}", f"{report.bits_per_weight:.4f}", f"{report.storage_bits / 8e6:.2f}", formats]
        cells += [f"{error:.4f}" for error in errors] + [f"{recipes.perplexity(model, text):.5g}" for text in texts]
        print(f"| {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
