"""Trellis formats: what differs from formats that round each weight by itself."""

from __future__ import annotations

import numpy as np
import pytest

import lqlora as lq
from lqlora import BlockFormat, dequantize, gptq, quantize
from lqlora.errors import FormatError, InvalidArgumentError, NonFiniteError, ScaleUnderflowWarning
from lqlora.quantized._rows import decode_rows
from lqlora.quantized.rounding_sample import RoundingSample
from tests.quantized.cases import normal, restored
from tests.strategies import host, on

FORMATS = (
    "tcq2/64:u8/256:float32",
    "tcq1-6/16@-1:float32",
    "tcq3-8/7:float32",
    "tcq2-5/24@0:float32",
    "tcq2-4/300:float32",
)


@pytest.mark.parametrize(("text", "bound"), [
    ("tcq1/256:float32", 0.290), ("tcq2/256:float32", 0.0745), ("tcq3/256:float32", 0.0198), ("tcq4/256:float32", 0.0054),
])  # fmt: skip
def test_errors_on_normal_weights_are_those_of_the_docstring(text, bound):
    w = normal(32, 256)
    assert np.mean((dequantize(quantize(w, BlockFormat.parse(text), fit="scale")) - w) ** 2) < bound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "bound"),
    [("tcq2-12", 0.0745), ("tcq3-12", 0.0198), ("tcq4-12", 0.0054), ("tcq2-8", 0.0765), ("tcq3-8", 0.0210)],
)
def test_more_states_leave_less_error(text, bound):
    w = normal(512, 256)
    assert np.mean((dequantize(quantize(w, BlockFormat.parse(f"{text}/256"), fit="scale")) - w) ** 2) < bound


def test_scales_are_root_mean_squares(xp):
    w = normal(6, 10) * np.geomspace(1e-20, 1e15, 60).reshape(6, 10).astype(np.float32)
    q = quantize(on(xp, w), BlockFormat.parse("tcq2-4/8@-1:float32"))
    rows = np.split(w.astype(np.float64), [8], axis=1)
    expected = np.stack([np.sqrt((own**2).mean(axis=1)) for own in rows], axis=1)
    np.testing.assert_allclose(host(q.scales), expected.reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("text", FORMATS)
def test_fitted_scales_leave_less_error_in_every_block(text):
    w, fmt = normal(40, 50), BlockFormat.parse(text)
    for importance in (None, np.random.default_rng(1).exponential(size=w.shape).astype(np.float32) ** 2):
        plain, fitted = quantize(w, fmt), quantize(w, fmt, fit="scale", weights=importance)
        weights = 1 if importance is None else importance
        errors = [(weights * (restored(q) - w) ** 2).sum() for q in (plain, fitted)]
        assert errors[1] < 0.999 * errors[0]


def test_importance_has_no_unit():
    w, importance = normal(16, 32), np.random.default_rng(1).random((16, 32))
    fmt = BlockFormat.parse("tcq2-6/32:float32")
    bytes_of = [quantize(w, fmt, fit="scale", weights=importance * unit).packed.tobytes() for unit in (1.0, 2.0**40)]
    assert bytes_of[0] == bytes_of[1]
    nothing = quantize(w, fmt, fit="scale", weights=np.zeros_like(w))
    assert np.mean((restored(nothing) - w) ** 2) < 0.2


@pytest.mark.parametrize("text", [text for text in FORMATS if "@0" not in text])
def test_single_rows_are_those_of_the_whole(xp, text):
    q = quantize(on(xp, normal(20, 33)), BlockFormat.parse(text))
    index = np.array([3, 19, 0, 3, 7])
    assert host(decode_rows(q, on(xp, index))).tolist() == restored(q)[index].tolist()


@pytest.mark.parametrize("text", FORMATS)
def test_products_are_those_of_the_dense_matrix(xp, text):
    q, x = quantize(on(xp, normal(20, 33)), BlockFormat.parse(text)), normal(2, 3, 33)
    found = lq.matmul(on(xp, x), q)
    np.testing.assert_allclose(host(found), x @ restored(q).T, rtol=1e-4, atol=1e-4)


def test_rows_are_cut_at_blocks():
    q = quantize(normal(8, 64), BlockFormat.parse("tcq2-6/64:float32"))
    assert restored(q.rows(2, 5)).tolist() == restored(q)[2:5].tolist()
    crossing = quantize(normal(8, 48), BlockFormat.parse("tcq2-6/64:float32"))
    with pytest.raises(InvalidArgumentError, match="whole blocks"):
        crossing.rows(1, 2)


def test_error_feedback_follows_columns(fast_xp):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 48)).astype(np.float32)
    x = rng.standard_normal((400, 48)) + rng.standard_normal((400, 4)) @ rng.standard_normal((4, 48))
    gram = (x.T @ x).astype(np.float32)
    fmt = BlockFormat.parse("tcq2-6/16@0:float32")
    pair = quantize(on(fast_xp, w), fmt, fit="scale"), gptq(on(fast_xp, w), fmt, on(fast_xp, gram))
    nearest, ours = (np.linalg.norm(x @ (w - restored(q)).T) for q in pair)
    assert ours < 0.8 * nearest
    with pytest.raises(InvalidArgumentError, match="16@0"):
        gptq(w, BlockFormat.parse("tcq2-6/16:float32"), gram)


def test_inputs_that_have_nothing_to_do_with_each_other_give_nearest_rounding(fast_xp):
    w, fmt = normal(12, 20), BlockFormat.parse("tcq2-6/5@0:u8/8:float32")
    q = gptq(on(fast_xp, w), fmt, on(fast_xp, 3 * np.eye(20)), fit="scale")
    assert restored(q).tolist() == restored(quantize(w, fmt, fit="scale")).tolist()


@pytest.mark.parametrize("text", ["tcq2-6/16:float32", "tcq2-4/300:float32"])
def test_a_sample_estimates_the_error(text):
    w, fmt = normal(30, 80), BlockFormat.parse(text)
    estimate = RoundingSample(w, fmt).rounded(fmt).squared_error
    assert estimate == pytest.approx(np.sum((restored(quantize(w, fmt)) - w) ** 2), rel=1e-4)


def test_stacks_and_float64_and_strides():
    fmt, w = BlockFormat.parse("tcq2-6/16:float32"), normal(3, 8, 16)
    stack = quantize(w, fmt, batch_dims=1)
    assert [part.packed.tobytes() for part in stack.unstack()] == [quantize(own, fmt).packed.tobytes() for own in w]
    assert quantize(w[0].astype(np.float64), fmt).packed.tobytes() == stack[0].packed.tobytes()
    assert quantize(np.asfortranarray(w[0]), fmt).packed.tobytes() == stack[0].packed.tobytes()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (1,), (1, 1), ()])
def test_small_arrays(xp, shape):
    fmt = BlockFormat.parse("tcq2-6/16:float32")
    w = np.ones(shape, dtype=np.float32)
    q = quantize(on(xp, w), fmt, fit="scale")
    assert restored(q).shape == shape
    assert 8 * q.nbytes == fmt.storage_bits(shape)
    np.testing.assert_allclose(restored(q), w, atol=0.5)


def test_what_cannot_be_stored_is_refused():
    fmt = BlockFormat.parse("tcq2-6/16:float16")
    for bad in (np.nan, np.inf):
        with pytest.raises(NonFiniteError):
            quantize(np.array([1.0, bad], dtype=np.float32), fmt)
    with pytest.raises(NonFiniteError, match="float16"):
        quantize(np.full(16, 1e6, dtype=np.float32), fmt)
    with pytest.warns(ScaleUnderflowWarning):
        assert not restored(quantize(np.full(16, 1e-9, dtype=np.float32), fmt)).any()
    with pytest.raises(FormatError, match="those of states"):
        quantize(normal(4, 4), fmt, fit="levels+scale")
