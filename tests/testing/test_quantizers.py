"""check_quantizer: its options, its findings, and the printed report."""

from __future__ import annotations

import sys

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
        ({"block_size": 0}, r"block_size.*got 0"),
        ({"block_size": True}, r"block_size.*got True"),
        ({"block_size": 6.0}, r"block_size.*got 6\.0"),
        ({"size_multiple": None}, r"size_multiple.*got None"),
        ({"levels": [1.0]}, r"levels.*\[1\.\]"),
        ({"levels": [1.0, 0.0]}, r"levels.*\[1\., 0\.\]"),
        ({"levels": [0.0, np.inf]}, r"levels.*inf"),
        ({"ties_to": "even"}, r"ties_to.*'even'"),
        ({"tolerance": -1.0}, r"^tolerance.*got -1\.0"),
        ({"scale_tolerance": np.nan}, r"scale_tolerance.*got nan"),
        ({"smallest": 0.0}, r"smallest.*got 0\.0"),
        ({"largest": 0.5}, r"largest.*got 0\.5"),
        ({"max_examples": 0}, r"max_examples.*got 0"),
        ({"only": ["shap"]}, r"only.*'shap'.*shape"),
        ({"exclude": ["zeroes", "shape"]}, r"exclude.*'zeroes'.*zeros"),
        ({"only": "shape"}, r"only.*list.*'shape'"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        check_quantizer(same, same, **options)


def test_nothing_is_run_when_an_option_is_wrong():
    with pytest.raises(InvalidArgumentError):
        check_quantizer(pytest.fail, same, exclude=["none such"])


def test_properties_are_selected_by_name():
    report = check_quantizer(same, same, only={"zeros", "shape"}, max_examples=5)
    assert [f.name for f in report.findings] == ["shape", "zeros"]
    assert report.findings[0].statement == PROPERTIES["shape"]


@pytest.mark.parametrize("properties", [PROPERTIES, SOLVER_PROPERTIES, BACKEND_PROPERTIES])
def test_every_statement_is_one_line_that_fits_a_report(properties):
    for name, statement in properties.items():
        assert "\n" not in statement, name
        assert statement.endswith("."), name


def test_excluded_properties_are_listed_as_skipped():
    report = check_quantizer(same, same, exclude=["shape"], max_examples=5)
    assert list(PROPERTIES) == [f.name for f in report.findings]
    assert (report["shape"].result, report["shape"].message) == ("skipped", "excluded")


def test_properties_are_skipped_without_the_options_they_need():
    report = check_quantizer(same, same, independent_blocks=False, max_examples=5)
    reasons = {f.name: f.message for f in report.findings if f.result == "skipped"}
    assert reasons["locality"] == "needs block_size and independent_blocks"
    assert reasons["nearest_level"] == "needs block_size and levels"
    assert reasons["odd_size"] == reasons["idempotence"] == "needs independent_blocks"


def test_levels_without_a_zero_may_change_signs():
    report = check_quantizer(same, same, levels=[-1.0, 0.5, 1.0], only=["sign_kept"])
    assert report["sign_kept"].message == "the levels have no zero"


def test_sizes_are_multiples_except_in_properties_about_sizes():
    sizes = set()

    def quantize(w):
        sizes.add(w.size)
        return w

    others = ["ragged_tail", "odd_size", "one_element", "zero_dimensional", "empty"]
    check_quantizer(quantize, same, block_size=4, size_multiple=6, exclude=others, max_examples=3)
    assert sizes
    assert all(size % 12 == 0 for size in sizes)
    sizes.clear()
    check_quantizer(quantize, same, block_size=4, size_multiple=6, only=others, max_examples=3)
    assert {0, 1, 2, 3} <= sizes


def test_an_adapt_function_that_raises_is_not_a_failure_of_the_quantizer():
    def adapt(w):
        raise TypeError("no arrays, thank you")

    report = check_quantizer(same, same, adapt=adapt, max_examples=5, only=["shape", "float16", "layout"])
    assert [(f.result, f.message) for f in report.findings] == [
        ("error", "adapt() raised TypeError: no arrays, thank you."),
        ("skipped", "adapt() refuses strided arrays"),
        ("skipped", "adapt() refuses float16"),
    ]
    assert not report.passed
    assert report.failed == ("shape",)


def test_a_result_that_is_not_an_array_is_a_finding():
    report = check_quantizer(same, lambda _: "text", only=["shape"])
    assert report["shape"].result == "failed"
    assert "the quantizer raised ValueError" in report["shape"].message


def test_another_number_of_weights_is_a_finding():
    report = check_quantizer(same, lambda w: w[:-1], only=["finite"])
    assert report["finite"].message.endswith("2 weights gave 1 results.")


def test_results_may_be_lists():
    assert check_quantizer(lambda w: w.tolist(), same, only=["shape", "odd_size", "layout"], max_examples=10).passed


def test_warnings_of_the_quantizer_are_ignored():
    def warns(w):
        np.log(w)  # of zero
        return w

    assert check_quantizer(warns, same, only=["zeros"], max_examples=5).passed


def test_max_examples_is_obeyed_and_inputs_repeat_unless_derandomize_is_false():
    def inputs(**options):
        seen = []
        check_quantizer(lambda w: seen.append(w.tobytes()) or w, same, only=["shape"], max_examples=20, **options)
        return seen

    assert len(inputs()) <= 20
    assert inputs() == inputs()
    assert inputs(derandomize=False) != inputs(derandomize=False)


def test_assert_raises_the_report_as_an_assertion():
    with pytest.raises(ConformanceError, match=r"^quantizer fails shape\.\nshape +FAILED") as caught:
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


def test_without_hypothesis_the_import_names_the_extra(monkeypatch):
    import importlib

    monkeypatch.setattr("lqlora._optional.is_installed", lambda _: False)
    for name in [name for name in sys.modules if name.startswith("lqlora.testing")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"lqlora\.testing.*\[testing\]"):
        importlib.import_module("lqlora.testing")
