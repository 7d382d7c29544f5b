"""Scales of matrices, importance, damping and adapters over the range of float64: the result of one near 1, or refused."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import BlockFormat, decompose, decompose_stack, quantize
from lqlora.errors import InvalidArgumentError, LQLoRAError, NonFiniteError, ScaleUnderflowWarning
from lqlora.weighting import Elementwise, InputGram, RowColumn, ScaledWeighting, Uniform
from tests.decomposition.cases import FMT, SMALL, contents, matrix, small_case
from tests.strategies import host, on
from tests.weighting.cases import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora import Decomposition

WEIGHTED = [kind for kind in KINDS if kind != "uniform"]
FITS = ("absmax", "scale", "levels+scale")

#: Each example is a decomposition.
few = settings(max_examples=2)
many = settings(max_examples=30)


@pytest.fixture(scope="module")
def plain() -> Any:
    """Return the relative error at scale 1, computed once for each choice of options."""
    known: dict[Any, float] = {}

    def error(xp: Any, kind: str, fit: str) -> float:
        key = (xp.__name__, kind, fit)
        if key not in known:
            known[key] = decomposed(xp, kind, 0, fit).relative_error
        return known[key]

    return error


def decomposed(xp: Any, kind: str, power: int, fit: str, size: float = 1.0, dtype: Any = np.float64) -> Any:
    """Return the decomposition of a matrix times a size, with its importance times a power of ten."""
    with np.errstate(all="ignore"):
        own, w = small_case(kind).scaled(float(f"1e{power}")), (matrix(0, *SMALL, np.float64) * size).astype(dtype)
    return decompose(on(xp, w), FMT, 2, weighting=own.on(xp), fit=fit, max_iter=2)


def attempt(call: Callable[[], Decomposition]) -> Decomposition | LQLoRAError:
    """Return the result of a call, or the error of ours that refuses its arguments."""
    try:
        return call()
    except LQLoRAError as error:
        return error


def check_importance(xp: Any, plain: Any, kind: str, power: int, fit: str) -> None:
    d = attempt(lambda: decomposed(xp, kind, power, fit))
    if isinstance(d, NonFiniteError):
        with np.errstate(over="ignore"):
            weights = small_case(kind).scaled(float(f"1e{power}")).weights
        assert not all(array is None or np.isfinite(array).all() for array in weights)
    elif isinstance(d, LQLoRAError):
        # Rounded to subnormal numbers, a gram need not be positive semidefinite.
        expected = "gram must be" if "semidefinite" in str(d) else "weighting must give w a squared norm between 1e-288"
        assert str(d).removeprefix("output_").removeprefix("input_").startswith(expected)
        assert abs(power) > (307 if "semidefinite" in str(d) else 140)
    else:
        assert d.relative_error == pytest.approx(plain(xp, kind, fit), rel=0.02)
        assert 0 < d.squared_error < math.inf


def check_matrix(xp: Any, plain: Any, kind: str, power: int, dtype: Any) -> None:
    d = attempt(lambda: decomposed(xp, kind, 0, "absmax", float(f"1e{power}"), dtype))
    if isinstance(d, NonFiniteError):
        assert dtype is np.float32  # infinite before it is passed
        assert power > 37
        assert str(d).startswith("w has")
    elif isinstance(d, LQLoRAError):
        assert "must have a largest magnitude between 1.1e-41 and 1.7e+38" in str(d)
        assert power < -40 or power > 37
    elif dtype is np.float32 and power < -44:
        assert d.relative_error == 0.0  # a matrix of zeros
    else:
        assert d.relative_error == pytest.approx(plain(xp, kind, "absmax"), rel=0.02)
        assert np.isfinite(host(d.reconstruct())).all()


class TestTheResultDoesNotDependOnAScale:
    @pytest.mark.parametrize("kind", WEIGHTED)
    @given(power=st.integers(-300, 300), fit=st.sampled_from(FITS[:2]))
    @few
    def test_of_the_importance(self, fast_xp, plain, kind, power, fit):
        check_importance(fast_xp, plain, kind, power, fit)

    @given(kind=st.sampled_from(KINDS), power=st.integers(-320, 305), dtype=st.sampled_from([np.float32, np.float64]))
    @settings(max_examples=6)
    def test_of_the_matrix(self, fast_xp, plain, kind, power, dtype):
        check_matrix(fast_xp, plain, kind, power, dtype)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", WEIGHTED)
    @given(power=st.integers(-323, 307), fit=st.sampled_from(FITS))
    @many
    def test_of_the_importance_thoroughly(self, fast_xp, plain, kind, power, fit):
        check_importance(fast_xp, plain, kind, power, fit)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    @given(power=st.integers(-323, 307), dtype=st.sampled_from([np.float32, np.float64]))
    @many
    def test_of_the_matrix_thoroughly(self, fast_xp, plain, kind, power, dtype):
        check_matrix(fast_xp, plain, kind, power, dtype)

    @pytest.mark.sampled(14)
    @pytest.mark.parametrize("kind", WEIGHTED)
    @pytest.mark.parametrize("exponent", [-460, -130, 460])
    def test_by_a_power_of_four_it_is_the_same_to_the_last_bit(self, fast_xp, kind, exponent):
        own, w = small_case(kind), on(fast_xp, matrix(0, *SMALL, np.float64))
        count = sum(weights is not None for weights in own.weights)
        one, two = (
            decompose(w, FMT, 2, weighting=weights.on(fast_xp), fit="scale", max_iter=2)
            for weights in (own, own.scaled(2.0**exponent))
        )
        assert contents(one) == contents(two)
        assert two.squared_error == math.ldexp(one.squared_error, count * exponent)

    @pytest.mark.parametrize("size", [2.0**-149, 2.0**-130, 2.0**110])
    @pytest.mark.parametrize("kind", ["elementwise", "row-column", "gram"])
    def test_importance_in_float32_at_its_own_limits(self, kind, size):
        own, w = small_case(kind), matrix(0, *SMALL, np.float64)
        weights = [None if array is None else np.round(8 * array / array.max() + 1) for array in own.weights]
        if kind == "gram":
            weights = [weights[0] @ weights[0].T]
        make = {"elementwise": Elementwise, "row-column": RowColumn, "gram": InputGram}[kind]
        one, two = (
            decompose(
                w, FMT, 2, weighting=make(*((array * factor).astype(np.float32) for array in weights)), max_iter=2
            )
            for factor in (1.0, size)
        )
        assert two.relative_error == pytest.approx(one.relative_error, rel=1e-3)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("exponent", [-10, 0, 10])
    def test_half_precision_near_its_limits(self, torch, dtype, exponent):
        w = torch.from_numpy(matrix(0, *SMALL, np.float64))
        far = 2.0 ** (exponent if dtype == "float16" else 11 * exponent)
        one, two = (decompose((w * factor).to(getattr(torch, dtype)), FMT, 2, max_iter=2) for factor in (1.0, far))
        assert two.relative_error == pytest.approx(one.relative_error, rel=0.02)

    def test_of_the_matrices_of_a_stack(self, fast_xp):
        w = np.stack([matrix(0, *SMALL, np.float64) * 2.0**power for power in (-130, 0, 120)])
        found = decompose_stack(on(fast_xp, w), FMT, 2, max_iter=2)
        errors = [part.relative_error for part in found.parts]
        assert errors == pytest.approx([errors[1]] * 3, rel=0.02)
        w[2] *= 1e-200
        with pytest.raises(InvalidArgumentError, match=r"^w\[2\] must have a largest magnitude"):
            decompose_stack(on(fast_xp, w), FMT, 2, max_iter=2)


class TestDamping:
    @pytest.mark.parametrize("damping", [1e30, 1e200])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_much_damping_is_equal_importance(self, fast_xp, damping, dtype):
        gram, w = small_case("gram").weights[0].astype(dtype), on(fast_xp, matrix(0, *SMALL, dtype))
        d = decompose(w, FMT, 2, weighting=InputGram(on(fast_xp, gram * 1e-3), damping=damping), max_iter=2)
        assert d.relative_error == pytest.approx(decompose(w, FMT, 2, max_iter=2).relative_error, rel=1e-4)

    def test_damping_beyond_the_range_of_squared_errors_is_refused(self, fast_xp):
        gram, w = small_case("gram").weights[0], on(fast_xp, matrix(0, *SMALL, np.float32))
        with pytest.raises(InvalidArgumentError, match=r"^weighting .*w .*got about 1e"):
            decompose(w, FMT, 2, weighting=InputGram(on(fast_xp, gram), damping=1.7e308), max_iter=2)

    @pytest.mark.parametrize("damping", [0.0, 1e-31, -1.0, math.inf, math.nan])
    def test_too_little_is_refused(self, damping):
        with pytest.raises(InvalidArgumentError, match=r"^damping .*at least 1e-30"):
            InputGram(np.eye(3), damping=damping)

    def test_errors_in_directions_without_inputs_count(self):
        gram, w = np.diag([1.0, 0.0]).astype(np.float32), np.array([[0.0, 1.0], [0.0, 0.3]], dtype=np.float32)
        d = decompose(w, FMT, 0, weighting=InputGram(gram, damping=1e-30))
        assert d.relative_error == pytest.approx(decompose(w, FMT, 0).relative_error, rel=1e-5)
        assert d.relative_error > 0


class TestScaling:
    @given(power=st.integers(-320, 308), size=st.integers(-40, 37))
    @settings(max_examples=8)
    def test_factors_are_as_good_as_without_it_or_refused(self, fast_xp, power, size):
        w = on(fast_xp, (matrix(0, *SMALL, np.float64) * 10.0**size).astype(np.float32))
        d = attempt(lambda: decompose(w, FMT, 2, scaling=float(f"1e{power}"), max_iter=2))
        if isinstance(d, LQLoRAError):
            assert str(d).startswith("scaling must be between ")
            return
        rest = host(w).astype(np.float64) - host(d.reconstruct()).astype(np.float64)
        found = np.linalg.norm(rest / 10.0**size) / np.linalg.norm(host(w).astype(np.float64) / 10.0**size)
        assert found == pytest.approx(d.relative_error, rel=0.02)
        assert found == pytest.approx(decompose(w, FMT, 2, max_iter=2).relative_error, rel=0.02)

    @pytest.mark.parametrize("scaling", [1e40, 1e-40, 1e300])
    def test_it_is_refused_before_the_work(self, scaling):
        def quantizer(*_: Any) -> Any:
            raise AssertionError

        with pytest.raises(InvalidArgumentError, match=r"^scaling must be between 1\.2e-38 and .* got 1e"):
            decompose(matrix(), FMT, 4, scaling=scaling, quantizer=quantizer)


# --- the error that is reported is that of the arrays that are returned


def exact_error(w: np.ndarray, found: np.ndarray, weights: np.ndarray) -> float:
    """Return the relative weighted error, computed in fractions, which neither round nor overflow."""

    def norm(array: np.ndarray) -> Fraction:
        return sum(
            (
                Fraction(float(own)) * Fraction(float(x)) ** 2
                for own, x in zip(weights.ravel(), array.ravel(), strict=True)
            ),
            Fraction(0),
        )

    total = norm(w)
    return float(norm(w.astype(np.float64) - found.astype(np.float64)) / total) ** 0.5 if total else 0.0


@st.composite
def wild(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return a small matrix and importance, with entries that differ by hundreds of orders of magnitude, and options."""
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_normal((rows, columns)) * np.exp(
        rng.standard_normal((rows, columns)) * draw(st.sampled_from([0, 10]))
    )
    weights = np.exp(rng.uniform(-1, 1, w.shape) * draw(st.sampled_from([0, 1, 700])))
    for array in (w, weights):
        array[rng.random(w.shape) < draw(st.sampled_from([0.0, 0.5]))] = 0.0
    with np.errstate(all="ignore"):
        w = (w * 10.0 ** draw(st.integers(-44, 37))).astype(draw(st.sampled_from([np.float32, np.float64])))
        weights = np.minimum(weights * 10.0 ** draw(st.integers(-300, 300)), 1e308)
    options = {
        "rank": draw(st.integers(0, min(rows, columns))),
        "init": draw(st.sampled_from(["svd", "quantize", "zero"])),
        "fit": draw(st.sampled_from(FITS)),
        "scaling": draw(st.sampled_from([1.0, 1.0, 1e-20, 1e10])),
    }
    return w, weights, options


def check_the_error(problem: tuple[np.ndarray, np.ndarray, dict[str, Any]], sweeps: int, fmt: str) -> None:
    w, weights, options = problem
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScaleUnderflowWarning)
            warnings.filterwarnings("ignore", message="weights must have entries above zero", category=UserWarning)
            weighting = Elementwise(weights, sweeps=sweeps)
            d = decompose(w, BlockFormat.parse(fmt), weighting=weighting, max_iter=2, **options)
    except LQLoRAError:
        return
    expected = exact_error(w, d.reconstruct(), np.ones_like(weights) if weighting.all_zero else weights)
    assert np.isfinite(d.reconstruct()).all()
    assert d.relative_error == pytest.approx(expected, rel=0.01, abs=1e-5)


FORMATS = ("nf3/16:float32", "nf2/8:u4/16:float32", "affine4/16:float32", "bof4s-16/16:float16", "nf4/16:bfloat16")


@given(problem=wild(), sweeps=st.integers(0, 2), fmt=st.sampled_from(FORMATS))
@settings(max_examples=12)
def test_the_error_is_that_of_the_reconstruction(problem, sweeps, fmt):
    check_the_error(problem, sweeps, fmt)


@pytest.mark.slow
@given(problem=wild(), sweeps=st.integers(0, 2), fmt=st.sampled_from(FORMATS))
@settings(max_examples=800)
def test_the_error_is_that_of_the_reconstruction_thoroughly(problem, sweeps, fmt):
    check_the_error(problem, sweeps, fmt)


def test_a_low_rank_part_that_overflows_is_not_used():
    # Entries of zero importance are free: sweeps let them grow beyond float64.
    w = np.array(
        [
            [-8.9238215e32, 7.5785437e31, 0.0, 0.0],
            [2.5941232e29, 4.5942248e34, 0.0, 0.0],
            [9.0836164e28, 0.0, -1.719646e29, 0],
        ]
    )
    weights = np.zeros((3, 4))
    weights[0, 0], weights[0, 3], weights[1, 3], weights[2, 1] = (
        2.08937558e-07,
        5.26014161e-08,
        1.01967671e-07,
        3.38593758e-07,
    )
    d = decompose(
        w,
        BlockFormat.parse("nf3/8:u4/16:float32"),
        3,
        weighting=Elementwise(weights, sweeps=2),
        max_iter=3,
        init="quantize",
    )
    assert np.isfinite(d.reconstruct()).all()
    assert d.relative_error == pytest.approx(exact_error(w, d.reconstruct(), weights), rel=0.01, abs=1e-5)


def test_quantization_alone_is_returned_if_the_scaling_makes_free_entries_overflow():
    w = np.array([[7e5, -70.0, -1.9e9, -1.6e7], [-13.0, 1.9e9, 2.4e14, -4e-2], [-1.5e9, -3e6, 2.2e10, -1.4e8]])
    weights = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    w, weighting = w.astype(np.float32), Elementwise(weights)
    for scaling in (1.0, 1e-20):
        d = decompose(w, BlockFormat.parse("nf3/16:float32"), 1, weighting=weighting, scaling=scaling, max_iter=2)
        assert np.isfinite(d.reconstruct()).all()
        assert d.relative_error == pytest.approx(exact_error(w, d.reconstruct(), weights), rel=1e-3)
    assert d.best == 0


class _Shrunk(ScaledWeighting):
    """A norm whose low-rank steps report a hundredth of their error, as if float32 did not hold their factors."""

    def check(self, shape):
        """Accept any matrix."""

    def element_weights(self):
        return None

    def _map(self, residual):
        return residual

    def _factors(self, svd, residual):  # noqa: ARG002
        return svd.left * 3.0, svd.right


def test_quantization_alone_is_returned_if_the_returned_factors_are_worse():
    w = matrix(0, *SMALL, np.float64)
    d = decompose(w, FMT, 2, weighting=_Shrunk(), max_iter=2)
    alone = decompose(w, FMT, 0)
    assert (d.best, d.relative_error) == (0, alone.relative_error)
    assert not d.lora_B.any()


# --- norms without a relative error


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_a_norm_that_is_not_finite_is_refused(value):
    class Bad(Uniform):
        def measured(self, matrix):
            return super().measured(matrix)._replace(squared_norm=value)

    with pytest.raises(NonFiniteError, match=rf"^weighting must give.*got {value!r}"):
        decompose(matrix(), FMT, 2, weighting=Bad())


def test_importance_of_zeros_of_the_matrix_needs_a_quantizer_that_keeps_them():
    w, weights = np.ones((4, 16)), np.zeros((4, 16))
    w[3], weights[3] = 0.0, 1.0
    weighting, fmt = Elementwise(weights), BlockFormat.parse("nf4/64:float32")
    assert decompose(w, fmt, 1, weighting=weighting, max_iter=2).relative_error == 0.0
    with pytest.raises(InvalidArgumentError, match=r"^weighting .* nonzero entry"):
        decompose(w, fmt, 1, weighting=weighting, quantizer=lambda target, _: quantize(target + 1, fmt))
