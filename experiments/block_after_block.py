"""Perplexity of SmolLM2-135M quantized block after block, each block on the inputs that the quantized blocks before it give.

``lq.nn.quantize_blocks`` quantizes all 210 linear layers in the norm of these inputs, and ``--tuning-steps`` trains each block after that.
``experiments/trellis.py`` has rows of the same formats on the inputs of the dense model. Errors of outputs are medians over the layers, on
the inputs for calibration and on 16 sequences from the end of that text. The texts for evaluation take no part in any choice.
"""

import argparse
import math
import statistics
import time

from smollm2 import arguments, loaded

import lqlora as lq
from lqlora import recipes

HELD_OUT = 16  # sequences


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="tcq2/64@0~both:u8/256:float32")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--quantizer", choices=("nearest", "gptq"), default="gptq")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--fit", choices=("absmax", "scale", "levels+scale"), default="scale")
    parser.add_argument("--tuning-steps", type=int, default=0, help="steps for each block, on four sequences each")
    parser.add_argument("--train", nargs="+", default=["codes", "scales"], help="parts that train")
    options = arguments(parser)
    model, own, texts = loaded(options)
    calibration, held_out = own[: options.calibration], own[-HELD_OUT:]
    tuning = lq.nn.BlockTuning(steps=options.tuning_steps, train=options.train) if options.tuning_steps else None
    start = time.process_time()
    report = lq.nn.quantize_blocks(
        model, lq.BlockFormat.parse(options.format), calibration.split(1), rank=options.rank, fit=options.fit, quantizer=options.quantizer,
        max_iter=options.iterations, rtol=0.0, tuning=tuning, held_out=held_out.split(4),
    )  # fmt: skip
    seconds = time.process_time() - start
    layers = report.layers.values()
    size = sum(math.prod(own.shape) for own in layers)
    bits, factor_bits = sum(8 * own.nbytes for own in layers) / size, sum(4 * own.factor_bytes for own in layers) / size
    found = " | ".join(f"{recipes.perplexity(model, text):.5g}" for text in texts)
    errors = [statistics.median(getattr(own, key) for own in layers) for key in ("relative_error", "held_out_error")]
    second = "second text | " if len(texts) > 1 else ""
    print(
        f"| format | rank | tokens | steps | bits per weight | factors | perplexity | {second}error of outputs | held out | CPU s |"
    )
    print("|" + "---|" * (9 + len(texts)))
    cells = [
        options.format,
        options.rank,
        f"{calibration.numel():,}",
        options.tuning_steps,
        f"{bits:.4f}",
        f"{factor_bits:.3f}",
        found,
    ]
    print(f"| {' | '.join(map(str, cells))} | {errors[0]:.4f} | {errors[1]:.4f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
