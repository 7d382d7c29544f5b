from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lqlora import normal_float, student_float
from lqlora.errors import InvalidArgumentError

#: SF4 and SF3 by degrees of freedom, to the six digits of the authors' code (cornell-zhang/llm-datatypes).
PUBLISHED = {
    (4, 3): [-1, -0.575725, -0.403755, -0.29162, -0.204868, -0.131054, -0.064036, 0,
             0.055934, 0.113835, 0.176078, 0.246078, 0.329642, 0.438727, 0.60598, 1],
    (4, 5): [-1, -0.627781, -0.454736, -0.334331, -0.237434, -0.152899, -0.074982, 0,
             0.065513, 0.132965, 0.204661, 0.283835, 0.375805, 0.491076, 0.656781, 1],
    (4, 6): [-1, -0.640101, -0.467104, -0.344838, -0.245517, -0.15835, -0.077722, 0,
             0.067911, 0.137742, 0.211771, 0.293169, 0.387111, 0.503714, 0.66875, 1],
    (3, 5): [-1, -0.410848, -0.180119, 0, 0.132965, 0.283835, 0.491076, 1],
}  # fmt: skip


@pytest.mark.parametrize("arguments", PUBLISHED, ids=str)
def test_levels_are_the_published_ones(arguments):
    np.testing.assert_allclose(student_float(*arguments).levels, PUBLISHED[arguments], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("df", [1, 5, 30])
def test_levels_are_quantiles_of_the_t_distribution(bits, df):
    half, quantile = 2 ** (bits - 1), stats.t(df).ppf
    below = [quantile(1 - 0.9677083 + i * (0.9677083 - 0.5) / (half - 1)) for i in range(half - 1)]
    above = [quantile(0.5 + i * (0.9677083 - 0.5) / half) for i in range(1, half + 1)]
    expected = np.array([*below, 0.0, *above]) / quantile(0.9677083)
    np.testing.assert_allclose(student_float(bits, df).levels, expected, rtol=0, atol=1e-7)


def test_many_degrees_of_freedom_approach_the_normal_distribution():
    np.testing.assert_allclose(student_float(4, 1000).levels, normal_float(4).levels, atol=1e-3)


def test_the_name_tells_degrees_of_freedom_that_are_not_five():
    assert [student_float(4).name, student_float(4, 5).name, student_float(3, 7).name] == ["sf4", "sf4", "sf3-7"]


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_bits_out_of_range_are_refused(bits):
    student_float(4)  # a cache must not let 4.0 pass for 4
    with pytest.raises(InvalidArgumentError, match=f"^bits .*got {bits}"):
        student_float(bits)


@pytest.mark.parametrize("df", [0, 1001, 5.0, True])
def test_degrees_of_freedom_out_of_range_are_refused(df):
    student_float(4, 5), student_float(4, 1)
    with pytest.raises(InvalidArgumentError, match=f"^df .*got {df}"):
        student_float(4, df)
