"""Arguments of decompose that are refused before any work is done."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lqlora import BlockFormat, decompose
from lqlora.errors import InvalidArgumentError, NonFiniteError, UnsupportedArrayError
from tests.decomposition.cases import FMT, matrix
from tests.strategies import on


@pytest.mark.parametrize("rank", [-1, 33, 4.0, "4", None])
def test_ranks_out_of_range_are_refused(xp, rank):
    with pytest.raises(InvalidArgumentError, match=f"^rank .* 0 and 32 .*q_proj.*got {rank!r}"):
        decompose(on(xp, matrix()), FMT, rank, name="q_proj")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(xp, bad):
    w = matrix()
    w[3, 5] = bad
    with pytest.raises(NonFiniteError, match=r"^q_proj .*\(3, 5\)"):
        decompose(on(xp, w), FMT, 4, name="q_proj")


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_only_matrices_are_decomposed(xp, shape):
    with pytest.raises(InvalidArgumentError, match=f"^q_proj .*shape {re.escape(str(shape))}"):
        decompose(on(xp, np.ones(shape, dtype=np.float32)), FMT, 0, name="q_proj")


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64])
def test_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match=r"^q_proj must be"):
        decompose(on(xp, np.ones((4, 4), dtype=dtype)), FMT, 1, name="q_proj")


def test_a_scale_out_of_range_names_the_matrix():
    w = matrix() * np.float32(1e7)
    with pytest.raises(NonFiniteError, match=r"q_proj.*float16"):
        decompose(w, BlockFormat.parse("nf3/16:float16"), 4, name="q_proj")


@pytest.mark.parametrize("weighting", [np.ones((2, 2)), "fisher"])
def test_other_types_than_weightings_are_refused(weighting):
    with pytest.raises(InvalidArgumentError, match=f"^weighting .*got {type(weighting).__name__}"):
        decompose(matrix(), FMT, 1, weighting=weighting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iter": 0}, "^max_iter .*got 0"),
        ({"max_iter": 2.0}, "^max_iter .*got 2.0"),
        ({"max_iter": True}, "^max_iter .*got True"),
        ({"scaling": 0.0}, "^scaling .*got 0.0"),
        ({"scaling": -1.0}, "^scaling .*got -1.0"),
        ({"scaling": np.nan}, "^scaling .*got nan"),
        ({"scaling": np.inf}, "^scaling .*got inf"),
        ({"init": "pissa"}, "^init .*got 'pissa'"),
        ({"fit": "best"}, "^fit .*got 'best'"),
        ({"init_rank": -1}, "^init_rank .* 4, got -1"),
        ({"init_rank": 5}, "^init_rank .* 4, got 5"),
        ({"init_rank": 2.0}, "^init_rank .* 4, got 2.0"),
        ({"extrapolation": -0.1}, "^extrapolation .*got -0.1"),
        ({"extrapolation": 1.1}, "^extrapolation .*got 1.1"),
        ({"extrapolation": np.nan}, "^extrapolation .*got nan"),
        ({"time_limit": -1.0}, "^time_limit .*got -1.0"),
        ({"time_limit": np.nan}, "^time_limit .*got nan"),
        ({"seed": -1}, "^seed .*got -1"),
        ({"seed": 1.5}, "^seed .*got 1.5"),
        ({"seed": None}, "^seed .*got None"),
        ({"rtol": np.nan}, "^rtol .*got nan"),
        ({"rtol": -1.0}, "^rtol .*got -1.0"),
        ({"target": np.nan}, "^target .*got nan"),
        ({"target": -0.1}, "^target .*got -0.1"),
        ({"quantizer": "best"}, "^quantizer .*got 'best'"),
        ({"quantizer": None}, "^quantizer .*got None"),
        ({"quantizer": "gptq"}, "^quantizer='gptq' .*got Uniform.*InputGram"),
        ({"factor_format": "nf4/16:float32"}, "^factor_format .*got 'nf4/16:float32'"),
    ],
    ids=str,
)
def test_other_arguments_out_of_range_are_refused(arguments, message):
    def fail(iteration, error):
        pytest.fail("work was done")

    with pytest.raises(InvalidArgumentError, match=message):
        decompose(matrix(), FMT, 4, callback=fail, **arguments)


def test_integers_of_numpy_are_integers(xp):
    options = {"max_iter": 3, "seed": 5, "init_rank": 2}
    numpy_options = {name: np.int64(value) for name, value in options.items()}
    w = xp.asarray(matrix())
    found, expected = decompose(w, FMT, np.int32(4), **numpy_options), decompose(w, FMT, 4, **options)
    assert found.errors == expected.errors
    assert type(found.rank) is int
    with pytest.raises(InvalidArgumentError, match=r"^rank .*True"):
        decompose(w, FMT, np.True_)


def test_a_format_as_text_is_refused():
    with pytest.raises(InvalidArgumentError, match="BlockFormat"):
        decompose(matrix(), "nf3/16:float32", 4)


def test_a_rank_above_the_limit_mentions_clip_rank():
    with pytest.raises(InvalidArgumentError, match=r"^rank .*got 33\. Pass clip_rank=True"):
        decompose(matrix(), FMT, 33)
    with pytest.raises(InvalidArgumentError, match=r"^rank .*got -1\.$"):
        decompose(matrix(), FMT, -1, clip_rank=True)


def test_other_types_than_arrays_are_refused():
    with pytest.raises(UnsupportedArrayError, match="got list"):
        decompose([[1.0]], FMT, 0)
