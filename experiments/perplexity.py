"""Perplexity of SmolLM2-135M with all its linear layers compressed, before any fine-tuning.

Each row is a format, a norm and a method; ``experiments/smollm2.py`` says what is measured. A full run takes hours:
``--only REGEX`` chooses rows, ``--only .`` all of them.
"""

import argparse
import re
from functools import partial

from smollm2 import FITTED, FOUR, RANK, Compressed, arguments, decomposed, of_decomposition, prepared, rank_one_fisher

import lqlora as lq
from lqlora._parallel import map_matrices
from lqlora.weighting import Elementwise, InputGram, Kronecker, RowColumn

NF4, NF3, NF2 = (lq.BlockFormat.parse(f"nf{bits}/64:u8/256:float32") for bits in (4, 3, 2))


def each(compress, fmt, **options):
    """Return a configuration that compresses every layer; options that are functions are called with each layer."""

    def one(layer):
        values = {name: value(layer) if callable(value) else value for name, value in options.items()}
        return compress(layer, fmt, **values)

    return partial(map_matrices, one)


def quantized(layer, fmt, **options):
    q = lq.quantize(layer.weight, fmt, name=layer.name, **options)
    return Compressed(lq.dequantize(q), 8 * q.nbytes)


def fed_back(layer, fmt, **options):
    q = lq.gptq(layer.weight, fmt, layer.gram, name=layer.name, **options)
    return Compressed(lq.dequantize(q), 8 * q.nbytes)


def original(layer, fmt):
    """Decompose as the original does, to the end of its plain alternation."""
    return of_decomposition(lq.initializers.lqlora(layer.weight, fmt, RANK))


def original_mix(layers, bits):
    """Choose among the three formats as the original does, by the plain error of a short alternation."""
    weights = {layer.name: layer.weight for layer in layers}
    table = lq.cost_table(weights, [NF4, NF3, NF2], rank=RANK, init="svd", extrapolation=0.0, max_iter=2)
    plan = lq.allocate(table, bits_per_weight=bits)
    return map_matrices(lambda layer: original(layer, plan.formats[layer.name]), layers)


def gram(layer):
    return InputGram(layer.gram)


def mean_squares(layer):
    return RowColumn(None, layer.squares[0])


def kronecker(layer):
    return Kronecker(layer.output_gram, layer.gram)


def fisher(layer):
    return Elementwise(layer.fisher)


#: Pattern of the names of norms that need gradients of the loss.
GRADIENTS = re.compile("Fisher|Kronecker")


def rows_of(name, fmt):
    """Return the configurations of one number of bits."""
    low_rank = f"{name} + rank {RANK}"
    norms = {
        "fitted": None,
        "mean squares of inputs": mean_squares,
        "rank-one Fisher": rank_one_fisher,
        "Fisher": fisher,
        "Kronecker": kronecker,
        "Gram": gram,
    }
    return {
        name: each(quantized, fmt),
        f"{name}, fitted": each(quantized, fmt, **FITTED),
        f"{name}, fitted to inputs": each(quantized, fmt, **FITTED, weights=lambda layer: layer.squares),
        f"{name}, error feedback": each(fed_back, fmt, **FITTED),
        f"{low_rank}, original": each(original, fmt),
        **{f"{low_rank}, {norm}": each(decomposed, fmt, rank=RANK, **FOUR, weighting=by) for norm, by in norms.items()},
        f"{low_rank}, Gram, absmax": each(decomposed, fmt, rank=RANK, max_iter=4, rtol=0.0, weighting=gram),
        f"{low_rank}, Gram, quantized first": each(decomposed, fmt, rank=RANK, **FOUR, weighting=gram, init="quantize"),
        f"{low_rank}, Gram, error feedback": each(decomposed, fmt, rank=RANK, **FOUR, weighting=gram, quantizer="gptq"),
    }


MIX = f"2.75 bits of NF4, NF3, NF2 + rank {RANK}, original"
CONFIGURATIONS = {
    **rows_of("NF4", NF4),
    **rows_of("NF3", NF3),
    MIX: partial(original_mix, bits=2.75),
    **rows_of("NF2", NF2),
}
DEFAULT = "^NF3$|^NF3 . rank 64, Gram$"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=re.compile, default=re.compile(DEFAULT), help="rows whose name it is found in")
    options = arguments(parser)
    chosen = {title: make for title, make in CONFIGURATIONS.items() if options.only.search(title)}
    _, measure, _ = prepared(options, gradients=any(GRADIENTS.search(title) for title in chosen))
    for title, configuration in chosen.items():
        measure(title, configuration)


if __name__ == "__main__":
    main()
