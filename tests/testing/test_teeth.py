"""check_quantizer: each property fails a quantizer with the fault it is named for, and passes one without faults."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora.testing import PROPERTIES, check_quantizer
from tests.testing import broken

OPTIONS = {"block_size": broken.BLOCK, "levels": broken.LEVELS, "ties_to": "lower"}

#: A large error fails these too, in every dtype.
FAR_OFF = ("error_bound", "float16", "bfloat16", "float64")

#: Faults, the property that finds each, and other properties that the fault necessarily violates.
FAULTS = [
    (broken.ForgetsTheShape, "shape", ("zero_dimensional", "empty")),
    (broken.OverflowsInHalfPrecision, "finite",
     ("power_of_two_scaling", "error_bound", "nearest_level", "tie_direction", "idempotence", "huge", "bfloat16", "float64")),
    (broken.WritesToTheInput, "input_unchanged", ()),
    (broken.DividesByZero, "zeros", ()),
    (broken.TakesZeroForTheSmallestScale, "zero_block", ()),
    (broken.ReadsMemoryOrder, "layout", ()),
    (broken.FloorsTheScale, "power_of_two_scaling", ()),
    (broken.TurnsSigns, "sign_kept", ("locality", "nearest_level", "idempotence", *FAR_OFF)),
    (broken.SharesAScale, "locality", ("nearest_level", *FAR_OFF)),
    (broken.LosesTheTail, "ragged_tail", ()),
    (broken.LosesTheLastOddCode, "odd_size", ()),
    (broken.NeedsTwoWeights, "one_element", ("zero_dimensional",)),
    (broken.RefusesNoDimensions, "zero_dimensional", ()),
    (broken.RefusesEmpty, "empty", ()),
    (broken.HalvesTheScale, "error_bound", ("tie_direction", "idempotence", *FAR_OFF)),
    (broken.RoundsDown, "nearest_level", FAR_OFF),
    (broken.TiesByPosition, "equal_weights", ("tie_direction",)),
    (broken.TiesUp, "tie_direction", ()),
    (broken.Shrinks, "idempotence", ()),
    (broken.AcceptsNaN, "non_finite_refused", ()),
    (broken.SpreadsNaN, "non_finite_contained", ("non_finite_refused",)),
    (broken.InvertsTheScale, "subnormal", ()),
    (broken.AddsTheEnds, "huge", ()),
    (broken.ReadsBitsOf, "float16", ()),
    (broken.ReadsBitsOfBfloat16, "bfloat16", ()),
    (broken.RefusesFloat64, "float64", ()),
    (broken.TakesIntegers, "integers_refused", ()),
]  # fmt: skip


def check(cls, **options):
    quantizer = cls()
    return check_quantizer(quantizer.quantize, quantizer.dequantize, **{**OPTIONS, **options})


@pytest.mark.slow
def test_a_quantizer_without_a_fault_passes_everything():
    report = check(broken.Correct)
    assert [f for f in report.findings if f.result != "passed"] == [report["sign_symmetry"]]
    assert report["sign_symmetry"].message == "needs symmetric"
    assert report.passed


def test_every_property_has_a_fault_of_its_own():
    others = {"deterministic", "sign_symmetry"}  # below
    assert {name for _, name, _ in FAULTS} | others == set(PROPERTIES)


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("fault", "name"), [fault[:2] for fault in FAULTS], ids=lambda value: getattr(value, "__name__", None)
)
def test_a_fault_is_found_by_the_property_named_for_it(fault, name):
    assert check(fault, only=[name]).failed == (name,)


#: What finds a fault only if the weights drawn happen to show it: for the second, one just below a boundary, which a
#: scale that is smaller rounds up.
SOMETIMES = {broken.SharesAScale: ["idempotence"], broken.Shrinks: ["nearest_level"]}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "name", "also"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_fault_is_found_by_the_properties_listed_and_no_others(fault, name, also):
    listed = [name, *also]
    assert set(check(fault, only=listed).failed) == set(listed)
    # A property that finds nothing draws all of its examples, and most properties are such.
    assert check(fault, exclude=[*listed, *SOMETIMES.get(fault, ())], max_examples=20).failed == ()


def test_a_quantizer_that_remembers_is_found():
    finding = check(broken.RemembersTheLastCall, only=["deterministic"]).findings[0]
    assert finding.result == "failed"
    assert finding.message.startswith("w = zeros except 1.0 at 0 (")
    assert "gave 1.0, but 0.5 in the second run (not in every run)" in finding.message


class Integers:
    """Symmetric integers, or those of two's complement with one more negative value."""

    def __init__(self, lowest):
        self.lowest = lowest

    def quantize(self, w):
        scale = max(abs(float(w.max())), abs(float(w.min())) * 7 / -self.lowest) / 7
        return np.clip(np.rint(w / (scale or 1)), self.lowest, 7), scale

    def dequantize(self, quantized):
        return quantized[0] * quantized[1]


@pytest.mark.parametrize(("lowest", "failed"), [(-7, ()), (-8, ("sign_symmetry",))])
def test_signs_are_compared_only_where_that_is_asked_for(lowest, failed):
    quantizer = Integers(lowest)
    report = check_quantizer(quantizer.quantize, quantizer.dequantize, symmetric=True, only=["sign_symmetry"])
    assert report.failed == failed


# --- what the counterexample says


def test_the_counterexample_is_small_and_can_be_replayed():
    finding = check(broken.LosesTheTail, only=["ragged_tail"]).findings[0]
    w = finding.counterexample["w"]
    assert (w.dtype, w.tolist()) == (np.float32, [0.0, 1.0])
    quantizer = broken.LosesTheTail()
    assert quantizer.dequantize(quantizer.quantize(w)).tolist() == [0.0, 0.0]
    assert finding.message.startswith("w = [0.0, 1.0] (float32, shape (2,)): weight 1.0 at index 1 gave 0.0, but 1.0")


def test_what_the_quantizer_raises_is_a_finding():
    report = check(broken.RefusesFloat64, only=["float64"])
    assert report["float64"].result == "failed"
    assert report["float64"].message.endswith("the quantizer raised TypeError: float64 is not supported.")


def test_the_same_run_gives_the_same_report():
    assert check(broken.TurnsSigns, only=["error_bound"]) == check(broken.TurnsSigns, only=["error_bound"])
