from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lqlora as lq
from lqlora import BlockFormat, decompose, dequantize, quantize
from lqlora.errors import InvalidArgumentError, MixedArraysError, NonFiniteError, UnsupportedArrayError
from lqlora.weighting import Elementwise, RowColumn, Uniform
from tests.strategies import host, on, stored

FMT = BlockFormat.parse("nf3/16:float32")
ROWS, COLUMNS = 40, 32

#: Each example is a whole alternation; the properties do not hide in rare inputs.
few = settings(max_examples=10)


def matrix(seed=0, rows=ROWS, columns=COLUMNS):
    """Noise with a few strong directions and a few outliers, as weights have."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * 0.02
    w += 0.05 * np.outer(rng.standard_normal(rows), rng.standard_normal(columns))
    w[rng.integers(0, rows, 5), rng.integers(0, columns, 5)] *= 10
    return w.astype(np.float32)


def fisher(seed=0, rows=ROWS, columns=COLUMNS):
    """Spread over several orders of magnitude."""
    rng = np.random.default_rng(seed + 1)
    return (np.exp(2 * rng.standard_normal((rows, 1))) * rng.exponential(size=(rows, columns))).astype(np.float32)


def weighted(array, weights):
    return float((np.asarray(weights, dtype=np.float64) * np.asarray(array, dtype=np.float64) ** 2).sum()) ** 0.5


def truncated(array, rank):
    left, values, right = np.linalg.svd(np.asarray(array, dtype=np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


# --- the result is what it says


@given(seed=st.integers(0, 99), rank=st.integers(1, 8), init=st.sampled_from(["svd", "quantize"]))
@few
def test_the_best_iterate_is_returned(xp, seed, rank, init):
    d = decompose(on(xp, matrix(seed)), FMT, rank, init=init, max_iter=8)
    assert d.relative_error == d.errors[d.best] == min(d.errors)
    assert (d.rank, tuple(d.lora_A.shape), tuple(d.lora_B.shape)) == (rank, (rank, COLUMNS), (ROWS, rank))


@given(seed=st.integers(0, 99), rank=st.integers(0, 8), scaling=st.sampled_from([1.0, 2.0, 0.3]))
@few
def test_the_recorded_error_is_that_of_the_reconstruction(xp, seed, rank, scaling):
    w = matrix(seed)
    d = decompose(on(xp, w), FMT, rank, max_iter=5, scaling=scaling)
    residual = w - host(d.reconstruct()).astype(np.float64)
    assert d.relative_error == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(w.astype(float)), rel=1e-5)
    assert d.squared_error == pytest.approx(np.linalg.norm(residual) ** 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["row-column", "elementwise"])
def test_the_recorded_weighted_error_is_that_of_the_reconstruction(xp, kind):
    w, weights = matrix(), fisher()
    if kind == "row-column":
        row, col = weights[:, 0], weights[0]
        weighting, weights = RowColumn(on(xp, row), on(xp, col)), np.outer(row, col)
    else:
        weighting = Elementwise(on(xp, weights))
    d = decompose(on(xp, w), FMT, 4, weighting=weighting, max_iter=5)
    error = weighted(w - host(d.reconstruct()), weights)
    assert d.relative_error == pytest.approx(error / weighted(w, weights), rel=1e-5)
    assert d.squared_error == pytest.approx(error**2, rel=1e-5)


@pytest.mark.parametrize("init", ["svd", "quantize"])
@pytest.mark.parametrize("rank", [1, 4, 16, 32])
def test_never_worse_than_quantization_nor_than_one_svd_of_its_residual(xp, init, rank):
    w = matrix()
    d = decompose(on(xp, w), FMT, rank, init=init, max_iter=1)
    residual = w - dequantize(quantize(w, FMT))
    norm = np.linalg.norm(w)
    quantized_alone = np.linalg.norm(residual) / norm
    one_svd = np.linalg.norm(residual - truncated(residual, rank)) / norm
    assert d.errors[0] == pytest.approx(quantized_alone, rel=1e-5)
    assert d.relative_error <= quantized_alone * (1 + 1e-6)
    # A randomized decomposition stands in for the exact one: that is the percent.
    assert d.relative_error <= one_svd * 1.01 + 1e-6


def test_the_alternation_improves_on_its_start():
    d = decompose(matrix(), FMT, 8)
    assert d.relative_error < 0.98 * d.errors[1] < d.errors[0]
    assert d.best >= 2


def test_factors_have_the_same_norm_component_by_component(xp):
    d = decompose(on(xp, matrix()), FMT, 4, weighting=Elementwise(on(xp, fisher())), max_iter=3)
    np.testing.assert_allclose(
        np.linalg.norm(host(d.lora_A), axis=1), np.linalg.norm(host(d.lora_B), axis=0), rtol=1e-4
    )


@pytest.mark.parametrize("scaling", [0.25, 2.0, 16.0])
def test_the_scaling_does_not_change_what_is_approximated(xp, scaling):
    w = on(xp, matrix())
    plain, scaled = decompose(w, FMT, 4, max_iter=4), decompose(w, FMT, 4, max_iter=4, scaling=scaling)
    assert scaled.scaling == scaling
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-2)
    by_hand = host(dequantize(scaled.quantized)) + scaling * host(scaled.lora_B) @ host(scaled.lora_A)
    np.testing.assert_allclose(host(scaled.reconstruct()), by_hand, atol=1e-6)
    assert np.linalg.norm(by_hand - host(w)) / np.linalg.norm(host(w)) == pytest.approx(scaled.relative_error, rel=1e-4)


@pytest.mark.parametrize("init", ["svd", "quantize", "zero"])
def test_the_same_seed_gives_the_same_bytes(xp, init):
    first, again = (decompose(on(xp, matrix()), FMT, 4, init=init, max_iter=4, seed=7) for _ in range(2))
    assert stored(first.quantized) == stored(again.quantized)
    assert host(first.lora_A).tobytes() == host(again.lora_A).tobytes()
    assert host(first.lora_B).tobytes() == host(again.lora_B).tobytes()
    assert first.errors == again.errors


def test_another_seed_gives_another_sketch():
    noise = [decompose(matrix(), FMT, 4, init="zero", seed=seed).lora_A.tobytes() for seed in (1, 2)]
    assert noise[0] != noise[1]


def test_libraries_agree(xp):
    mine, numpys = (decompose(w, FMT, 4, max_iter=5, rtol=0.0) for w in (on(xp, matrix()), matrix()))
    assert stored(quantize(on(xp, matrix()), FMT)) == stored(quantize(matrix(), FMT))
    # Another BLAS rounds differently, a few codes flip, and the iterates drift apart by little.
    assert len(mine.errors) == len(numpys.errors)
    np.testing.assert_allclose(mine.errors, numpys.errors, rtol=0.02)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_dtypes_are_taken(dtype):
    d = decompose(matrix().astype(dtype), FMT, 4, max_iter=3)
    assert d.lora_A.dtype == d.lora_B.dtype == np.float32
    assert d.relative_error == pytest.approx(decompose(matrix(), FMT, 4, max_iter=3).relative_error, rel=0.02)


def test_a_transposed_view_is_its_entries(xp):
    w = matrix()
    view = xp.matrix_transpose(on(xp, np.ascontiguousarray(w.T)))
    assert decompose(view, FMT, 4, max_iter=2).relative_error == pytest.approx(
        decompose(on(xp, w), FMT, 4, max_iter=2).relative_error, rel=1e-3
    )


def test_double_quantization_is_taken(xp):
    d = decompose(on(xp, matrix()), BlockFormat.parse("nf3/16:u8/8:float32"), 4, max_iter=3)
    assert d.relative_error < d.errors[0]


@pytest.mark.parametrize("size", [1e-36, 1e-10, 1e10, 1e30, 1e38])
def test_the_size_of_the_weights_does_not_matter(xp, size):
    power = 2.0 ** np.round(np.log2(size))
    d = decompose(on(xp, (matrix() * power).astype(np.float32)), FMT, 4, max_iter=3)
    assert d.relative_error == pytest.approx(decompose(matrix(), FMT, 4, max_iter=3).relative_error, rel=0.02)
    assert np.isfinite(host(d.lora_A)).all()
    assert np.isfinite(host(d.lora_B)).all()


def test_the_matrix_is_not_changed(xp):
    w = on(xp, matrix())
    decompose(w, FMT, 4, max_iter=2)
    assert host(w).tobytes() == matrix().tobytes()


def test_torch_parameters_are_decomposed_without_a_graph(torch):
    d = decompose(torch.nn.Parameter(torch.from_numpy(matrix())), FMT, 4, max_iter=2)
    assert not d.lora_A.requires_grad
    assert not d.lora_B.requires_grad


# --- weights


def test_the_weighted_low_rank_step_is_optimal(xp):
    # For weights of rank one the optimum has a closed form: scale by the roots, truncate, scale back.
    w = matrix()
    rng = np.random.default_rng(3)
    row, col = rng.exponential(size=ROWS) + 0.01, rng.exponential(size=COLUMNS) + 0.01
    weighting = RowColumn(on(xp, row), on(xp, col))
    d = decompose(on(xp, w), FMT, 4, weighting=weighting, init="quantize", max_iter=1, rtol=0.0)
    residual = w - dequantize(quantize(w, FMT)).astype(np.float64)
    roots = np.sqrt(np.outer(row, col))
    optimum = truncated(residual * roots, 4) / roots
    best = weighted(residual - optimum, roots**2) / weighted(w, roots**2)
    assert d.errors[1] == pytest.approx(best, rel=0.01)
    assert d.errors[1] >= best * (1 - 1e-6)


def test_weights_of_one_are_no_weights(xp):
    w = on(xp, matrix())
    ones = RowColumn(on(xp, np.ones(ROWS, dtype=np.float32)), on(xp, np.ones(COLUMNS, dtype=np.float32)))
    plain = decompose(w, FMT, 4, weighting=Uniform(), max_iter=3)
    assert decompose(w, FMT, 4, weighting=ones, max_iter=3).errors == pytest.approx(plain.errors, rel=1e-6)


def test_weights_lower_the_weighted_error():
    w, weights = matrix(), fisher()
    with_weights = decompose(w, FMT, 4, weighting=Elementwise(weights)).reconstruct()
    without = decompose(w, FMT, 4).reconstruct()
    assert weighted(w - with_weights, weights) < weighted(w - without, weights)
    assert weighted(w - with_weights, 1.0) > weighted(w - without, 1.0)


@pytest.mark.parametrize("kind", ["elementwise", "row-column"])
def test_rows_without_fisher_information_give_finite_factors(xp, kind):
    weights = fisher()
    weights[:10] = 0.0
    weights[:, 5] = 0.0
    make = Elementwise if kind == "elementwise" else RowColumn.from_fisher
    d = decompose(on(xp, matrix()), FMT, 4, weighting=make(on(xp, weights)), max_iter=3)
    assert np.isfinite(host(d.lora_A)).all()
    assert np.isfinite(host(d.lora_B)).all()
    assert np.isfinite(d.errors).all()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_the_unit_of_the_weights_does_not_matter(xp, size):
    weights = fisher()
    plain = decompose(on(xp, matrix()), FMT, 4, weighting=Elementwise(on(xp, weights)), max_iter=3)
    scaled = decompose(
        on(xp, matrix()), FMT, 4, weighting=Elementwise(on(xp, (weights * size).astype(np.float32))), max_iter=3
    )
    assert scaled.errors == pytest.approx(plain.errors, rel=0.01)


def test_fisher_information_that_is_all_zero_is_warned_of_and_left_out(xp):
    with pytest.warns(UserWarning, match="zero"):
        weighting = Elementwise(on(xp, np.zeros((ROWS, COLUMNS), dtype=np.float32)))
    d = decompose(on(xp, matrix()), FMT, 4, weighting=weighting, max_iter=3)
    assert d.relative_error == pytest.approx(decompose(matrix(), FMT, 4, max_iter=3).relative_error, rel=0.02)


@pytest.mark.parametrize(
    "make",
    [lambda: Elementwise(np.ones((COLUMNS, ROWS))), lambda: RowColumn(np.ones(3), np.ones(COLUMNS))],
    ids=["elementwise", "row-column"],
)
def test_weights_that_do_not_fit_are_refused(make):
    with pytest.raises(InvalidArgumentError, match=r"do not fit \(40, 32\)"):
        decompose(matrix(), FMT, 4, weighting=make())


@pytest.mark.parametrize("kind", ["elementwise", "row-column"])
def test_weights_of_another_library_are_refused(torch, kind):
    weighting = Elementwise(fisher()) if kind == "elementwise" else RowColumn(fisher()[:, 0], fisher()[0])
    with pytest.raises(MixedArraysError):
        decompose(torch.from_numpy(matrix()), FMT, 4, weighting=weighting, max_iter=1)


# --- why it stops


def test_it_stops_at_the_target():
    errors = decompose(matrix(), FMT, 8).errors
    target = (min(errors) + errors[1]) / 2
    d = decompose(matrix(), FMT, 8, target=target)
    assert d.stop_reason == "target"
    assert d.relative_error <= target
    assert all(error > target for error in d.errors[:-1])


def test_it_stops_when_the_callback_says_so():
    seen = []

    def watch(iteration, error):
        seen.append((iteration, error))
        return iteration == 2

    d = decompose(matrix(), FMT, 4, callback=watch)
    assert d.stop_reason == "callback"
    assert seen == list(enumerate(d.errors))
    assert len(seen) == 3


@pytest.mark.parametrize("init", ["svd", "quantize"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_it_stops_after_max_iter(init, count):
    d = decompose(matrix(), FMT, 4, init=init, max_iter=count, rtol=0.0)
    assert d.stop_reason == "max_iter"
    # Entry 0 is quantization alone; entry 1 is the first iterate where quantization comes first.
    assert len(d.errors) == 1 + count + (init == "svd")


def test_it_stops_when_the_error_stops_falling():
    d = decompose(matrix(), FMT, 4, rtol=0.01)
    assert d.stop_reason == "converged"
    assert len(d.errors) < 102
    lowest = np.minimum.accumulate(d.errors)
    assert lowest[-4] - lowest[-1] < 0.01 * lowest[-1]


def test_no_tolerance_never_stops_early():
    assert decompose(matrix(), FMT, 4, rtol=0.0, max_iter=20).stop_reason == "max_iter"


# --- rank zero, zeros, nothing


@pytest.mark.parametrize("init", ["svd", "quantize", "zero"])
def test_rank_zero_is_quantization(xp, init):
    d = decompose(on(xp, matrix()), FMT, 0, init=init)
    assert stored(d.quantized) == stored(quantize(on(xp, matrix()), FMT))
    assert (d.stop_reason, len(d.errors), d.rank) == ("rank_zero", 1, 0)
    assert (tuple(d.lora_A.shape), tuple(d.lora_B.shape)) == ((0, COLUMNS), (ROWS, 0))
    np.testing.assert_array_equal(host(d.reconstruct()), host(dequantize(d.quantized)))


def test_init_zero_leaves_the_product_at_zero(xp):
    d = decompose(on(xp, matrix()), FMT, 4, init="zero")
    assert not host(d.lora_B).any()
    assert (np.abs(host(d.lora_A)) <= COLUMNS**-0.5).all()
    assert host(d.lora_A).any()
    np.testing.assert_array_equal(host(d.reconstruct()), host(dequantize(quantize(on(xp, matrix()), FMT))))


@pytest.mark.parametrize("init", ["svd", "quantize", "zero"])
def test_a_matrix_of_zeros_is_exact(xp, init):
    d = decompose(on(xp, np.zeros((ROWS, COLUMNS), dtype=np.float32)), FMT, 4, init=init)
    assert d.relative_error == d.squared_error == 0.0
    assert not host(d.reconstruct()).any()
    assert np.isfinite(host(d.lora_A)).all()


def test_a_matrix_of_low_rank_is_met_almost_exactly(xp):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((ROWS, 4)) @ rng.standard_normal((4, COLUMNS))).astype(np.float32)
    assert decompose(on(xp, w), FMT, 4).relative_error < 1e-5


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_are_decomposed_into_nothing(xp, shape):
    d = decompose(on(xp, np.zeros(shape, dtype=np.float32)), FMT, 0)
    assert tuple(d.reconstruct().shape) == shape
    assert d.relative_error == 0.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 100)])
def test_full_rank_of_small_matrices(xp, shape):
    w = matrix(rows=shape[0], columns=shape[1])
    d = decompose(on(xp, w), FMT, min(shape), max_iter=3)
    assert d.relative_error < 1e-5


# --- bad input


@pytest.mark.parametrize("rank", [-1, 33, 4.0, "4", None])
def test_ranks_out_of_range_are_refused(xp, rank):
    with pytest.raises(InvalidArgumentError, match="of q_proj is no int from 0 to 32"):
        decompose(on(xp, matrix()), FMT, rank, name="q_proj")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(xp, bad):
    w = matrix()
    w[3, 5] = bad
    with pytest.raises(NonFiniteError, match=r"q_proj has 1 non-finite value\(s\), the first at index \(3, 5\)"):
        decompose(on(xp, w), FMT, 4, name="q_proj")


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_only_matrices_are_decomposed(xp, shape):
    with pytest.raises(InvalidArgumentError, match=f"q_proj has {len(shape)} dimensions; a decomposition needs two"):
        decompose(on(xp, np.ones(shape, dtype=np.float32)), FMT, 0, name="q_proj")


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64])
def test_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match="q_proj must be"):
        decompose(on(xp, np.ones((4, 4), dtype=dtype)), FMT, 1, name="q_proj")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iter": 0}, "max_iter is at least 1, not 0"),
        ({"scaling": 0.0}, "scaling is positive and finite"),
        ({"scaling": -1.0}, "scaling is positive and finite"),
        ({"scaling": float("nan")}, "scaling is positive and finite"),
        ({"scaling": float("inf")}, "scaling is positive and finite"),
        ({"init": "pissa"}, "init is 'svd', 'quantize' or 'zero', not 'pissa'"),
    ],
    ids=str,
)
def test_other_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        decompose(matrix(), FMT, 4, **arguments)


def test_a_scale_out_of_range_names_the_matrix():
    w = matrix() * np.float32(1e7)
    with pytest.raises(NonFiniteError, match="A scale of q_proj is beyond the range of float16"):
        decompose(w, lq.BlockFormat.parse("nf3/16:float16"), 4, name="q_proj")


@pytest.mark.parametrize("tolerance", [{"rtol": np.nan}, {"rtol": -1.0}, {"target": np.nan}, {"target": -0.1}])
def test_tolerances_that_could_never_stop_are_refused(tolerance):
    with pytest.raises(InvalidArgumentError, match="rtol and target"):
        decompose(matrix(), FMT, 1, **tolerance)


@pytest.mark.parametrize("weighting", [np.ones((2, 2)), "fisher"])
def test_what_is_no_weighting_is_refused(weighting):
    with pytest.raises(InvalidArgumentError, match="A weighting is one of"):
        decompose(matrix(), FMT, 1, weighting=weighting)
