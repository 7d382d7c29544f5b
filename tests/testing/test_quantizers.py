"""Options, and what a report says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lqlora.errors import ConformanceError, InvalidArgumentError, LQLoRAError, MissingDependencyError
from lqlora.testing import (
    BACKEND_PROPERTIES,
    PROPERTIES,
    SOLVER_PROPERTIES,
    Finding,
    Report,
    assert_quantizer_conforms,
    check_quantizer,
)


def same(w):
    return w


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is an integer of at least 1, not 0."),
        ({"block_size": True}, "block_size is an integer of at least 1, not True."),
        ({"block_size": 6.0}, "block_size is an integer of at least 1, not 6.0."),
        ({"size_multiple": None}, "size_multiple is an integer of at least 1, not None."),
        ({"levels": [1.0]}, "Levels are two or more finite numbers, each above the one before."),
        ({"levels": [1.0, 0.0]}, "Levels are two or more finite numbers, each above the one before."),
        ({"levels": [0.0, np.inf]}, "Levels are two or more finite numbers, each above the one before."),
        ({"ties_to": "even"}, "Ties go to 'lower' or 'upper', not 'even'."),
        ({"tolerance": -1.0}, "A tolerance is a number, not negative."),
        ({"scale_tolerance": np.nan}, "A tolerance is a number, not negative."),
        ({"smallest": 0.0}, "The range of weights must lie in 2\\*\\*-126 to 2\\*\\*127, and reach from 1/4 to 1."),
        ({"largest": 0.5}, "The range of weights must lie in 2\\*\\*-126 to 2\\*\\*127, and reach from 1/4 to 1."),
        ({"max_examples": 0}, "At least one example is tried, not 0."),
        ({"only": ["shap"]}, "not shap.$"),
        ({"exclude": ["zeroes", "shape"]}, "not zeroes.$"),
        ({"only": "shape"}, "Names of properties come in a list, not as the text 'shape'."),
    ],
)
def test_options_are_checked_in_one_sentence(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        check_quantizer(same, same, **options)


def test_nothing_is_run_when_an_option_is_wrong():
    with pytest.raises(InvalidArgumentError):
        check_quantizer(pytest.fail, same, exclude=["none such"])


def test_properties_are_selected_by_name():
    report = check_quantizer(same, same, only={"zeros", "shape"}, max_examples=5)
    assert [f.name for f in report.findings] == ["shape", "zeros"]
    assert report.findings[0].statement == PROPERTIES["shape"] == "What comes back has the shape of the input."


def test_the_reference_lists_every_promise():
    page = (Path(__file__).parents[2] / "docs/reference/testing.md").read_text(encoding="utf-8")
    promises = [*PROPERTIES.items(), *SOLVER_PROPERTIES.items(), *BACKEND_PROPERTIES.items()]
    assert [name for name, promise in promises if f"| `{name}` | {promise}" not in page] == []


def test_excluded_properties_are_listed_as_skipped():
    report = check_quantizer(same, same, exclude=["shape"], max_examples=5)
    assert list(PROPERTIES) == [f.name for f in report.findings]
    assert (report["shape"].result, report["shape"].message) == ("skipped", "excluded")


def test_what_an_option_is_needed_for_is_skipped_without_it():
    report = check_quantizer(same, same, independent_blocks=False, max_examples=5)
    reasons = {f.name: f.message for f in report.findings if f.result == "skipped"}
    assert reasons["locality"] == "needs block_size and independent_blocks"
    assert reasons["nearest_level"] == "needs block_size and levels"
    assert reasons["odd_size"] == reasons["idempotence"] == "needs independent_blocks"


def test_levels_without_a_zero_may_turn_signs():
    report = check_quantizer(same, same, levels=[-1.0, 0.5, 1.0], only=["sign_kept"])
    assert report["sign_kept"].message == "the levels have no zero"


def test_sizes_keep_to_a_multiple_but_where_that_is_the_matter():
    sizes = set()

    def quantize(w):
        sizes.add(w.size)
        return w

    others = ["ragged_tail", "odd_size", "one_element", "zero_dimensional", "empty"]
    check_quantizer(quantize, same, block_size=4, size_multiple=6, exclude=others, max_examples=10)
    assert sizes
    assert all(size % 12 == 0 for size in sizes)
    sizes.clear()
    check_quantizer(quantize, same, block_size=4, size_multiple=6, only=others, max_examples=10)
    assert {0, 1, 2, 3} <= sizes


def test_an_adapter_that_raises_is_no_fault_of_the_quantizer():
    def adapt(w):
        raise TypeError("no arrays, thank you")

    report = check_quantizer(same, same, adapt=adapt, max_examples=5, only=["shape", "float16", "layout"])
    assert [(f.result, f.message) for f in report.findings] == [
        ("error", "adapt() raised TypeError: no arrays, thank you."),
        ("skipped", "adapt() takes no strided array"),
        ("skipped", "adapt() takes no float16"),
    ]
    assert not report.passed
    assert report.failed == ("shape",)


def test_what_is_no_array_is_a_finding():
    report = check_quantizer(same, lambda _: "text", only=["shape"])
    assert report["shape"].result == "failed"
    assert "the quantizer raised ValueError" in report["shape"].message


def test_another_number_of_weights_is_a_finding():
    report = check_quantizer(same, lambda w: w[:-1], only=["finite"])
    assert report["finite"].message.endswith("2 weights became 1.")


def test_lists_are_arrays_too():
    assert check_quantizer(lambda w: w.tolist(), same, only=["shape", "odd_size", "layout"], max_examples=10).passed


def test_warnings_of_the_quantizer_are_no_fault():
    def warns(w):
        np.log(w)  # of zero
        return w

    assert check_quantizer(warns, same, only=["zeros"], max_examples=5).passed


def test_numbers_of_examples_are_obeyed_and_inputs_differ_only_if_asked():
    def inputs(**options):
        seen = []
        check_quantizer(lambda w: seen.append(w.tobytes()) or w, same, only=["shape"], max_examples=20, **options)
        return seen

    assert len(inputs()) <= 20
    assert inputs() == inputs()
    assert inputs(derandomize=False) != inputs(derandomize=False)


def test_assert_raises_the_report_as_an_assertion():
    with pytest.raises(ConformanceError, match=r"^The quantizer fails shape\.\nshape +FAILED") as caught:
        assert_quantizer_conforms(np.ravel, same, only=["shape"])
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, LQLoRAError)


def test_assert_returns_the_report():
    assert assert_quantizer_conforms(same, same, only=["shape"], max_examples=5).passed


def test_a_report_counts_and_wraps():
    report = Report((Finding("a", "Promise.", "passed"), Finding("bcd", "Other.", "error", "word " * 40)))
    lines = str(report).splitlines()
    assert lines[0] == "a    passed  Promise."
    assert lines[1] == "bcd  ERROR   Other."
    assert lines[-1] == "1 passed, 1 error."
    assert max(map(len, lines)) <= 100


def test_a_finding_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError):
        Report(())["shape"]


def test_without_hypothesis_the_error_is_a_sentence(monkeypatch):
    import importlib

    monkeypatch.setattr("lqlora._optional.is_installed", lambda _: False)
    for name in [name for name in sys.modules if name.startswith("lqlora.testing")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        MissingDependencyError, match=r"^lqlora\.testing needs hypothesis: pip install 'lqlora\[testing\]'\.$"
    ):
        importlib.import_module("lqlora.testing")
