"""Perplexity of SmolLM2-135M quantized block after block, each block on the inputs that the quantized blocks before it give.

``lq.nn.quantize_blocks`` quantizes all 210 linear layers in the norm of these inputs. ``experiments/trellis.py`` has rows of the same
formats on the inputs of the dense model. The texts for evaluation take no part in any choice.
"""

import argparse
import math
import time

from smollm2 import EVALUATION, LENGTH, arguments

import lqlora as lq
from lqlora import recipes
from lqlora.integrations.gguf import load_llama, packaged_smollm2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="tcq2/64@0~both:u8/256:float32")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--quantizer", choices=("nearest", "gptq"), default="gptq")
    parser.add_argument("--iterations", type=int, default=4)
    options = arguments(parser)
    if options.text is None:
        parser.error("give --text and --calibration-text: the packaged text is too short")
    model, tokenizer = load_llama(packaged_smollm2())

    def sequences(path, count):
        return recipes.token_sequences(tokenizer, recipes.read_text(path), LENGTH)[:count]

    calibration = sequences(options.calibration_text, options.calibration)
    texts = [sequences(path, EVALUATION) for path in (options.text, options.second_text) if path]
    start = time.process_time()
    report = lq.nn.quantize_blocks(
        model, lq.BlockFormat.parse(options.format), calibration.split(4), rank=options.rank, fit="scale", quantizer=options.quantizer,
        max_iter=options.iterations, rtol=0.0,
    )  # fmt: skip
    seconds = time.process_time() - start
    layers = report.layers.values()
    size = sum(math.prod(own.shape) for own in layers)
    bits, factor_bits = sum(8 * own.nbytes for own in layers) / size, sum(4 * own.factor_bytes for own in layers) / size
    found = " | ".join(f"{recipes.perplexity(model, text):.5g}" for text in texts)
    print(
        "| format | rank | tokens | bits per weight | factors | perplexity |"
        + " second text |" * (len(texts) - 1)
        + " CPU s |"
    )
    print("|" + "---|" * (6 + len(texts)))
    print(
        f"| {options.format} | {options.rank} | {calibration.numel():,} | {bits:.4f} | {factor_bits:.3f} | {found} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
