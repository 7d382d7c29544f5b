"""Errors of NF4 on normal noise against the values that bitsandbytes publishes."""

import numpy as np
import pytest

import lqlora as lq

#: Mean absolute error and mean relative error by block size. Source: TestQuantize4BitFunctional.test_4bit_quant in
#: tests/test_functional.py of github.com/bitsandbytes-foundation/bitsandbytes, whose tolerance is seven standard
#: deviations, 5e-4 for blocks of 64.
PUBLISHED = {
    32: (0.067746, 0.1897),
    64: (0.072798, 0.2033),
    128: (0.076831, 0.2152),
    256: (0.080337, 0.2261),
    512: (0.083547, 0.2361),
    1024: (0.086610, 0.2454),
    2048: (0.089592, 0.2542),
    4096: (0.092547, 0.2625),
}


@pytest.mark.parametrize("block_size", PUBLISHED)
def test_nf4_has_the_published_errors(block_size):
    absolute, relative = [], []
    for seed in range(4):  # matrices of 1024 x 1024, as in the tests of bitsandbytes
        w = np.random.default_rng(seed).standard_normal((1024, 1024), dtype=np.float32)
        error = np.abs(lq.dequantize(lq.quantize(w, lq.BlockFormat(lq.NF4, block_size))) - w)
        absolute.append(error.mean(dtype=np.float64))
        relative.append((error / (np.abs(w) + 1e-8)).mean(dtype=np.float64))
    expected = PUBLISHED[block_size]
    assert np.mean(absolute) == pytest.approx(expected[0], abs=4e-4)
    assert np.mean(relative) == pytest.approx(expected[1], abs=1e-3)
