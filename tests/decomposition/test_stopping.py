"""Stopping rules of the alternation."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lqlora import decompose, dequantize, quantize
from tests.decomposition.cases import FMT, SMALL, contents, matrix


def test_it_stops_at_the_target():
    errors = decompose(matrix(), FMT, 8).errors
    target = (min(errors) + errors[1]) / 2
    d = decompose(matrix(), FMT, 8, target=target)
    assert d.stop_reason == "target"
    assert d.relative_error <= target
    assert all(error > target for error in d.errors[:-1])


@pytest.mark.parametrize("init", ["svd", "quantize"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_it_stops_after_max_iter(init, count):
    d = decompose(matrix(), FMT, 4, init=init, max_iter=count, rtol=0.0)
    assert d.stop_reason == "max_iter"
    # Entry 0 is quantization alone. With init="quantize", entry 1 is the first iterate.
    assert len(d.errors) == 1 + count + (init == "svd")


def test_it_stops_when_the_error_stops_falling():
    d = decompose(matrix(), FMT, 4, rtol=0.01)
    assert d.stop_reason == "converged"
    assert len(d.errors) < 102
    lowest = np.minimum.accumulate(d.errors)
    assert lowest[-4] - lowest[-1] < 0.01 * lowest[-1]


def test_it_stops_when_the_callback_returns_true():
    seen = []

    def watch(iteration, error):
        seen.append((iteration, error))
        return iteration == 2

    d = decompose(matrix(), FMT, 4, callback=watch)
    assert d.stop_reason == "callback"
    assert [iteration for iteration, _ in seen] == [0, 1, 2]
    assert len(d.errors) == 3
    # The factors of the best iterate are refitted afterwards.
    assert all(before == after for (index, before), after in zip(seen, d.errors, strict=True) if index != d.best)


@pytest.mark.parametrize("answer", [None, False, 0])
def test_a_callback_that_only_watches_changes_nothing(answer):
    assert contents(decompose(matrix(), FMT, 4, max_iter=3, callback=lambda *_: answer)) == contents(
        decompose(matrix(), FMT, 4, max_iter=3)
    )


def test_an_exception_of_a_callback_propagates():
    def interrupt(iteration, error):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(matrix(), FMT, 4, callback=interrupt)


def test_plain_alternation_without_a_tolerance_never_stops_early():
    d = decompose(matrix(), FMT, 4, extrapolation=0.0, rtol=0.0, max_iter=20)
    assert (d.stop_reason, len(d.errors)) == ("max_iter", 22)


@pytest.mark.parametrize("seed", range(3))
def test_without_a_tolerance_extrapolation_stops_where_a_plain_step_fails(seed):
    w, reasons = matrix(seed), set()
    d = decompose(w, FMT, 4, rtol=0.0, max_iter=60)
    reasons.add(d.stop_reason)
    assert reasons <= {"max_iter", "converged"}
    if d.stop_reason == "converged":
        assert d.errors[-1] >= d.relative_error
    else:
        assert len(d.errors) == 62


def test_it_stops_at_zero_error():
    rng = np.random.default_rng(0)
    levels = dequantize(quantize(rng.standard_normal(SMALL).astype(np.float32), FMT))
    d = decompose(levels, FMT, 4, init="quantize", rtol=0.0, max_iter=50)
    assert d.relative_error == 0.0
    assert d.stop_reason == "converged"
    assert len(d.errors) < 10


def test_it_stops_at_the_time_limit():
    seen = []
    d = decompose(matrix(), FMT, 4, time_limit=0.02, rtol=0.0, callback=lambda *_: seen.append(time.sleep(0.03)))
    assert d.stop_reason == "time_limit"
    assert len(seen) == len(d.errors) == 1
    # Only quantization alone was computed: it is returned, with fresh factors.
    assert not d.lora_B.any()


def test_a_generous_time_limit_changes_nothing():
    limited = decompose(matrix(), FMT, 4, max_iter=3, time_limit=1e9)
    assert contents(limited) == contents(decompose(matrix(), FMT, 4, max_iter=3))


def test_a_target_that_quantization_reaches_needs_no_factors():
    d = decompose(matrix(), FMT, 4, target=0.99)
    assert (d.stop_reason, len(d.errors), d.best) == ("target", 1, 0)
    assert not d.lora_B.any()


def test_a_target_out_of_reach_changes_nothing():
    assert contents(decompose(matrix(), FMT, 4, max_iter=4, target=0.0)) == contents(
        decompose(matrix(), FMT, 4, max_iter=4)
    )
