"""Properties of ``lqlora.testing`` on NF4 of this library, bitsandbytes and torchao, on the CPU.

The other two need ``pip install bitsandbytes torchao``; one that is not installed is named and left out. Each library is
checked with its own table of levels. Quantized scales may be off by a hundredth of the largest weight of the array.
"""

import importlib
import importlib.metadata
import logging
import sys

import ml_dtypes
import numpy as np

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.testing import PROPERTIES, check_quantizer

BLOCK = 64
SCALES = 4  # scales per second-level scale. torchao takes only whole blocks of them; its default is 256
NESTED = {"independent_blocks": False, "scale_tolerance": 0.01}
COMMON = {"block_size": BLOCK, "max_examples": 200}


def tensor(w):
    """Return a torch tensor that shares the memory and has the strides of the array."""
    import torch

    if w.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(w.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(w)


def own(text, **options):
    fmt = lq.BlockFormat.parse(text)
    return check_quantizer(lambda w: lq.quantize(w, fmt), lq.dequantize, levels=lq.NF4, **COMMON, **options)


def bitsandbytes(*, nested):
    functional = importlib.import_module("bitsandbytes.functional")
    return check_quantizer(
        lambda w: functional.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4", compress_statistics=nested),
        lambda q: functional.dequantize_4bit(*q, quant_type="nf4"),
        adapt=tensor,
        levels=lq.NF4,
        **COMMON,
        **(NESTED if nested else {}),
    )


def torchao():
    nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    multiple = BLOCK * SCALES
    return check_quantizer(
        lambda w: nf4.to_nf4(w, BLOCK, SCALES),
        lambda q: q.get_original_weight(),
        adapt=tensor,
        levels=nf4.to_nf4(tensor(np.zeros(multiple, dtype=np.float32)), BLOCK, SCALES).nf4.tolist(),
        size_multiple=multiple,
        **COMMON,
        **NESTED,
    )


RUNS = {
    "lqlora nf4/64:float32": ("numpy", lambda: own("nf4/64:float32")),
    "lqlora nf4/64:u8/256:float32": ("numpy", lambda: own("nf4/64:u8/256:float32", **NESTED)),
    "bitsandbytes NF4": ("bitsandbytes", lambda: bitsandbytes(nested=False)),
    "bitsandbytes NF4 nested": ("bitsandbytes", lambda: bitsandbytes(nested=True)),
    "torchao to_nf4": ("torchao", torchao),
}


def main():
    logging.disable(logging.WARNING)
    installed = {name for name in ("torch", "bitsandbytes", "torchao", "numpy", "hypothesis") if is_installed(name)}
    for missing in {package for package, _ in RUNS.values()} - installed:
        print(f"{missing} is not installed: its columns are missing.\n")
    found = {name: run() for name, (package, run) in RUNS.items() if package in installed}
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in sorted(installed))
    print(f"Python {sys.version.split()[0]}, {versions}; {COMMON['max_examples']} examples per property\n")
    print("| property | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for name in PROPERTIES:
        results = [report[name].result for report in found.values()]
        print(f"| {name} | " + " | ".join("–" if r == "skipped" else r for r in results) + " |")
    for name, report in found.items():
        if report.failed:
            print(f"\n{name}\n")
        for failed in report.failed:
            print(f"- `{failed}`: {report[failed].message}")


if __name__ == "__main__":
    main()
