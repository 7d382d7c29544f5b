"""Allocation problems of whole models, from measured errors of samples that are replicated to all matrices.

Each kind of layer has five samples of 65,536 weights. They follow Student's t with 3 to 30 degrees of freedom, and every
other sample has rows of different scale. Their errors under importance like Fisher information are measured in all 432
formats of the paper. A matrix gets the errors of one sample of its kind, times the ratio of sizes, times its own scale
(log-normal, sigma 1.2), with noise of 0.3 %. Sizes in bits are exact.
"""

import pathlib

import numpy as np

import lqlora as lq

SAMPLE = 1 << 16
PROFILES = 5

#: Shapes of the linear layers of LLaMA-2, in the order q, k, v, o, gate, up, down.
SHAPES_7B = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
SHAPES_70B = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)) + ((28672, 8192),) * 2 + ((8192, 28672),)
KINDS = len(SHAPES_7B)


def sample_errors(formats):
    """Return the weighted squared error of each sample in each format, shape (PROFILES * KINDS, formats)."""
    rng = np.random.default_rng(0)
    errors = np.empty((PROFILES * KINDS, len(formats)))
    for i, degrees in enumerate(np.geomspace(3, 30, len(errors))):
        weights = rng.standard_t(degrees, SAMPLE).astype(np.float32)
        if i % 2:
            weights *= np.repeat(rng.lognormal(0, 0.5, 64), SAMPLE // 64).astype(np.float32)
        fisher = rng.lognormal(0, 1, SAMPLE)
        for j, fmt in enumerate(formats):
            residual = lq.dequantize(lq.quantize(weights, fmt)) - weights
            errors[i, j] = (fisher * residual.astype(np.float64) ** 2).sum()
    return errors[rng.permutation(len(errors))]


def cached_errors(formats, path):
    """Return :func:`sample_errors`, from a file if it exists, and write the file otherwise."""
    if path is None:
        return sample_errors(formats)
    file = pathlib.Path(path)
    if not file.exists():
        np.save(file, sample_errors(formats))
    return np.load(file)


def replicate(errors, formats, shapes, count, seed=1):
    """Return costs and sizes of ``count`` matrices that take the shapes in turn, and their total number of weights."""
    rng = np.random.default_rng(seed)
    bits = np.array([[fmt.storage_bits(shape) for fmt in formats] for shape in shapes], dtype=np.int64)
    numel = np.array([shape[0] * shape[1] for shape in shapes])
    which = np.arange(count) % len(shapes)
    source = which % KINDS + KINDS * rng.integers(0, PROFILES, count)
    scale = rng.lognormal(0, 1.2, count) * numel[which] / SAMPLE
    cost = errors[source]
    cost *= scale[:, None]
    for rows in np.array_split(np.arange(count), -(-count // 1000)):
        cost[rows] *= 1 + 0.003 * rng.standard_normal((len(rows), len(formats)))
    return cost, bits[which], int(numel[which].sum())
