"""Each property fails a backend with the fault it is named for, and passes one without."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lqlora import backends, ops
from lqlora._dispatch import Takes, libraries
from lqlora.errors import ConformanceError, InvalidArgumentError, MissingDependencyError
from lqlora.testing import BACKEND_PROPERTIES, assert_backend_conforms, check_backend
from lqlora.testing.backends._subject import operations
from tests.testing import broken_backends as broken
from tests.testing.broken_backends import planted

#: The operation, the fault, and the properties that are named for it.
FAULTS = [
    ("encode", broken.takes_the_upper_code_at_a_tie, ["boundaries"]),
    ("encode", broken.multiplies_by_the_reciprocal, ["boundaries"]),
    ("encode", broken.adds_the_zero_point_before_it_rounds, ["boundaries"]),
    ("encode", broken.divides_by_zero_scales, ["special_values"]),
    ("encode", broken.flushes_subnormals, ["special_values"]),
    ("encode", broken.knows_full_codebooks_only, ["levels"]),
    ("decode", broken.reads_zero_points_as_signed, ["zero_points", "combinations"]),
    ("pack_codes", broken.returns_integers_of_the_machine, ["ordinary", "quantize"]),
    ("decode", broken.drops_the_last_code_of_a_broken_byte, ["tails", "combinations", "dequantize"]),
    ("decode", broken.decodes_five_bits_as_four, ["bits", "combinations"]),
    ("decode", broken.rounds_once_to_16_bits, ["rounding"]),
    ("decode", broken.truncates_to_16_bits, ["dtypes", "rounding", "dequantize"]),
    ("block_absmax", broken.passes_over_nan, ["non_finite"]),
    ("block_absmax", broken.takes_blocks_of_one_for_pairs, ["block_sizes"]),
    ("block_absmax", broken.needs_an_entry, ["empty"]),
    ("unpack_codes", broken.forgets_to_mask_the_last_code, ["unused_bits"]),
    ("block_absmax", broken.takes_absolute_values_in_place, ["input_unchanged"]),
    ("decode", broken.drops_the_end_of_a_piece, ["large"]),
    ("block_absmax", broken.reads_memory_in_a_row, ["layout"]),
    ("block_absmax", broken.assumes_aligned_memory, ["layout"]),
    ("unpack_codes", broken.KeepsResults(), ["own_memory"]),
    ("unpack_codes", broken.returns_its_argument, ["own_memory"]),
    ("bin_sums", broken.CountsItsCalls(), ["deterministic"]),
    ("unpack_codes", broken.HasOneWorkspace(), ["threads"]),
    ("decode", broken.takes_what_it_is_given, ["mixed_libraries"]),
    ("decode", broken.fills_up_scales, ["too_short"]),
    ("matmul_packed", broken.forgets_zero_points, ["exact_products"]),
    ("matmul_packed", broken.shortens_scales, ["products"]),
]


def test_a_backend_without_a_fault_passes_everything():
    with planted("encode", broken.correct):
        report = assert_backend_conforms("numpy", operations=["encode"], max_examples=20, exclude=["products"])
    assert {finding.result for finding in report.findings} == {"passed", "skipped"}


@pytest.mark.parametrize(("name", "fault", "found_by"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_fault_is_found_by_the_properties_named_for_it(name, fault, found_by):
    takes = broken.CARELESS if fault is broken.takes_what_it_is_given else None
    with planted(name, fault, takes):
        report = check_backend("numpy", only=found_by, shrink=False)  # the smallest example takes longest
    assert report.failed == tuple(p for p in BACKEND_PROPERTIES if p in found_by)


def test_every_property_has_a_fault_of_its_own():
    assert {name for _, _, names in FAULTS for name in names} == set(BACKEND_PROPERTIES)


def test_every_operation_has_examples_of_one_kind():
    for operation in operations().values():
        assert (operation.examples is None) is not (operation.products is None)


def test_an_override_that_another_one_hides_is_checked_too():
    with planted("decode", broken.decodes_five_bits_as_four), planted("decode", broken.drops_the_end_of_a_piece):
        report = check_backend("numpy", only=["bits"])
    assert report.failed == ("bits",)
    assert "numpy.decodes_five_bits_as_four returned" in report["bits"].message


def test_the_counterexample_is_small_and_can_be_replayed():
    with planted("decode", broken.drops_the_last_code_of_a_broken_byte):
        finding = check_backend("numpy", only=["tails"])["tails"]
    case = finding.counterexample["case"]
    assert finding.message.startswith("case = Blocks(seed=")
    assert "where the reference has" in finding.message
    packed, *_, out, _ = case.arguments("decode")
    assert case.count == len(out) <= 3
    assert packed.nbytes == ops.packed_size(case.count, case.bits)


def test_what_an_override_raises_is_a_finding():
    with planted("block_absmax", broken.needs_an_entry):
        message = check_backend("numpy", only=["empty"])["empty"].message
    assert "numpy.needs_an_entry raised IndexError" in message


def test_a_library_that_is_registered_inherits_the_properties(strict, monkeypatch):
    monkeypatch.setattr(libraries, "_LIBRARIES", dict(libraries._LIBRARIES))
    backends.register("array_api_strict", arrays=("array_api_strict._array_object:Array",))

    def absmax(flat, block_size):
        return strict.asarray(broken.reference("block_absmax", np.asarray(flat), block_size))

    ops.block_absmax.register("array_api_strict", takes=Takes({"flat": ("float32", "float64")}))(absmax)
    try:
        assert backends.explain("block_absmax", strict.ones(3), 2).implementation == "array_api_strict.absmax"
        assert_backend_conforms("array_api_strict", operations=["block_absmax", "encode"], max_examples=5)
    finally:
        ops.block_absmax._overrides.pop("array_api_strict")
        monkeypatch.undo()
        libraries.forget()


def test_a_failure_is_an_assertion_that_shows_the_report():
    with (
        planted("block_absmax", broken.needs_an_entry),
        pytest.raises(ConformanceError, match=r"^backend fails empty\.\nempty"),
    ):
        assert_backend_conforms("numpy", only=["empty"])


def test_bad_arguments_are_refused():
    for library in (3, math, "json"):
        with pytest.raises(InvalidArgumentError, match="namespace of arrays"):
            check_backend(library)
    with pytest.raises(InvalidArgumentError, match="chosen from add_low_rank"):
        check_backend("numpy", operations=["abacus"])
    with pytest.raises(InvalidArgumentError, match=r"only.*abacus"):
        check_backend("numpy", only=["abacus"])
    with pytest.raises(MissingDependencyError, match="no_such_library"):
        check_backend("no_such_library")
