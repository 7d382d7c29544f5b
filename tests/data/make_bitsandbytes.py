"""Write ``bitsandbytes.npz``: small weights that bitsandbytes quantized, and their values decoded by bitsandbytes.

Run it by hand where bitsandbytes is installed. Keys are ``case/tensor``. ``case/source`` has the weights before
quantization and ``case/dense`` the decoded ones, both as bits of the dtype of the case.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

#: Codebook, double quantization, block size, shape and dtype by the name of the case.
CASES = {
    "nf4 plain": ("nf4", False, 32, (5, 27), "float32"),
    "nf4 nested": ("nf4", True, 64, (16, 41), "bfloat16"),
    "nf4 negative scales": ("nf4", True, 32, (12, 64), "float32"),
    "nf4 two nested blocks": ("nf4", True, 32, (130, 64), "bfloat16"),
    "fp4 plain": ("fp4", False, 64, (3, 43), "float16"),
    "fp4 nested": ("fp4", True, 32, (7, 31), "float32"),
}


def bits(tensor):
    """Return the bits of a float tensor as integers: NumPy's files have no bfloat16."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()


def source(name, shape, dtype):
    """Return weights of few significant digits, which compress well, with zeros of both signs.

    Rows of one case differ widely in size, so that some of its scales decode to negative numbers.
    """
    rng = np.random.default_rng(list(name.encode()))
    array = rng.standard_normal(shape)
    if name == "nf4 negative scales":
        array *= np.exp(3 * rng.standard_normal((shape[0], 1)))
    if name == "nf4 two nested blocks":  # repeated codes compress well
        array = np.resize(array[0, :32], shape) * rng.choice([0.5, 1.0, 1.5, 3.0], (shape[0], 1))
    array.flat[3:9] = [0.0, -0.0, 1e-4, -1e-4, 0.0, -0.0]
    return torch.from_numpy(array).to(torch.bfloat16).to(getattr(torch, dtype))


def main():
    import bitsandbytes
    from bitsandbytes import functional

    arrays = {"version": np.array(bitsandbytes.__version__)}
    for name, (kind, nested, block_size, shape, dtype) in CASES.items():
        weight = source(name, shape, dtype)
        codes, state = functional.quantize_4bit(weight, None, None, block_size, nested, kind)
        parts = {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        arrays |= {f"{name}/{key}": value.numpy() for key, value in parts.items()}
        # Decoded as one row: on processors with AVX-512, bitsandbytes 0.50.2 takes scales of wrong blocks if the length
        # of a row is not a multiple of the block size.
        state.shape = torch.Size([1, weight.numel()])
        dense = functional.dequantize_4bit(codes, state)
        arrays |= {f"{name}/source": bits(weight), f"{name}/dense": bits(dense.reshape(shape))}
    np.savez_compressed(Path(__file__).with_name("bitsandbytes.npz"), **arrays)


if __name__ == "__main__":
    main()
