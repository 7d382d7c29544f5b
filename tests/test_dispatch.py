from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora._dispatch import Operation, Override, Takes, array_library, known_libraries, namespace, op
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from tests.strategies import on

LIBRARIES = {"numpy": "numpy", "torch": "torch", "array_api_strict": "array-api", "cupy": "cupy"}


#: Records of overrides of double(x, factor) that take every call, and none.
ALWAYS = {library: Takes({"x": ("float32", "float64")}) for library in ("numpy", "torch")}
NEVER = Takes({"x": ()})


def saying(word):
    """Return an override that is named by what it returns."""

    def function(*_):
        return word

    function.__name__ = word
    return function


@pytest.fixture
def double() -> Operation:
    @op
    def double(x, factor=2):
        """Multiply by two."""
        return namespace(x).multiply(x, factor)

    return double


def test_arrays_know_their_library(xp):
    expected = LIBRARIES[xp.__name__.removeprefix("array_api_compat.")]
    assert array_library(on(xp, np.zeros(2))) == expected


@pytest.mark.parametrize("value", [1.0, [1.0], (), "array", None, object(), np.float32, np])
def test_other_values_belong_to_no_library(value):
    assert array_library(value) is None
    with pytest.raises(UnsupportedArrayError, match="got"):
        namespace(np.zeros(1), value) if value is not None else namespace(value)


def test_scalars_of_numpy_are_arrays():
    assert array_library(np.float32(1)) == "numpy"


def test_the_namespace_is_that_of_the_arrays(xp):
    assert namespace(on(xp, np.zeros(2)), None).__name__ == xp.__name__


def test_arrays_of_two_libraries_do_not_mix(xp, strict):
    other = strict.ones(2) if xp.__name__ == "array_api_compat.numpy" else np.ones(2)
    with pytest.raises(MixedArraysError, match=r"^arrays must be of one library"):
        namespace(on(xp, np.ones(2)), other)


def test_arrays_on_two_devices_do_not_mix(torch):
    with pytest.raises(MixedArraysError, match=r"^arrays .* cpu and meta"):
        namespace(torch.ones(2), torch.ones(2, device="meta"))


def test_without_an_override_the_reference_runs(xp, double):
    x = on(xp, np.ones(2))
    assert double.select(x).implementation == "reference"
    assert "no override is registered" in double.select(x).reason
    assert bool(xp.all(double(x) == 2))


def test_an_override_runs_for_the_arguments_it_takes(double):
    takes = Takes({"x": ("float64",)}, condition=lambda factor: factor == 2, sentence="a factor of two")

    @double.register("numpy", takes=takes)
    def fast(x, factor=2):
        return "fast"

    assert double(np.ones(2)) == double(np.ones(2), factor=2) == double(x=np.ones(2)) == "fast"
    assert double(np.ones(2), factor=3).tolist() == [3.0, 3.0]
    assert double.select(np.ones(2)).implementation == "numpy.fast"
    declined = double.select(np.ones(2), factor=3)
    assert declined.implementation == "reference"
    assert declined.reason == "numpy.fast declined: it is for a factor of two."


@op
def scaled(x, y, bits):
    """Do nothing."""


TAKES = Takes({"x": ("float32", "bfloat16"), "y": ("uint8", None)}, bits=(2, 4), contiguous=("x",))
X, Y = np.ones(8, dtype=np.float32), np.ones(2, dtype=np.uint8)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((X, Y, 4), ""),
        ((X, None, 2), ""),
        ((X.astype(ml_dtypes.bfloat16), Y, 4), ""),
        ((X.astype(np.float16), Y, 4), "x is not of float32 or bfloat16"),
        ((X.astype(">f4"), Y, 4), "x is not of float32 or bfloat16"),
        ((None, Y, 4), "x is not a plain array of numpy"),
        ((X, [1, 1], 4), "y is not a plain array of numpy"),
        ((X, X, 4), "y is not of uint8"),
        ((X[::2], Y, 4), "x is not contiguous"),
        ((np.frombuffer(b"0" * 9, dtype=np.float32, count=2, offset=1), Y, 4), "x is not contiguous"),
        ((X, Y, 3), "bits is not among 2, 4"),
    ],
)
def test_a_record_tells_what_does_not_fit(arguments, reason):
    override = Override("here.fast", "numpy", len, TAKES, scaled.arguments)
    assert override.fault(arguments) == reason


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict"])
@given(data=st.data())
def test_a_call_takes_an_override_exactly_if_it_finds_no_fault(request, library, data):
    """The checks are written twice: for speed, and to word what does not fit."""
    xp = np if library == "numpy" else request.getfixturevalue({"array_api_strict": "strict"}.get(library, library))

    def draw_array():
        values = np.zeros(6, dtype=data.draw(st.sampled_from(["float32", "float64", "uint8"])))
        array = xp.asarray(values)
        return data.draw(st.sampled_from([array, array[::2], None, [0], np.zeros(2, np.float32)]))

    arguments = (xp.asarray(np.zeros(2, np.float32)), draw_array(), data.draw(st.integers(2, 4)))

    @op
    def planned(x, y, bits):
        return "reference"

    names = data.draw(st.lists(st.sampled_from(["float32", "uint8", None]), unique=True).map(tuple))
    takes = Takes(
        {"x": ("float32",), "y": names},
        bits=data.draw(st.sampled_from([None, (2, 4)])),
        memory=data.draw(st.sampled_from(["host", "device"])),
        contiguous=data.draw(st.sampled_from([(), ("y",)])),
        condition=data.draw(st.sampled_from([None, lambda bits: bits < 4, lambda y, x: y is not x, lambda: False])),
    )
    planned.register(library, takes=takes)(saying("fast"))
    (override,) = planned.overrides(library)
    # Libraries that are not registered have no plain arrays, so nothing asks for overrides of theirs.
    fits = not override.fault(arguments) and library in known_libraries()
    assert planned(*arguments) == ("fast" if fits else "reference")


def test_a_record_asks_where_tensors_are(torch):
    for memory, expected in (("host", ""), ("device", "x is not in the memory of the device")):
        takes = Takes({"x": ("float32",)}, memory=memory)
        override = Override("here.fast", "torch", len, takes, scaled.arguments)
        assert override.fault((torch.ones(2), None, 4)) == expected


@pytest.mark.parametrize(
    "takes", [Takes({"z": ("uint8",)}), Takes({}, contiguous=("x",)), Takes({"x": ("uint8",)}, bits=(4,))]
)
def test_a_record_names_arguments_that_there_are(double, takes):
    with pytest.raises(InvalidArgumentError, match=r"^takes of numpy\.fast declares (z|x|bits)"):
        double.register("numpy", takes=takes)(saying("fast"))


@pytest.mark.parametrize(
    ("condition", "wrong"),
    [(lambda _: True, "_"), (lambda x, bits=4: x is bits, "bits=4"), (lambda *rest: rest, r"\*rest")],
)
def test_a_condition_names_arguments_that_there_are(double, condition, wrong):
    takes = Takes({"x": ("float32",)}, condition=condition)
    with pytest.raises(InvalidArgumentError, match=f"^condition of numpy\\.fast has the parameter {wrong},"):
        double.register("numpy", takes=takes)(saying("fast"))


def test_a_condition_is_given_the_arguments_that_it_names():
    seen = []

    @op
    def planned(x, y, bits):
        return "reference"

    takes = Takes({"x": ("float32",)}, condition=lambda bits, y: bool(seen.append((bits, y))))
    planned.register("numpy", takes=takes)(saying("fast"))
    assert planned(X, "why", bits=3) == "reference"
    assert seen == [(3, "why")]


def test_the_first_override_that_takes_a_call_wins(double):
    double.register("numpy", takes=NEVER)(saying("never"))
    double.register("numpy", takes=ALWAYS["numpy"])(saying("first"))
    double.register("numpy", takes=ALWAYS["numpy"])(saying("second"))
    assert double(np.ones(2)) == "first"


def test_an_override_of_the_same_name_takes_the_place_of_the_earlier_one(double):
    for word, takes in (("first", ALWAYS["numpy"]), ("second", ALWAYS["numpy"]), ("first", NEVER)):
        double.register("numpy", takes=takes)(saying(word))
    assert [override.name for override in double.overrides("numpy")] == ["numpy.first", "numpy.second"]
    assert double(np.ones(2)) == "second"


def test_an_override_is_for_its_library_only(double, torch):
    double.register("torch", takes=ALWAYS["torch"])(saying("torch's"))
    assert double(torch.ones(2)) == "torch's"
    assert double(np.ones(2)).tolist() == [2.0, 2.0]


def test_forced_runs_the_reference(double):
    double.register("numpy", takes=ALWAYS["numpy"])(saying("fast"))
    with lq.forced("reference"):
        assert double(np.ones(2)).tolist() == [2.0, 2.0]
        assert "forced" in double.select(np.ones(2)).reason
    assert double(np.ones(2)) == "fast"


def test_forced_ends_with_an_error_too(double):
    double.register("numpy", takes=ALWAYS["numpy"])(saying("fast"))
    with pytest.raises(ZeroDivisionError), lq.forced("reference"):
        raise ZeroDivisionError
    assert double(np.ones(2)) == "fast"


def test_forced_holds_for_one_thread(double):
    double.register("numpy", takes=ALWAYS["numpy"])(saying("fast"))
    seen = []
    with lq.forced("reference"):
        thread = threading.Thread(target=lambda: seen.append(double(np.ones(2))))
        thread.start()
        thread.join()
    assert seen == ["fast"]


def test_forced_numpy_passes_over_compiled_kernels(double):
    compiled = saying("compiled")
    double.register("numpy", takes=ALWAYS["numpy"], backend="native")(compiled)
    double.register("numpy", takes=NEVER)(saying("never"))
    assert double(np.ones(2)) == "compiled"
    with lq.forced("numpy"):
        assert double(np.ones(2)).tolist() == [2.0, 2.0]
        reason = double.select(np.ones(2)).reason
        double.register("numpy", takes=ALWAYS["numpy"])(saying("other"))
        assert double(np.ones(2)) == "other"
    assert "native.compiled is passed over by forced(without='native')" in reason
    assert "numpy.never declined: x is not of any dtype" in reason


@pytest.mark.parametrize("without", ["mine", ("mine", "absent"), {"mine"}])
def test_forced_passes_over_any_backend_by_name(double, without):
    double.register("numpy", takes=ALWAYS["numpy"], backend="mine")(saying("mine"))
    double.register("numpy", takes=ALWAYS["numpy"])(saying("other"))
    assert double(np.ones(2)) == "mine"
    with lq.forced(without=without):
        assert double(np.ones(2)) == "other"
        assert double.select(np.ones(2)).implementation == "numpy.other"


def test_forced_refuses_other_words():
    with (
        pytest.raises(InvalidArgumentError, match=r"implementation.*'reference' or 'numpy'.*'torch'"),
        lq.forced("torch"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_two_calls_lead_to_an_implementation(request, library):
    xp = np if library == "numpy" else request.getfixturevalue(library)

    @op
    def planned(x, y, bits):
        return "reference"

    takes = replace(TAKES, condition=lambda x: x.shape == (8,), contiguous=("x", "y"))
    planned.register(library, takes=takes)(saying("fast"))
    arguments = (xp.asarray(X), xp.asarray(Y), 4)
    assert planned(*arguments) == "fast"
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        planned(*arguments)
    finally:
        sys.setprofile(None)
    assert calls == ["__call__", "_choice", "<lambda>", "function"]


def test_an_operation_looks_like_its_reference(double):
    assert (double.name, double.__name__, double.__doc__) == ("double", "double", "Multiply by two.")


@pytest.mark.parametrize("name", ["block_absmax", "decode", "encode", "pack_codes", "unpack_codes"])
def test_hot_operations_are_dispatched(name):
    assert isinstance(getattr(ops, name), Operation)


def test_explain_names_the_operations_there_are():
    with pytest.raises(InvalidArgumentError, match=r"operation.*add_low_rank, best_ratios.*'to_blocks'"):
        lq.backends.explain("to_blocks", np.zeros(1))


def test_available_tells_what_is_installed():
    found = lq.backends.available()
    assert list(found)[:3] == ["numpy", "torch", "cupy"]
    assert found["numpy"] == lq.backends.Availability(True, "installed")
    assert bool(found["cupy"]) is is_installed("cupy")


class Halves(NamedTuple):
    """Two halves of a row, and a factor."""

    left: Any
    right: Any
    factor: int = 1


@pytest.fixture
def joined() -> Operation:
    @op(record=("halves", Halves))
    def joined(halves, out):
        """Write both halves times the factor."""
        out[...] = namespace(halves.left).concat([halves.left, halves.right]) * halves.factor
        return out

    return joined


class TestRecords:
    HALVES = Halves(np.ones(2), np.zeros(3), 4)

    def test_checks_look_at_the_fields_and_functions_get_the_record(self, joined):
        seen, out = [], np.empty(5)
        takes = Takes({"left": ("float64",), "right": ("float64", None), "out": ("float64",)}, contiguous=("right",))

        @joined.register("numpy", takes=takes)
        def fast(halves, out):
            seen.append(halves)
            return out

        assert joined(self.HALVES, out) is out
        assert joined(halves=self.HALVES, out=out) is out
        assert [found is self.HALVES for found in seen] == [True, True]
        wrong = self.HALVES._replace(right=np.zeros(6)[::2])
        assert joined.select(wrong, out).reason == "numpy.fast declined: right is not contiguous."
        np.testing.assert_array_equal(joined(wrong, out), [4, 4, 0, 0, 0])

    def test_a_condition_may_name_fields_and_the_record(self, joined):
        def condition(out, halves, factor):
            return factor == halves.factor == 4 and len(out) == 5

        joined.register("numpy", takes=Takes({}, condition=condition, sentence="a factor of four"))(saying("fast"))
        assert joined(self.HALVES, np.empty(5)) == "fast"
        three = self.HALVES._replace(factor=3)
        assert joined.select(three, np.empty(5)).reason == "numpy.fast declined: it is for a factor of four."

    def test_a_condition_that_names_something_else_is_refused(self, joined):
        with pytest.raises(InvalidArgumentError, match=r"rest.*factor, out, halves"):
            joined.register("numpy", takes=Takes({}, condition=lambda rest: rest))(saying("fast"))

    def test_the_first_field_decides_the_library(self, joined, strict):
        joined.register("numpy", takes=Takes({}))(saying("fast"))
        parts = (strict.asarray(part) for part in self.HALVES[:2])
        assert joined.select(Halves(*parts), strict.zeros(5)).implementation == "reference"
