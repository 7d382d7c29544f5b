"""Rotated formats: what is stored is the rotated array, and every function undoes the rotation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lqlora as lq
from lqlora.errors import FormatError, InvalidArgumentError, NonFiniteError
from lqlora.formats import Rotation
from lqlora.ops import rotate
from lqlora.quantized._scales import with_scale_format
from lqlora.testing.strategies import formats
from lqlora.weighting import Elementwise, InputGram, Kronecker, RowColumn
from tests.quantized.cases import normal
from tests.strategies import host, on, scale_dtypes, stored

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
SIDES = ("~in", "~out", "~both7")


def parsed(text):
    return lq.BlockFormat.parse(text)


def turned(w, fmt, *, inverse=False):
    """Rotate the axes that a format rotates, the outputs with signs of their own."""
    if fmt.rotation.side != "out":
        w = rotate(w, fmt.rotation.seed, inverse=inverse)
    if fmt.rotation.side != "in":
        w = rotate(w, fmt.rotation.seed + 2**32, axis=-2, inverse=inverse)
    return w


def plain(q):
    return dataclasses.replace(q, format=dataclasses.replace(q.format, rotation=None))


def correlated(rows, columns, seed=0):
    """Return a second moment with a few strong directions."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) + 3 * rng.standard_normal((rows, 2)) @ rng.standard_normal((2, columns))
    return x.T @ x / rows


@pytest.mark.slow_on_strict
@quiet
@given(data=st.data())
def test_the_rotated_array_is_quantized(xp, data):
    fmt = data.draw(formats(scale_dtypes(xp), axes=(None, 0, -1), fitted=True, rotated=True))
    if fmt.rotation is None:
        fmt = dataclasses.replace(fmt, rotation=Rotation())
    w = normal(*data.draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=9)))
    fit = data.draw(st.sampled_from(["absmax", "scale"]))
    q = lq.quantize(on(xp, w), fmt, fit=fit)
    expected = lq.quantize(turned(w, fmt), fmt.unrotated, fit=fit)
    assert (q.format, q.shape) == (fmt, w.shape)
    assert stored(q) == stored(expected)
    dense = turned(lq.dequantize(expected), fmt, inverse=True)
    assert host(lq.dequantize(q)).tobytes() == dense.tobytes()


@pytest.mark.parametrize("side", SIDES)
def test_products_are_those_of_the_dense_array(xp, side):
    q = lq.quantize(on(xp, normal(24, 36)), parsed(f"nf4/12{side}:float32"))
    x, lora_A, lora_B = (normal(*shape, seed=1) for shape in ((2, 5, 36), (3, 36), (24, 3)))
    dense = host(lq.dequantize(q))
    np.testing.assert_allclose(host(lq.matmul(on(xp, x), q)), x @ dense.T, atol=2e-5)
    found = lq.matmul(on(xp, x), q, on(xp, lora_A), on(xp, lora_B), 0.5)
    np.testing.assert_allclose(host(found), x @ (dense + 0.5 * lora_B @ lora_A).T, atol=3e-5)


@pytest.mark.parametrize("side", SIDES)
def test_members_of_a_stack_are_rotated_one_by_one(xp, side):
    w, fmt = normal(3, 8, 12), parsed(f"nf3/4@0{side}:u8/4:float32")
    q = lq.quantize(on(xp, w), fmt, batch_dims=1)
    alone = [lq.quantize(on(xp, own), fmt) for own in w]
    assert [stored(own) for own in q.unstack()] == [stored(own) for own in alone]
    assert host(lq.dequantize(q)).tobytes() == np.stack([host(lq.dequantize(own)) for own in alone]).tobytes()
    x = on(xp, normal(3, 2, 12))
    np.testing.assert_allclose(host(lq.matmul(x, q)), host(x) @ host(lq.dequantize(q)).transpose(0, 2, 1), atol=1e-5)


def test_out_takes_other_dtypes_and_strides():
    q = lq.quantize(normal(8, 12), parsed("nf4/4~both:float32"))
    whole, wide = lq.dequantize(q), np.zeros((12, 8), dtype=np.float16)
    lq.dequantize(q, out=wide.T)
    np.testing.assert_array_equal(wide.T, whole.astype(np.float16))
    np.testing.assert_array_equal(lq.dequantize(q, dtype="float64"), whole)


def test_importance_is_that_of_the_rotated_entries():
    rng = np.random.default_rng(0)
    w, weights, fmt = normal(16, 24), rng.random((16, 24)) ** 8, parsed("nf2/8~both:float32")
    q = lq.quantize(w, fmt, weights=weights, fit="scale")
    form = lq.ops.rotated_importance(lq.ops.rotated_importance(weights), axis=0)
    assert stored(q) == stored(lq.quantize(turned(w, fmt), fmt.unrotated, weights=form, fit="scale"))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", ["nf2/8{}:float32", "tcq2-6/16@0{}:u8/4:float32"])
def test_error_feedback_works_on_the_rotated_inputs(side, text):
    fmt, w, gram = parsed(text.format(side)), normal(16, 24), correlated(200, 24)
    q = lq.gptq(w, fmt, gram)
    moment = rotate(rotate(gram, fmt.rotation.seed), fmt.rotation.seed, axis=0) if side != "~out" else gram
    expected = lq.gptq(turned(w, fmt), fmt.unrotated, moment)

    def error(q):
        e = w - lq.dequantize(q)
        return np.trace(e @ gram @ e.T)

    assert error(q) == pytest.approx(error(dataclasses.replace(expected, format=fmt)), rel=1e-3)
    assert error(q) < error(lq.quantize(w, fmt))
    assert error(lq.gptq(w, fmt, gram, start=q)) <= error(q) * 1.2
    for start in (lq.quantize(w, fmt.unrotated, fit="scale"), "x"):
        with pytest.raises(InvalidArgumentError, match="start must"):
            lq.gptq(w, fmt, gram, start=start)


WEIGHTINGS = {
    "uniform": lambda: None,
    "columns": lambda: RowColumn(None, np.linspace(1, 9, 24)),
    "elementwise": lambda: Elementwise(np.random.default_rng(1).random((16, 24))),
    "gram": lambda: InputGram(correlated(200, 24)),
    "kronecker": lambda: Kronecker(correlated(100, 16, 1), correlated(200, 24)),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", WEIGHTINGS)
@pytest.mark.parametrize("fit", ["absmax", "scale"])
def test_decompositions_take_rotated_formats_under_every_weighting(xp, kind, side, fit):
    fmt, w = parsed(f"nf2/8{side}:float32"), normal(16, 24)
    weighting = WEIGHTINGS[kind]()
    if weighting is not None:
        fields = [field for field in dataclasses.fields(weighting) if field.init]
        own = {field.name: getattr(weighting, field.name) for field in fields}
        arrays = {name: on(xp, value) for name, value in own.items() if isinstance(value, np.ndarray)}
        weighting = type(weighting)(**(own | arrays))
    d = lq.decompose(on(xp, w), fmt, 3, weighting=weighting, fit=fit)
    assert d.quantized.format == fmt
    assert d.relative_error < d.errors[0]
    dense = host(lq.dequantize(d.quantized)) + host(d.lora_B) @ host(d.lora_A)
    np.testing.assert_allclose(host(d.reconstruct()), dense, atol=1e-5)


def relative_error(w, text):
    return np.linalg.norm(w - lq.dequantize(lq.quantize(w, parsed(text)))) / np.linalg.norm(w)


def test_rotated_weights_are_as_easy_as_normal_ones():
    easy, hard = normal(64, 96), normal(64, 96) ** 5  # few entries carry most of the norm
    expected = relative_error(easy, "nf3/96:float32")
    assert relative_error(hard, "nf3/96~both:float32") == pytest.approx(expected, rel=0.1)


def test_the_importance_of_a_gram_is_its_rotated_diagonal():
    gram, seeds = correlated(200, 24), {-1: 3}
    expected = np.diagonal(rotate(rotate(gram, 3), 3, axis=0)) + 0.01 * np.diagonal(gram).mean()
    found = InputGram(gram).rotated_element_weights(seeds)[0]
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-5)
    pair = Kronecker(correlated(50, 16, 2), gram)
    np.testing.assert_allclose(pair.rotated_element_weights({}), pair.element_weights())
    both = pair.rotated_element_weights({-1: 3, -2: 4})
    np.testing.assert_allclose(both[0] / both[0].sum(), expected / expected.sum(), rtol=1e-5)


def test_rows_of_rotated_inputs_are_views_and_coupled_rows_are_refused():
    w = normal(8, 16)
    q = lq.quantize(w, parsed("nf4/8~in:float32"))
    np.testing.assert_array_equal(lq.dequantize(q.rows(2, 5)), lq.dequantize(q)[2:5])
    with pytest.raises(InvalidArgumentError, match="coupled by a rotation"):
        lq.quantize(w, parsed("nf4/8~out:float32")).rows(0, 4)
    with pytest.raises(InvalidArgumentError, match="coupled by a rotation"):
        lq.quantize(w[0], parsed("nf4/8~in:float32")).rows(0, 8)


def test_fast_costs_of_rotated_formats_are_close_to_the_exact_ones():
    formats = [parsed(f"nf3/96~both:{scales}") for scales in ("float32", "u8/16:float32")] + [parsed("nf3/96:float32")]
    w, gram = normal(64, 96) ** 3, InputGram(correlated(200, 96))
    exact, fast = (
        lq.cost_table({"a": w}, formats, rank=4, mode=mode, progress=False, weighting={"a": gram})
        for mode in ("exact", "fast")
    )
    assert fast.formats == exact.formats
    np.testing.assert_allclose(fast.costs, exact.costs, rtol=0.15)


class TestRefusals:
    @pytest.mark.parametrize("side", ["", "IN", 3, None, "x"])
    def test_sides(self, side):
        with pytest.raises(FormatError, match="side of a Rotation must be"):
            Rotation(side)

    @pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "1", None, True])
    def test_seeds(self, seed):
        with pytest.raises(FormatError, match="seed of a Rotation must be"):
            Rotation("in", seed)

    @pytest.mark.parametrize(
        "text", ["nf4/64~", "nf4/64~x:float32", "nf4/64~in-1", "nf4~in/64", "nf4/64~in99999999999"]
    )
    def test_spellings(self, text):
        with pytest.raises(FormatError):
            parsed(text)

    def test_other_rotations(self):
        with pytest.raises(FormatError, match="rotation must be a Rotation"):
            lq.BlockFormat(lq.NF4, rotation="in")

    def test_missing_axes(self):
        for w, side in ((np.float32(1), "~in"), (np.ones(4), "~out"), (np.ones(4), "~both")):
            with pytest.raises(InvalidArgumentError, match="no axis for the rotation"):
                lq.quantize(np.asarray(w), parsed(f"nf4/64{side}:float32"))

    def test_what_is_not_finite_is_found_where_it_is(self, xp):
        w = normal(6, 8)
        w[2, 3] = np.nan
        for run in (
            lambda: lq.quantize(on(xp, w), parsed("nf4/8~both:float32"), name="q_proj"),
            lambda: lq.gptq(on(xp, w), parsed("nf4/8~both:float32"), on(xp, np.eye(8)), name="q_proj"),
        ):
            with pytest.raises(NonFiniteError, match=r"q_proj.*2, 3"):
                run()

    def test_sums_beyond_the_range(self):
        w, fmt = np.full((4, 8), 3e38, dtype=np.float32), parsed("nf4/8~in:float32")
        for run in (lambda: lq.quantize(w, fmt), lambda: lq.gptq(w, fmt, np.eye(8))):
            with pytest.raises(NonFiniteError, match="small enough to be rotated"):
                run()


def test_seeds_of_a_format_cannot_be_changed():
    with pytest.raises(TypeError):
        parsed("nf4/8~in:float32").rotation.seeds[-1] = 3


@pytest.mark.parametrize("shape", [(8, 12), (0, 12)])
def test_the_check_may_be_left_out(xp, shape):
    w, fmt = on(xp, normal(*shape)), parsed("nf4/4~both:float32")
    assert stored(lq.quantize(w, fmt, check_finite=False)) == stored(lq.quantize(w, fmt))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_scales_may_move_to_another_storage(xp, batch):
    q = lq.quantize(on(xp, normal(*batch, 8, 12)), parsed("nf4/4~in:float32"), batch_dims=len(batch))
    moved = with_scale_format(q, lq.ScaleFormat(8, 16), "w")
    assert moved.format == parsed("nf4/4~in:u8/16:float32")
    assert (host(moved.codes) == host(q.codes)).all()
    np.testing.assert_allclose(host(lq.dequantize(moved)), host(lq.dequantize(q)), atol=0.05)
