"""Error feedback: the codes of the paper, and never worse than nearest rounding, in every format and library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import BlockFormat, dequantize, gptq, quantize
from lqlora.errors import (
    InvalidArgumentError,
    MixedArraysError,
    NonFiniteError,
    ScaleUnderflowWarning,
    UnsupportedArrayError,
)
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.oracles import gptq as oracle
from tests.oracles.quantize import dense_of, places, set_of, unpack
from tests.quantized.cases import UNROTATED, draw_case, normal, ramp, restored, scales_of
from tests.strategies import host, on, stored

pytestmark = pytest.mark.slow_on_strict

FITS = ("absmax", "scale", "levels+scale")
#: Trellis formats take feedback along columns only: tests/quantized/test_trellis.py.
SCALAR = [text for text in UNROTATED if not text.startswith("tcq")]
CASES = [(text, fit) for text in SCALAR for fit in FITS if not (text.startswith("affine") and fit == FITS[2])]
SMALL = [book for book in ALL_CODEBOOKS if book.bits <= 4]
FMT = BlockFormat.parse("nf2/8:float32")


def moment(columns: int, rank: int | None = None, seed: int = 0) -> np.ndarray:
    """Return the second moment of inputs that are correlated and differ in size."""
    rng = np.random.default_rng(seed)
    rank = 2 * columns if rank is None else rank
    inputs = rng.standard_normal((rank, columns)) @ (rng.standard_normal((columns, columns)) + 3 * np.eye(columns))
    inputs = inputs * rng.choice([0.3, 1.0, 3.0], size=columns)
    return inputs.T @ inputs


def output_error(w, q, gram):
    errors = host(w).astype(np.float64) - restored(q)
    return float(np.sum((errors @ gram) * errors))


def nearest_of(w, fmt, gram, fit="scale", damping=0.01):
    """Return the result of nearest rounding, from which the search starts."""
    if fit == "absmax" or not gram.any():
        return quantize(w, fmt, fit=fit)
    damped = np.diag(gram) + damping * np.mean(np.diag(gram))
    return quantize(w, fmt, fit=fit, weights=(damped / damped.max()).astype(np.float32)[None, :])


# --- the algorithm of the paper


def by_weight(values, fmt, shape):
    flat = [values[index] for index, place in enumerate(places(np.zeros(shape), fmt)) for _ in place.block]
    return dense_of(flat, shape, fmt.axis, np.float64)


def oracle_codes(w, gram, start, order):
    fmt, blocks = start.format, places(np.zeros(w.shape), start.format)
    zeros = np.zeros(len(blocks))
    if start.zero_points is not None:
        zeros = np.array(unpack(host(start.zero_points).tobytes(), fmt.codebook.zero_point_bits, len(blocks)))
    levels = [fmt.codebook.levels] if start.levels is None else list(host(start.levels))
    sets = by_weight([set_of(place.line, fmt) for place in blocks], fmt, w.shape).astype(int)
    return oracle.codes(
        w,
        gram,
        by_weight(scales_of(start), fmt, w.shape),
        by_weight(zeros, fmt, w.shape),
        [[levels[index] for index in row] for row in sets],
        damping=0.01,
        order=order,
    )


@pytest.mark.sampled(42)
@pytest.mark.parametrize(("text", "fit"), CASES)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_a_single_round_gives_the_codes_of_the_paper(text, fit, order):
    w, gram = normal(8, 40, dtype=np.float64), moment(40)
    start = nearest_of(w, BlockFormat.parse(text), gram, fit)
    places_of = list(range(40)) if order == "natural" else np.argsort(-np.diag(gram)).tolist()
    expected = oracle_codes(w, gram, start, places_of)
    q = gptq(w, BlockFormat.parse(text), gram, fit=fit, order=order, rounds=1, sweeps=0)
    assert np.array_equal(q.codes, expected)
    assert not np.array_equal(expected, start.codes)


@pytest.mark.parametrize(
    "text", ["nf2+fit12/8@-1:float32", "nf2+fit16/8@0:float32", "bof2s-64+fit20/8@-1:i4/5:float32"]
)
def test_lines_are_rounded_to_levels_of_their_own(fast_xp, text):
    w, gram, fmt = normal(24, 40, dtype=np.float64), moment(40), BlockFormat.parse(text)
    w *= np.geomspace(0.1, 10, 24)[:, None] ** 2
    w[:, 20:] **= 3
    start = nearest_of(w, fmt, gram, "levels+scale")
    q = gptq(on(fast_xp, w), fmt, on(fast_xp, gram), fit="levels+scale", order="natural", rounds=1, sweeps=0)
    expected = oracle_codes(w, gram, start, list(range(40)))
    assert len(host(start.levels)) > 1
    assert not np.array_equal(expected, start.codes)
    assert np.array_equal(host(q.codes), expected)


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_errors_reach_columns_of_every_distance(fast_xp, columns):
    w, gram = normal(3, columns, dtype=np.float64), moment(columns)
    fmt = BlockFormat.parse("nf3/16:float32")
    expected = oracle_codes(w, gram, nearest_of(w, fmt, gram), list(range(columns)))
    q = gptq(on(fast_xp, w), fmt, on(fast_xp, gram), order="natural", rounds=1, sweeps=0)
    assert np.array_equal(host(q.codes), expected)


def test_columns_of_large_inputs_come_first(fast_xp):
    w, gram, fmt = normal(3, 20, dtype=np.float64), moment(20), BlockFormat.parse("nf3/3@0:float32")
    order = np.argsort(-np.diag(gram))
    q = gptq(on(fast_xp, w), fmt, on(fast_xp, gram), rounds=1, sweeps=0)
    moved = gptq(w[:, order], fmt, gram[np.ix_(order, order)], rounds=1, sweeps=0, order="natural")
    assert np.array_equal(host(q.codes)[:, order], moved.codes)


# --- never worse


@given(data=st.data())
@settings(max_examples=12)
@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
def test_it_is_never_worse_than_nearest_rounding(xp, data):
    w, fmt = draw_case(data, xp, codebooks=SMALL, fitted=True)
    w = np.where(np.abs(w) < 1e-15, w.dtype.type(0), w) if w.ndim == 2 else normal(5, 7)
    gram = moment(w.shape[1], data.draw(st.integers(1, 20)), data.draw(st.integers(0, 9)))
    fit = data.draw(st.sampled_from(FITS if fmt.codebook.normalization != "affine" else FITS[:2]))
    options = {"order": data.draw(st.sampled_from(["natural", "activation"])), "rounds": data.draw(st.integers(1, 2))}
    q = gptq(on(xp, w), fmt, on(xp, gram), fit=fit, **options)
    assert q.format.codebook == fmt.codebook
    assert q.shape == w.shape
    nearest = nearest_of(w, fmt, gram, fit)
    assert output_error(w, q, gram) <= output_error(w, nearest, gram) * (1 + 1e-9)


@pytest.mark.sampled(22)
@pytest.mark.parametrize(("text", "fit"), [case for case in CASES if case != ("uint1/53:float32", "absmax")])
def test_correlated_inputs_gain_in_every_format(fast_xp, text, fit):
    w, gram, fmt = normal(16, 40), moment(40), BlockFormat.parse(text)
    q, nearest = gptq(on(fast_xp, w), fmt, on(fast_xp, gram), fit=fit), nearest_of(w, fmt, gram, fit)
    assert output_error(w, q, gram) < 0.8 * output_error(w, nearest, gram)
    arrays, others = q.to_arrays(), nearest.to_arrays()
    assert {key: value.shape for key, value in arrays.items()} == {key: value.shape for key, value in others.items()}


@pytest.mark.parametrize("text", ["nf2/16:float32", "nf3/8@-1:u8/16:float32", "affine2/8@0:float32"])
def test_rounds_and_sweeps_lower_the_error(text):
    w, gram, fmt = normal(64, 96), moment(96), BlockFormat.parse(text)
    errors = [output_error(w, gptq(w, fmt, gram, rounds=r, sweeps=s), gram) for r, s in ((1, 0), (3, 0), (3, 2))]
    assert errors[2] < errors[1] <= errors[0] < output_error(w, nearest_of(w, fmt, gram), gram)


def test_scales_that_suit_the_targets_gain_most_at_two_bits():
    w, gram, fmt = normal(64, 96), moment(96), BlockFormat.parse("nf2/16:float32")
    one, three = (gptq(w, fmt, gram, rounds=rounds, sweeps=0) for rounds in (1, 3))
    assert output_error(w, three, gram) < 0.98 * output_error(w, one, gram)


def test_a_sweep_moves_no_code_that_is_best_given_the_others():
    w, gram, fmt = normal(6, 12, dtype=np.float64), moment(12), BlockFormat.parse("nf2/4:float32")
    q = gptq(w, fmt, gram, damping=0, sweeps=50)
    codes, scales = q.codes, np.repeat(scales_of(q), 4).reshape(6, 12)
    least = output_error(w, q, gram)
    for row, column in np.ndindex(6, 12):
        for code in range(4):
            values = fmt.codebook.levels[codes].astype(np.float64) * scales
            values[row, column] = fmt.codebook.levels[code] * scales[row, column]
            errors = w - values
            assert np.sum((errors @ gram) * errors) >= least * (1 - 1e-6)


# --- invariance of the result


@pytest.mark.sampled(22)
@pytest.mark.parametrize(("text", "fit"), CASES)
def test_inputs_that_have_nothing_to_do_with_each_other_give_nearest_rounding(fast_xp, text, fit):
    w, fmt = normal(12, 20), BlockFormat.parse(text)
    q = gptq(on(fast_xp, w), fmt, on(fast_xp, 3 * np.eye(20)), fit=fit)
    assert stored(q) == stored(quantize(w, fmt, fit=fit))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("exponent", [-100, -1, 1, 100])
@pytest.mark.parametrize(
    "text", ["nf3/8:float32", "nf2/7:u8/5:float32", "affine4/8@-1:float32", "nf2+fit2/8@-1:float32"]
)
def test_the_unit_of_the_inputs_is_of_no_consequence(fast_xp, text, exponent):
    w, gram, fmt = normal(12, 20), moment(20), BlockFormat.parse(text)
    q, other = (gptq(on(fast_xp, w), fmt, on(fast_xp, own)) for own in (gram, gram * 2.0**exponent))
    assert stored(q) == stored(other)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("exponent", [-20, -1, 1, 20])
@pytest.mark.parametrize(
    "text", ["nf3/8:float32", "nf2/7:u8/5:float32", "affine4/8@-1:float32", "nf2+fit2/8@-1:float32"]
)
def test_the_unit_of_the_weights_only_scales_the_scales(fast_xp, text, exponent):
    w, gram, fmt = normal(12, 20), moment(20), BlockFormat.parse(text)
    factor = np.float32(2.0**exponent)
    q, other = (gptq(on(fast_xp, own), fmt, on(fast_xp, gram), fit="scale") for own in (w, w * factor))
    assert host(q.packed).tobytes() == host(other.packed).tobytes()
    assert np.array_equal(scales_of(q) * factor, scales_of(other))


def test_the_extremes_of_float64_are_units_too():
    w, gram = normal(4, 8), moment(8)
    gram = gram / np.abs(gram).max()
    expected = stored(gptq(w, FMT, gram))
    assert stored(gptq(w, FMT, gram * 2.0**1023)) == expected
    whole = np.round(gram * 2.0**20)  # 21 bits, of which none is lost in subnormal numbers
    assert stored(gptq(w, FMT, whole * 2.0**-1074)) == stored(gptq(w, FMT, whole))
    # Entries of this gram are subnormal, so they have fewer than 53 bits.
    assert output_error(w, gptq(w, FMT, gram * 2.0**-1040), gram) < output_error(w, nearest_of(w, FMT, gram), gram)


@pytest.mark.parametrize("text", ["nf2/8@-1:float32", "nf3/40@-1:float32", "nf4/4@-1:float32", "affine3/8@-1:float32"])
def test_rows_are_rounded_for_themselves(text):
    w, gram, fmt = normal(24, 40, dtype=np.float64), moment(40), BlockFormat.parse(text)
    order = np.random.default_rng(1).permutation(24)
    assert np.array_equal(restored(gptq(w, fmt, gram))[order], restored(gptq(w[order], fmt, gram)))


def test_calls_with_equal_arguments_give_equal_bytes(fast_xp):
    w, gram = on(fast_xp, normal(40, 70)), on(fast_xp, moment(70))
    assert stored(gptq(w, FMT, gram)) == stored(gptq(w, FMT, gram))


@pytest.mark.parametrize("text", ["nf2/8:float32", "nf3/6@0:u8/8:float32", "nf4+fit2/8@-1:float32"])
def test_libraries_agree_up_to_rounding(xp, text):
    w, gram, fmt = normal(24, 40, dtype=np.float64), moment(40), BlockFormat.parse(text)
    q, other = gptq(on(xp, w), fmt, on(xp, gram)), gptq(w, fmt, gram)
    assert np.mean(host(q.codes) != other.codes) < 0.02
    assert output_error(w, q, gram) == pytest.approx(output_error(w, other, gram), rel=0.02)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weights_are_rounded_as_if_they_were_wide(fast_xp, dtype):
    w, gram = normal(8, 24).astype(dtype), moment(24)
    narrow = gptq(on(fast_xp, w), FMT, on(fast_xp, gram))
    assert stored(narrow) == stored(gptq(on(fast_xp, w.astype(np.float32)), FMT, on(fast_xp, gram)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_grams_may_be_narrow(fast_xp, dtype):
    w, gram = normal(8, 24), (moment(24) / 100).astype(dtype)
    narrow = gptq(on(fast_xp, w), FMT, on(fast_xp, gram))
    assert stored(narrow) == stored(gptq(on(fast_xp, w), FMT, on(fast_xp, gram.astype(np.float64))))


def test_strides_are_of_no_consequence(fast_xp):
    w, gram = normal(8, 24), moment(24)
    turned = on(fast_xp, np.ascontiguousarray(w.T)).T, on(fast_xp, np.ascontiguousarray(gram.T)).T
    assert stored(gptq(turned[0], FMT, turned[1])) == stored(gptq(on(fast_xp, w), FMT, on(fast_xp, gram)))


def test_arguments_stay_as_they_are(fast_xp):
    w, gram = on(fast_xp, normal(8, 24)), on(fast_xp, moment(24))
    before = host(w), host(gram)
    gptq(w, FMT, gram)
    assert np.array_equal(host(w), before[0])
    assert np.array_equal(host(gram), before[1])


# --- grams of few or no inputs


def test_a_gram_of_zeros_gives_nearest_rounding_and_a_warning(xp):
    w = normal(4, 16)
    with pytest.warns(UserWarning, match="gram of q_proj is zero"):
        q = gptq(on(xp, w), FMT, on(xp, np.zeros((16, 16))), name="q_proj")
    assert stored(q) == stored(quantize(w, FMT, fit="scale"))


@pytest.mark.parametrize("shape", [(0, 0), (0, 8), (8, 0)])
@pytest.mark.parametrize("text", ["nf2/8:float32", "affine2/8@-1:float32", "nf2+fit/8:u8/8:float32"])
def test_matrices_of_no_weights_are_quantized(xp, shape, text):
    q = gptq(on(xp, np.zeros(shape, dtype=np.float32)), BlockFormat.parse(text), on(xp, np.eye(shape[1])))
    assert restored(q).shape == shape


def test_inputs_that_are_always_zero_count_by_their_damping(fast_xp):
    w, gram = normal(8, 24), moment(24)
    gram[5, :] = gram[:, 5] = gram[20, :] = gram[:, 20] = 0
    q = gptq(on(fast_xp, w), BlockFormat.parse("nf4/8:float32"), on(fast_xp, gram))
    assert np.abs(restored(q) - w)[:, [5, 20]].max() < 0.6
    assert np.isfinite(restored(q)).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_few_inputs_need_damping(xp, rank):
    w, gram = on(xp, normal(8, 24)), on(xp, moment(24, rank))
    assert np.isfinite(restored(gptq(w, FMT, gram))).all()
    with pytest.raises(InvalidArgumentError, match=r"gram must be .* increase damping"):
        gptq(w, FMT, gram, damping=0.0)


# --- values out of range


def test_targets_beyond_the_range_of_scales_end_the_rounds():
    w = np.full((4, 32), 65504, dtype=np.float32)
    w[:, ::2] *= np.linspace(0.3, 0.8, 16, dtype=np.float32)
    fmt, gram = BlockFormat.parse("nf2/8:float16"), moment(32) + 1000
    q = gptq(w, fmt, gram, fit="absmax")
    assert output_error(w, q, gram) < output_error(w, quantize(w, fmt), gram)


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_the_largest_numbers_overflow_into_nothing(fast_xp, order):
    w, gram = np.float32(3.4e38) * np.sign(normal(4, 16)), moment(16)
    w[:, ::3] *= np.float32(0.4)
    q = gptq(on(fast_xp, w), FMT, on(fast_xp, gram), order=order)
    assert output_error(w, q, gram) <= output_error(w, nearest_of(w, FMT, gram), gram) * (1 + 1e-9)


def test_blocks_of_zeros_stay_zero(fast_xp):
    w = normal(8, 24)
    w[2:4] = 0
    q = gptq(on(fast_xp, w), FMT, on(fast_xp, moment(24)), rounds=1, sweeps=1)
    assert not restored(q)[2:4].any()


def test_lost_blocks_are_warned_of_once():
    w = normal(4, 16)
    w[0, :8] *= 1e-12
    with pytest.warns(ScaleUnderflowWarning, match="1 of 8 blocks of k_proj") as caught:
        gptq(w, BlockFormat.parse("nf4/8:float16"), moment(16), name="k_proj")
    assert len(caught) == 1


# --- bad input


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), ()])
def test_weights_that_are_no_matrix_are_refused(xp, shape):
    with pytest.raises(InvalidArgumentError, match=r"w must be a matrix .* k_proj"):
        gptq(on(xp, np.ones(shape, dtype=np.float32)), FMT, on(xp, np.eye(8)), name="k_proj")


@pytest.mark.parametrize("shape", [(4, 4), (8,), (8, 4), (1, 8, 8), ()])
def test_grams_of_other_shapes_are_refused(xp, shape):
    with pytest.raises(InvalidArgumentError, match=r"gram .* \(8, 8\) for k_proj .* \(4, 8\)"):
        gptq(on(xp, ramp(4, 8)), FMT, on(xp, np.ones(shape)), name="k_proj")


def test_grams_that_are_not_symmetric_are_refused(xp):
    with pytest.raises(InvalidArgumentError, match=r"gram of k_proj.*symmetric"):
        gptq(on(xp, ramp(4, 8)), FMT, on(xp, np.eye(8) + 1e-2 * np.tri(8)), name="k_proj")


def test_grams_may_be_symmetric_up_to_rounding():
    gram = moment(8)
    skewed = gram * (1 + 1e-6 * np.tri(8))
    assert output_error(normal(4, 8), gptq(normal(4, 8), FMT, skewed), gram) > 0


@pytest.mark.parametrize("diagonal", [[1, 1, 1, -1], [-1, -1, -1, -1], [1, 1, 1, -1e-1]])
def test_grams_of_negative_eigenvalues_are_refused(xp, diagonal):
    with pytest.raises(InvalidArgumentError, match="gram must be positive definite"):
        gptq(on(xp, ramp(4, 4)), FMT, on(xp, np.diag(np.array(diagonal, dtype=np.float64))))


def test_grams_of_an_empty_diagonal_are_refused(xp):
    with pytest.raises(InvalidArgumentError, match="gram must be positive definite"):
        gptq(on(xp, ramp(4, 2)), FMT, on(xp, np.array([[0.0, 1.0], [1.0, 0.0]])))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_located(xp, bad):
    gram, w = np.eye(8), ramp(4, 8)
    gram[2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"gram of k_proj has 1 .* index \(2, 3\)"):
        gptq(on(xp, w), FMT, on(xp, gram), name="k_proj")
    w[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"k_proj has 1 non-finite value\(s\), the first at index \(1, 2\)"):
        gptq(on(xp, w), FMT, on(xp, np.eye(8)), name="k_proj")


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64])
def test_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match="gram of w must be"):
        gptq(on(xp, ramp(4, 8)), FMT, on(xp, np.ones((8, 8), dtype=dtype)))
    with pytest.raises(UnsupportedArrayError, match="k_proj must be"):
        gptq(on(xp, np.ones((4, 8), dtype=dtype)), FMT, on(xp, np.eye(8)), name="k_proj")


def test_what_is_no_array_is_refused():
    for w, gram in (([[1.0]], np.eye(1)), (np.ones((1, 1)), [[1.0]])):
        with pytest.raises(UnsupportedArrayError, match="array"):
            gptq(w, FMT, gram)


def test_arrays_of_two_libraries_are_refused(torch):
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        gptq(ramp(4, 8), FMT, torch.eye(8))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("damping", -0.1, "damping must be at least 0.* got -0.1"),
        ("damping", np.nan, "damping must be at least 0.* got nan"),
        ("damping", np.inf, "damping must be at least 0.* got inf"),
        ("order", "actorder", "order must be .* got 'actorder'"),
        ("rounds", 0, "rounds must be .* 1, got 0"),
        ("rounds", 1.5, "rounds must be .* 1, got 1.5"),
        ("rounds", True, "rounds must be .* 1, got True"),
        ("sweeps", -1, "sweeps must be .* 0, got -1"),
        ("fit", "best", "fit must be .* got 'best'"),
        ("fmt", "nf4/64", "fmt must be a BlockFormat"),
    ],
)
def test_other_options_are_refused(option, value, message):
    with pytest.raises(InvalidArgumentError, match=message):
        gptq(ramp(4, 8), **({"fmt": FMT, "gram": np.eye(8)} | {option: value}))


def test_a_check_that_is_not_wanted_is_not_made():
    w = ramp(4, 8)
    assert stored(gptq(w, FMT, moment(8), check_finite=False)) == stored(gptq(w, FMT, moment(8)))
    assert dequantize(gptq(w, FMT, moment(8), check_finite=False)).shape == (4, 8)


# --- starting from an earlier result


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_from_a_start_the_error_is_about_as_small(xp, fit):
    w, gram = normal(24, 48, seed=3), moment(48)
    near = w + 0.02 * normal(24, 48, seed=4)
    start = gptq(on(xp, w), FMT, on(xp, gram), fit=fit)
    before = stored(start)
    cold = gptq(on(xp, near), FMT, on(xp, gram), fit=fit)
    warm = gptq(on(xp, near), start.format, on(xp, gram), fit=fit, start=start)
    assert output_error(on(xp, near), warm, gram) <= 1.1 * output_error(on(xp, near), cold, gram)
    assert stored(start) == before


def test_a_start_of_another_kind_is_refused():
    w, gram = normal(8, 16), moment(16)
    start = gptq(w, FMT, gram)
    for fmt, fit, other in (
        (FMT, "absmax", w),
        (BlockFormat.parse("nf3/8:float32"), "scale", w),
        (FMT, "scale", normal(9, 16)),
    ):
        with pytest.raises(InvalidArgumentError, match="start"):
            gptq(other, fmt, gram, fit=fit, start=start)
