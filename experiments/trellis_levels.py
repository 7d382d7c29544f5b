"""Train the levels of trellis codes whose states have at most ten bits, which ``lqlora/codebooks/trellis_levels.npz`` holds.

Lloyd's algorithm on normal weights, each block of 64 divided by its root mean square: find the best sequences for the levels of before,
and move the level of each state to the mean of the weights that took it. Noise on the levels, less in each iteration, keeps the search
from the nearest local minimum. Levels are stored as integers, in units of 2^-12. Seeds are fixed.
"""

import argparse
from pathlib import Path

import numpy as np

from lqlora._parallel import map_matrices
from lqlora.codebooks import trellis_code
from lqlora.codebooks.trellis import _TRAINED, _TRAINED_BITS, _UNIT
from lqlora.ops.packing import unpack_codes
from lqlora.ops.trellis import encode_trellis, trellis_values

BLOCK = 64
NOISE = 0.3  # of the levels in the first iteration, as a part of the root mean squared error
NOISY = 0.5  # part of the iterations that has noise
SCATTERED = 12  # bits of states whose levels are computed: every few of them are the start


def normal(count, seed):
    """Return blocks of normal weights, each divided by its root mean square."""
    blocks = np.random.default_rng(seed).standard_normal((count // BLOCK, BLOCK))
    return (blocks / np.sqrt(np.mean(blocks**2, axis=1, keepdims=True))).astype(np.float32)


def states_of(weights, levels, bits):
    """Return the state of each weight in the best sequences."""
    packed = encode_trellis(weights.reshape(-1), np.ones(len(weights), np.float32), None, levels, bits, BLOCK, BLOCK)
    codes = np.asarray(unpack_codes(packed, bits, weights.size)).reshape(weights.shape)
    # Values of codes under levels that are the numbers of the states.
    return trellis_values(codes, np.arange(len(levels), dtype=np.float32), bits).astype(np.int32)


def trained(bits, state_bits, count, iterations):
    """Return the levels for codes and states of some bits, in units."""
    weights, random = normal(count, seed=bits), np.random.default_rng(100 * bits + state_bits)
    levels = trellis_code(bits, SCATTERED).levels[:: 2 ** (SCATTERED - state_bits)].copy()
    for iteration in range(iterations):
        states = states_of(weights, levels, bits)
        error = np.mean((levels[states] - weights) ** 2, dtype=np.float64)
        taken = np.bincount(states.reshape(-1), minlength=len(levels))
        total = np.bincount(states.reshape(-1), weights.reshape(-1), minlength=len(levels))
        fading = max(0.0, 1.0 - iteration / (NOISY * iterations))
        noise = NOISE * fading * np.sqrt(error) * random.standard_normal(len(levels))
        levels = np.where(taken > 0, total / np.maximum(taken, 1) + noise, levels).astype(np.float32)
    return np.rint(levels / _UNIT).astype(np.int16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=1 << 21, help="weights to train on")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--out", type=Path, default=_TRAINED)
    options = parser.parse_args()
    test = normal(1 << 21, seed=1000)

    def one(pair):
        bits, state_bits = pair
        levels = trained(bits, state_bits, options.weights, options.iterations)
        table = levels * _UNIT
        error = np.mean((table[states_of(test, table, bits)] - test) ** 2, dtype=np.float64)
        print(f"{bits} bits, states of {state_bits}: mean squared error {error:.5f} on other weights", flush=True)
        return levels

    sizes = range(_TRAINED_BITS, 3, -1)
    pairs = [(bits, state_bits) for state_bits in sizes for bits in range(1, min(4, state_bits // 2) + 1)]
    tables = dict(zip(pairs, map_matrices(one, pairs), strict=True))
    np.savez(
        options.out, **{f"tcq{bits}-{state_bits}": levels for (bits, state_bits), levels in sorted(tables.items())}
    )


if __name__ == "__main__":
    main()
