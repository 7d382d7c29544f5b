from __future__ import annotations

import inspect
import threading

import ml_dtypes
import numpy as np
import pytest

import lqlora as lq
from lqlora import ops
from lqlora._dispatch import Operation, Override, Takes, array_library, namespace, op
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
    with pytest.raises(MixedArraysError, match="in one call: convert one"):
        namespace(on(xp, np.ones(2)), other)


def test_arrays_on_two_devices_do_not_mix(torch):
    with pytest.raises(MixedArraysError, match="cpu and meta in one call"):
        namespace(torch.ones(2), torch.ones(2, device="meta"))


def test_without_an_override_the_reference_runs(xp, double):
    x = on(xp, np.ones(2))
    assert double.select(x).implementation == "reference"
    assert "no override is registered" in double.select(x).reason
    assert bool(xp.all(double(x) == 2))


def test_an_override_runs_for_the_arguments_it_takes(double):
    takes = Takes({"x": ("float64",)}, condition=lambda _, factor: factor == 2, sentence="a factor of two")

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
        ((None, Y, 4), "x is no plain array of numpy"),
        ((X, [1, 1], 4), "y is no plain array of numpy"),
        ((X, X, 4), "y is not of uint8"),
        ((X[::2], Y, 4), "x is not contiguous"),
        ((np.frombuffer(b"0" * 9, dtype=np.float32, count=2, offset=1), Y, 4), "x is not contiguous"),
        ((X, Y, 3), "bits is none of 2, 4"),
    ],
)
def test_a_record_tells_what_does_not_fit(arguments, reason):
    override = Override("here.fast", "numpy", len, TAKES, inspect.signature(scaled.reference))
    assert override.fault(arguments) == reason


def test_a_record_asks_where_tensors_are(torch):
    for memory, expected in (("host", ""), ("device", "x is not in the memory of the device")):
        takes = Takes({"x": ("float32",)}, memory=memory)
        override = Override("here.fast", "torch", len, takes, inspect.signature(scaled.reference))
        assert override.fault((torch.ones(2), None, 4)) == expected


@pytest.mark.parametrize(
    "takes", [Takes({"z": ("uint8",)}), Takes({}, contiguous=("x",)), Takes({"x": ("uint8",)}, bits=(4,))]
)
def test_a_record_names_arguments_that_there_are(double, takes):
    with pytest.raises(InvalidArgumentError, match=r"\.fast declares (z|x|bits), which is no array argument"):

        @double.register("numpy", takes=takes)
        def fast(x, factor):
            pytest.fail("it must not be registered")


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
    assert reason == ("native.compiled is passed over by forced('numpy'); numpy.never declined: x is not of any dtype.")


def test_forced_knows_two_words():
    with pytest.raises(InvalidArgumentError, match="'reference' and 'numpy', not 'torch'"), lq.forced("torch"):
        pytest.fail("the block must not run")


def test_an_operation_looks_like_its_reference(double):
    assert (double.name, double.__name__, double.__doc__) == ("double", "double", "Multiply by two.")


@pytest.mark.parametrize("name", ["block_absmax", "decode", "encode", "pack_codes", "unpack_codes"])
def test_hot_operations_are_dispatched(name):
    assert isinstance(getattr(ops, name), Operation)


def test_explain_names_the_operations_there_are():
    with pytest.raises(
        InvalidArgumentError,
        match="'to_blocks' is no operation; there are add_low_rank, best_ratios, bin_sums, block_absmax, block_extremes, copy_across, decode, encode",
    ):
        lq.backends.explain("to_blocks", np.zeros(1))


def test_available_tells_what_is_installed():
    found = lq.backends.available()
    assert list(found)[:3] == ["numpy", "torch", "cupy"]
    assert found["numpy"] == lq.backends.Availability(True, "installed")
    assert bool(found["cupy"]) is is_installed("cupy")
