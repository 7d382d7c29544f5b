"""Layout of blocks: short blocks, axes, strides, stacks, and arrays of few entries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, QuantizedArray, dequantize, quantize
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.quantized._layout import layout_of
from lqlora.testing.strategies import ALL_CODEBOOKS, LAYOUTS, lay_out, shapes, weights
from tests.quantized.cases import DOUBLE, KINDS, draw_case, normal, quantized, ramp, restored
from tests.strategies import host, on, stored

pytestmark = [
    pytest.mark.slow_on_strict,
    pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning"),
]

FITS = ("absmax", "scale", "levels+scale")


# --- blocks and tails


@given(data=st.data())
def test_the_tail_is_a_block_of_its_own(xp, data):
    fmt = BlockFormat(data.draw(st.sampled_from(ALL_CODEBOOKS)), data.draw(st.integers(1, 70)))
    w = data.draw(weights(shape=st.tuples(st.integers(1, 150)), largest=1e38)) + np.float32(0)
    start = (len(w) - 1) // fmt.block_size * fmt.block_size
    whole, tail = quantize(on(xp, w), fmt), quantize(on(xp, w[start:]), fmt)
    assert host(whole.codes)[start:].tolist() == host(tail.codes).tolist()
    assert host(whole.scales)[-1:].tolist() == host(tail.scales).tolist()


@pytest.mark.parametrize(
    "text", ["nf4/64:float32", DOUBLE, "nf8/64:float32", "nf4/64@0:float32", "nf2/16@-1:u8/9:float32"]
)
@pytest.mark.parametrize("fit", ["absmax", "scale"])
def test_a_block_far_longer_than_the_array(xp, text, fit):
    # A huge block size gives one scale for a tensor of any size. Padding to it would take four petabytes.
    w = on(xp, ramp(5, 5))
    fmt = BlockFormat.parse(text.replace("/64", f"/{10**15}").replace("/16", f"/{10**15}"))
    expected = BlockFormat(fmt.codebook, 25, fmt.scales, fmt.axis)
    assert host(quantize(w, fmt, fit=fit).codes).tolist() == host(quantize(w, expected, fit=fit).codes).tolist()


@given(lines=st.integers(0, 6), length=st.integers(0, 40), size=st.integers(1, 50), limit=st.sampled_from([8, 16, 64]))
def test_pieces_cover_every_weight_once_and_every_block_once(lines, length, size, limit):
    layout = layout_of(BlockFormat(NF4, size, axis=-1), (lines, length))
    numbers = np.arange(layout.count)
    for cut in (layout.whole_blocks(limit), layout.byte_pieces(limit), layout.line_pieces(limit)):
        pieces = list(cut)
        assert np.concatenate([numbers[weights] for weights, _ in pieces] or [numbers[:0]]).tolist() == numbers.tolist()
        known = [np.arange(blocks.start, blocks.stop) for _, blocks in pieces if blocks is not None]
        if len(known) == len(pieces):
            # If an array has one block, each of its pieces names that block.
            found = [0] if layout.blocks == 1 and known else np.concatenate(known or [numbers[:0]]).tolist()
            assert found == list(range(layout.blocks if layout.count else 0))
    for piece, _ in layout.byte_pieces(limit):
        assert piece.start % 8 == 0
        expected = [
            n // length * layout.blocks_per_line + n % length // layout.block_size for n in numbers[piece].tolist()
        ]
        assert layout.block_of(piece, numbers).tolist() == expected
    for piece, _ in layout.line_pieces(limit):
        assert piece.start % 8 == 0
        assert layout.lines_of(piece, numbers).tolist() == sorted({n // length for n in numbers[piece].tolist()})
    for piece, blocks in layout.whole_blocks(limit):
        rows = layout.as_blocks(1 + numbers[piece])
        assert rows.shape == (blocks.stop - blocks.start, layout.block_size)
        assert rows[rows > 0].tolist() == (1 + numbers[piece]).tolist()


# --- axes


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_blocks_along_an_axis_are_those_of_rows_when_the_axis_is_moved_last(fast_xp, axis, fit):
    w = normal(4, 13, 5)
    importance = np.random.default_rng(1).exponential(size=w.shape).astype(np.float32)
    for levels, book in (("codebook", NF4), ("codebook", ALL_CODEBOOKS[24])):
        if fit == "levels+scale" and book is not NF4:
            continue
        along, rows = (BlockFormat(book, 3, axis=own, levels=levels) for own in (axis, -1))
        options = {"fit": fit} if fit == "absmax" else {"fit": fit, "weights": importance}
        moved_options = {
            key: np.moveaxis(value, axis, -1) if key == "weights" else value for key, value in options.items()
        }
        q = quantized(fast_xp, w, along, **options)
        moved = quantized(fast_xp, np.moveaxis(w, axis, -1), rows, **moved_options)
        assert stored(q) == stored(moved)
        assert restored(q).tolist() == np.moveaxis(restored(moved), -1, axis).tolist()
        assert host(q.codes).tolist() == np.moveaxis(host(moved.codes), -1, axis).tolist()


def test_a_block_as_long_as_the_axis_is_one_scale_for_each_channel(xp):
    w = normal(6, 20)
    by_row = quantized(xp, w, BlockFormat(NF4, 20, axis=-1))
    by_column = quantized(xp, w, BlockFormat(NF4, 10**6, axis=0))
    assert host(by_row.scales).tolist() == np.abs(w).max(axis=1).tolist()
    assert host(by_column.scales).tolist() == np.abs(w).max(axis=0).tolist()


def test_blocks_start_anew_at_each_line(xp):
    w = normal(3, 10)
    q = quantized(xp, w, BlockFormat(NF4, 4, axis=-1))
    expected = [np.abs(row[start : start + 4]).max() for row in w for start in (0, 4, 8)]
    assert host(q.scales).tolist() == expected


@pytest.mark.parametrize(("axis", "shape"), [(-1, ()), (0, ()), (1, (5,)), (-3, (2, 2)), (2, (2, 2))])
def test_an_axis_that_the_array_does_not_have_is_refused(xp, axis, shape):
    with pytest.raises(InvalidArgumentError, match=f"axis {axis} .* does not exist"):
        quantize(on(xp, np.ones(shape, dtype=np.float32)), BlockFormat(NF4, axis=axis))


# --- memory layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 35), (3, 5, 14), (210,)])
@pytest.mark.parametrize("text", [DOUBLE, "nf3/4@0:float32", "affine4/8:float32"])
def test_the_result_depends_on_logical_order_only(xp, layout, shape, text):
    w, fmt = ramp(*shape), BlockFormat.parse(text)
    assert stored(quantize(lay_out(on(xp, w), layout), fmt)) == stored(quantize(on(xp, w), fmt))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_a_fit_depends_on_logical_order_only(fast_xp, layout, fit):
    w, fmt = normal(6, 35), BlockFormat.parse(DOUBLE)
    importance = np.random.default_rng(1).exponential(size=w.shape).astype(np.float32)
    found = quantize(lay_out(on(fast_xp, w), layout), fmt, fit=fit, weights=lay_out(on(fast_xp, importance), layout))
    assert stored(found) == stored(quantized(fast_xp, w, fmt, fit=fit, weights=importance))


def test_a_broadcast_view_is_an_array_like_any_other(xp):
    view = xp.broadcast_to(on(xp, ramp(5)), (3, 5))
    expected = quantize(np.tile(ramp(5), (3, 1)), BlockFormat(NF4, 4))
    assert stored(quantize(view, BlockFormat(NF4, 4))) == stored(expected)


def test_the_input_is_not_changed(fast_xp):
    w, importance = on(fast_xp, ramp(5, 7)), on(fast_xp, np.ones((5, 7), dtype=np.float32))
    for fit in FITS:
        quantize(w, BlockFormat.parse(DOUBLE), fit=fit, **({} if fit == "absmax" else {"weights": importance}))
    assert host(w).tobytes() == ramp(5, 7).tobytes()
    assert (host(importance) == 1).all()


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("shape", [(300, 1000), (1000, 300)])
def test_arrays_of_several_pieces_are_those_of_the_reference_order(text, shape):
    # 300 000 weights are more than one piece, and the pieces end within blocks and within lines.
    fmt = BlockFormat.parse(text)
    w = normal(*shape)
    q = quantize(w, fmt)
    again = quantize(np.asfortranarray(w), fmt)
    assert stored(q) == stored(again)
    out = np.zeros(shape[::-1], dtype=np.float32).T
    assert dequantize(q, out=out) is out
    assert out.tobytes() == dequantize(q).tobytes()
    if fmt.axis is not None and not isinstance(fmt.scales, str):
        return  # offsets and second-level blocks are shared by all lines
    if fmt.axis is not None and fmt.levels == "codebook" and fmt.rotation is None:
        part = [slice(None), slice(None)]
        part[1 - fmt.axis % 2] = slice(0, 7)
        assert quantize(w[tuple(part)], fmt).codes.tolist() == q.codes[tuple(part)].tolist()


# --- few entries or none


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
@pytest.mark.parametrize(
    "text",
    [
        "nf4/64:float32", "nf3/7:float32", DOUBLE, "nf8/2:u4+none/3:u3/3:float32", "affine4/8:float32",
        "bof4s-64/8:d8+none/4:float32", "nf4+fit/8:float32", "nf4/8@-1:float32", "nf4/8@0:d8/4:float32",
    ],
)  # fmt: skip
@pytest.mark.parametrize("fit", FITS)
def test_empty_arrays_stay_empty(fast_xp, shape, text, fit):
    fmt = BlockFormat.parse(text)
    if fit == "levels+scale" and fmt.codebook.normalization == "affine":
        return
    q = quantize(on(fast_xp, np.zeros(shape, dtype=np.float32)), fmt, fit=fit)
    assert tuple(dequantize(q).shape) == tuple(q.codes.shape) == shape
    assert 8 * q.nbytes == q.format.storage_bits(shape)
    assert stored(QuantizedArray.from_arrays(q.to_arrays(), q.format, shape)) == stored(q)


@pytest.mark.parametrize("fit", FITS)
def test_a_single_weight_comes_back(fast_xp, fit):
    q = quantize(on(fast_xp, np.array(-3.7, dtype=np.float32)), BlockFormat(NF4), fit=fit)
    assert host(dequantize(q)).tolist() == pytest.approx(np.float32(-3.7), rel=2e-7)
    assert tuple(q.codes.shape) == ()


@given(shape=shapes(max_dims=4, max_side=5), codebook=st.sampled_from(ALL_CODEBOOKS))
def test_codes_have_the_dense_shape_and_lie_in_the_codebook(xp, shape, codebook):
    codes = host(quantized(xp, normal(*shape), BlockFormat(codebook, 7)).codes)
    assert (codes.shape, codes.dtype) == (shape, np.uint8)
    assert codes.size == 0 or codes.max() < len(codebook)


# --- stacks


@pytest.mark.sampled(42)
@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_arrays_of_a_stack_are_those_quantized_alone(fast_xp, text, fit):
    fmt = BlockFormat.parse(text)
    if fit == "levels+scale" and (fmt.codebook.normalization in ("affine", "rms") or fmt.bits > 4):
        return
    w = normal(2, 1, 7, 9) * np.array([1.0, 1e-3], dtype=np.float32)[:, None, None, None]
    options = (
        {} if fit == "absmax" else {"weights": np.random.default_rng(1).exponential(size=w.shape).astype(np.float32)}
    )
    q = quantized(fast_xp, w, fmt, fit=fit, batch_dims=2, **options)
    assert (q.shape, q.batch_shape) == (w.shape, (2, 1))
    assert 8 * q.nbytes == 2 * q.format.storage_bits((7, 9))
    for index in np.ndindex(2, 1):
        alone = quantized(fast_xp, w[index], fmt, fit=fit, **{key: value[index] for key, value in options.items()})
        item = q[index[0]][index[1]]
        assert item.shape == (7, 9)
        assert stored(item) == stored(alone)
        assert restored(q)[index].tobytes() == restored(alone).tobytes()
        assert host(q.codes)[index].tolist() == host(alone.codes).tolist()
    assert [stored(part) for part in q.unstack()] == [stored(q[i][j]) for i, j in np.ndindex(2, 1)]


@given(data=st.data(), count=st.integers(1, 3))
@settings(max_examples=25)
def test_stacks_are_stored_and_read_back(fast_xp, data, count):
    w, fmt = draw_case(data, fast_xp, fitted=True)
    w = w.reshape(1) if w.ndim == 0 else w  # test_a_stack_of_scalars_is_restored
    stack = np.stack([w] * count)
    q = quantized(fast_xp, stack, fmt, batch_dims=1)
    again = QuantizedArray.from_arrays(q.to_arrays(), q.format, stack.shape, batch_dims=1)
    assert stored(again) == stored(q) == stored(q.to(np).to(fast_xp))
    alone = restored(quantized(fast_xp, w, fmt))
    assert restored(again).tobytes() == np.stack([alone] * count).tobytes()


def test_a_stack_of_scalars_is_restored():
    w = np.array([1.0, -2.0, 3.0], dtype=np.float32)
    q = quantize(w, BlockFormat(NF4), batch_dims=1)
    assert dequantize(q, out=np.zeros(3, dtype=np.float32)).tolist() == w.tolist()


def test_stacks_need_nothing_but_the_standard(strict):
    w = normal(2, 3, 4)
    expected = quantize(w, BlockFormat(NF4, 4), batch_dims=1, fit="scale", weights=w**2)
    q = quantized(strict, w, BlockFormat(NF4, 4), batch_dims=1, fit="scale", weights=w**2)
    assert stored(q) == stored(expected)
    assert restored(q).tobytes() == restored(expected).tobytes()


def test_weights_of_a_stack_are_broadcast_to_all_of_it(fast_xp):
    w, row = normal(2, 4, 9), np.random.default_rng(1).exponential(size=9).astype(np.float32)
    q = quantized(fast_xp, w, BlockFormat(NF4, 4), fit="scale", weights=row, batch_dims=1)
    for index in range(2):
        assert stored(q[index]) == stored(quantized(fast_xp, w[index], BlockFormat(NF4, 4), fit="scale", weights=row))


def test_items_of_a_stack_count_from_both_ends(fast_xp):
    q = quantized(fast_xp, normal(3, 4), BlockFormat(NF4, 4), batch_dims=1)
    assert stored(q[-1]) == stored(q[2])
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"index must be below 3.* {index}"):
            q[index]


def test_a_single_array_has_no_items(xp):
    q = quantized(xp, normal(3, 4), BlockFormat(NF4, 4))
    assert q.batch_shape == ()
    assert q.unstack() == [q]
    with pytest.raises(InvalidArgumentError, match="index 0 needs a stack"):
        q[0]


def test_stacking_undoes_unstacking(xp):
    q = quantize(on(xp, normal(2, 3, 24, 32)), BlockFormat.parse("nf3/16:u8/8:float32"), batch_dims=2)
    again = QuantizedArray.stack(q.unstack(), (2, 3))
    assert stored(again) == stored(q)
    assert again.shape == q.shape


def test_only_arrays_of_one_kind_make_a_stack():
    q = quantize(normal(2, 3, 24, 32), BlockFormat.parse("nf3/16:u8/8:float32"), batch_dims=1)
    other = quantize(normal(3, 24, 32), BlockFormat.parse("nf2/16:float32"))
    for parts, shape in ((q.unstack(), (3,)), ([q[0], other], (2,)), ([q], (1,)), ([], (0,))):
        with pytest.raises(InvalidArgumentError, match=r"parts of .* batch_shape"):
            QuantizedArray.stack(parts, shape)


def test_an_error_in_a_stack_names_the_array(fast_xp):
    w = normal(2, 3, 4)
    w[1, 2, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"experts\[1, 2\] has 1 .* index \(0,\)"):
        quantize(on(fast_xp, w), BlockFormat(NF4), batch_dims=2, name="experts")


@pytest.mark.parametrize("batch_dims", [-1, 3, 1.0, None])
def test_batch_dimensions_that_the_array_does_not_have_are_refused(xp, batch_dims):
    with pytest.raises(InvalidArgumentError, match=f"batch_dims must be .* 2.* got {batch_dims}"):
        quantize(on(xp, ramp(2, 3)), BlockFormat(NF4), batch_dims=batch_dims)


def test_a_stack_of_nothing_is_refused(xp):
    with pytest.raises(InvalidArgumentError, match=r"batch_dims=1 .* \(0, 3\)"):
        quantize(on(xp, np.zeros((0, 3), dtype=np.float32)), BlockFormat(NF4), batch_dims=1)


def test_a_negative_number_of_batch_dimensions_is_refused():
    arrays = quantize(ramp(2, 8), BlockFormat(NF4), batch_dims=1).to_arrays()
    with pytest.raises(InvalidArgumentError):
        QuantizedArray.from_arrays(arrays, BlockFormat(NF4), (2, 8), batch_dims=-1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((300, 200), (1, 0)),
        ((1300, 7), (1, 0)),
        ((3, 1300), (1, 0)),
        ((9, 40, 70), (0, 2, 1)),
        ((40, 9, 30), (2, 0, 1)),
    ],
)
@pytest.mark.parametrize("axis", [0, -1])
def test_arrays_of_many_strips_across_their_memory_are_the_arrays_they_show(fast_xp, shape, order, dtype, axis):
    # Far above what one strip holds, which arrays of a few entries never are.
    w = normal(*shape, dtype=dtype).transpose(order)
    fmt = BlockFormat(NF4, 16, axis=axis)
    across = fast_xp.permute_dims(on(fast_xp, w.transpose(np.argsort(order))), order)
    assert tuple(across.shape) == w.shape
    q = quantize(across, fmt)
    assert stored(q) == stored(quantize(on(np, np.ascontiguousarray(w)), fmt))
    expected = restored(q)
    target = fast_xp.permute_dims(on(fast_xp, np.zeros(shape, dtype=np.float32)), order)
    assert dequantize(q, out=target) is target
    assert host(target).tobytes() == expected.tobytes()
    assert abs(expected - w).max() < 0.3 * abs(w).max()
