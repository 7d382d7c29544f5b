"""One-line reprs, and the refusal of a quantized array to be a dense one."""

from __future__ import annotations

import numpy as np
import pytest

import lqlora as lq
from lqlora import BlockFormat
from lqlora.errors import UnsupportedArrayError


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda q, _: q, "QuantizedArray(shape=(8, 32), format='nf4/16:u8/256:float32')"),
        (
            lambda _, d: lq.StoredMatrix(d.quantized, d.lora_A, d.lora_B),
            "StoredMatrix(shape=(8, 32), format='nf4/16:u8/256:float32', rank=2)",
        ),
        (lambda q, _: q.codebook, "Codebook(name='nf4', levels=16 from -1 to 1, normalization='absmax')"),
        (lambda *_: lq.Codebook([-1, 0.5]), "Codebook(name='custom', levels=[-1.0, 0.5], normalization='absmax')"),
    ],
    ids=["array", "matrix", "codebook", "levels"],
)
def test_objects_print_as_one_line(made, expected):
    w, fmt = np.eye(8, 32, dtype=np.float32), BlockFormat.parse("nf4/16:u8/256:float32")
    d = lq.decompose(w, fmt, rank=2, max_iter=1)
    assert repr(made(lq.quantize(w, fmt), d)) == expected
    assert repr(d).startswith("Decomposition(shape=(8, 32), format='nf4/16:u8/256:float32', rank=2, relative_error=")
    assert "\n" not in repr(d)


@pytest.mark.parametrize(
    "used",
    [np.asarray, lambda q: np.ones((2, 8), dtype=np.float32) @ q, lambda q: np.add(q, 1)],
    ids=["array", "product", "sum"],
)
def test_a_quantized_array_is_no_dense_array(used):
    q = lq.quantize(np.eye(8, dtype=np.float32), BlockFormat.parse("nf4/8"))
    with pytest.raises(UnsupportedArrayError, match="dequantize"):
        used(q)
