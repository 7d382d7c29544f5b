"""Options take every kind of object: the call works, or is refused in one sentence of ours."""

from __future__ import annotations

import inspect
from fractions import Fraction

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import LQLoRAError
from lqlora.solvers import Budget, SolveOptions
from lqlora.weighting import Elementwise, InputGram
from tests.arguments import FORMAT, GRAM, IMPORTANCE, Q, W
from tests.test_arguments import check_sentence

pytestmark = pytest.mark.filterwarnings("ignore")

TABLE = lq.cost_table({"a": W, "b": 2 * W}, [FORMAT, lq.BlockFormat.parse("nf2/16:float32")], rank=1)
OWN = {"fmt": FORMAT, "rank": 1}

#: Functions with valid arguments.
CALLS = {
    "quantize": (lq.quantize, {"w": W, "fmt": FORMAT}),
    "dequantize": (lq.dequantize, {"q": Q}),
    "gptq": (lq.gptq, {"w": W, "fmt": FORMAT, "gram": GRAM}),
    "decompose": (lq.decompose, {"w": W, **OWN, "max_iter": 1}),
    "allocate": (lq.allocate, {"table": TABLE, "bits_per_weight": 5.0}),
    "memory_budget": (lq.memory_budget, {"device_bytes": 1000}),
    "Limit": (lq.Limit, {"include": "a", "bits_per_weight": 3.0}),
    "BlockFormat": (lq.BlockFormat, {"codebook": lq.NF4, "block_size": 16}),
    "BlockFormat.parse": (lq.BlockFormat.parse, {"text": "nf4/16:float32"}),
    "Codebook": (lq.Codebook, {"levels": [-1.0, 1.0]}),
    "normal_float": (lq.normal_float, {"bits": 4}),
    "student_float": (lq.student_float, {"bits": 4}),
    "affine": (lq.affine, {"bits": 4}),
    "uniform": (lq.uniform, {"bits": 4}),
    "logarithmic": (lq.logarithmic, {"bits": 4}),
    "small_float": (lq.small_float, {"exponent_bits": 2, "mantissa_bits": 1}),
    "paper_grid": (lq.paper_grid, {}),
    "Elementwise": (Elementwise, {"weights": IMPORTANCE}),
    "InputGram": (InputGram, {"gram": GRAM}),
    "Budget": (Budget, {"upper": 3}),
    "SolveOptions": (SolveOptions, {}),
    "set_num_threads": (lq.backends.set_num_threads, {"count": None}),
}  # fmt: skip

#: Arrays have a table of their own, in tests/test_arguments.py.
ARRAYS = {"w", "gram", "out", "weights", "levels"}

#: Options that say how long to go on.
LENGTHS = {"max_iter", "rounds", "sweeps"}


class Object:
    """Nothing that any function knows."""


WRONG = {
    "text": "a",
    "bytes": b"a",
    "list": [1],
    "dict": {},
    "array": np.ones(2),
    "array of one": np.ones(1),
    "complex": 1j,
    "object": Object(),
    "none": None,
    "nan": float("nan"),
    "infinite": float("inf"),
    "half": 0.5,
    "fraction": Fraction(1, 3),
    "negative": -1,
    "true": True,
    "number of NumPy": np.int64(2),
}


def faults(function, valid):
    for name in inspect.signature(function).parameters.keys() - ARRAYS - {"options", "name"}:
        for kind, value in WRONG.items():
            if name in LENGTHS and kind == "infinite":
                continue
            try:
                function(**{**valid, name: value})
            except LQLoRAError as error:
                try:
                    check_sentence(str(error), "")
                except AssertionError:
                    yield f"{name} {kind}: says {error}"
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the fault that is looked for
                yield f"{name} {kind}: {type(error).__name__}: {str(error)[:200]}"


@pytest.fixture(autouse=True)
def _threads():
    yield
    lq.backends.set_num_threads(None)


@pytest.mark.parametrize("name", CALLS)
def test_every_option_works_or_is_refused_in_our_words(name):
    function, valid = CALLS[name]
    function(**valid)
    assert list(faults(function, valid)) == []
