"""Perplexity of SmolLM2-135M in trellis codes beside scalar codes, before any fine-tuning.

Scales of both take 8 bits for 64 weights. Rows are named by bits and rank; ``experiments/smollm2.py`` says what is measured.
``--only REGEX`` chooses rows, ``--only .`` all of them.
"""

import argparse
import re

from perplexity import each, fed_back, gram, quantized
from smollm2 import arguments, decomposed, prepared

import lqlora as lq

SCALES = "u8/256:float32"
ITERATIONS = 6


def fed_back_at_last(layer, fmt, rank, **options):
    """Decompose a layer, and continue with error feedback for one iteration."""
    start = lq.decompose(layer.weight, fmt, rank, max_iter=ITERATIONS, name=layer.name, **options)
    return decomposed(layer, fmt, rank, max_iter=1, quantizer="gptq", start=start, **options)


def rows_of(bits):
    """Return the configurations of one number of bits."""
    scalar, trellis, down, rotated = (
        lq.BlockFormat.parse(f"{book}{bits}/{block}:{SCALES}")
        for book, block in (("nf", "64"), ("tcq", "64"), ("tcq", "64@0"), ("tcq", "64@0~both"))
    )
    rows = {
        f"{bits} bits, scalar, error feedback": each(fed_back, scalar, fit="levels+scale"),
        f"{bits} bits, trellis, nearest": each(quantized, trellis, fit="scale"),
        f"{bits} bits, trellis, error feedback": each(fed_back, down, rounds=2, sweeps=1),
        f"{bits} bits, trellis, rotated, error feedback": each(fed_back, rotated, rounds=2, sweeps=1),
    }
    for rank in (16, 64):
        common = {"rank": rank, "weighting": gram, "max_iter": ITERATIONS, "rtol": 0.0}
        rows[f"{bits} bits, rank {rank}, scalar"] = each(decomposed, scalar, fit="levels+scale", **common)
        rows[f"{bits} bits, rank {rank}, trellis"] = each(decomposed, trellis, fit="scale", **common)
    return rows


CONFIGURATIONS = {title: make for bits in (2, 3, 4) for title, make in rows_of(bits).items()}
#: Scalar codes at the storage of other tools, and trellis codes with factors and error feedback.
CONFIGURATIONS |= {
    f"{text}, rotated, error feedback": each(
        fed_back, lq.BlockFormat.parse(f"{text}@-1~both7:{SCALES}"), fit="levels+scale"
    )
    for text in ("nf2/29", "nf2/13", "nf3/30")
}
#: Fine zero points, at the storage of Q2_K and Q3_K.
CONFIGURATIONS |= {
    f"{text}, error feedback": each(fed_back, lq.BlockFormat.parse(text), fit="scale")
    for text in (
        "affine2-4/16@-1:u4/16:float16",
        "affine2-4/16@-1~both7:u4/16:float16",
        "affine3-6/32@-1:u8/256:float32",
        "affine3-6/32@-1~both7:u8/256:float32",
    )
}
CONFIGURATIONS["2 bits, rank 64, trellis, 12 iterations"] = each(
    decomposed, lq.BlockFormat.parse(f"tcq2/64:{SCALES}"), rank=64, weighting=gram, fit="scale", max_iter=12, rtol=0.0
)
CONFIGURATIONS["2 bits, rank 16, trellis, a last iteration with error feedback"] = each(
    fed_back_at_last, lq.BlockFormat.parse(f"tcq2/64@0:{SCALES}"), rank=16, weighting=gram, fit="scale", rtol=0.0
)
CONFIGURATIONS["2 bits, rank 16, trellis, rotated, error feedback"] = each(
    decomposed, lq.BlockFormat.parse(f"tcq2/64@0~both7:{SCALES}"), rank=16, weighting=gram, quantizer="gptq", fit="scale", max_iter=2,
    rtol=0.0,
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", type=re.compile, default=re.compile("2 bits.*trellis"), help="rows whose name it is found in"
    )
    options = arguments(parser)
    _, measure, _ = prepared(options, gradients=False)
    for title, configuration in CONFIGURATIONS.items():
        if options.only.search(title):
            measure(title, configuration)


if __name__ == "__main__":
    main()
