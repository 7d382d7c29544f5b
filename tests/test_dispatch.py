from __future__ import annotations

import threading

import numpy as np
import pytest

import lqlora as lq
from lqlora import ops
from lqlora._dispatch import Operation, array_library, namespace, op
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from tests.strategies import on

LIBRARIES = {"numpy": "numpy", "torch": "torch", "array_api_strict": "array-api", "cupy": "cupy"}


def always(*_, **__):
    return True


def never(*_, **__):
    return False


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


def test_an_override_runs_for_the_arguments_it_accepts(double):
    @double.register("numpy", accepts=lambda _, factor=2: factor == 2)
    def fast(x, factor=2):
        return "fast"

    assert double(np.ones(2)) == "fast"
    assert double(np.ones(2), factor=3).tolist() == [3.0, 3.0]
    assert double.select(np.ones(2)).implementation.endswith(".fast")
    declined = double.select(np.ones(2), factor=3)
    assert (declined.implementation, declined.reason) == ("reference", "numpy: 1 override(s) declined.")


def test_the_first_override_that_accepts_wins(double):
    double.register("numpy", accepts=never)(lambda _: "never")
    double.register("numpy", accepts=always)(lambda _: "first")
    double.register("numpy", accepts=always)(lambda _: "second")
    assert double(np.ones(2)) == "first"


def test_an_override_is_for_its_library_only(double, torch):
    double.register("torch", accepts=always)(lambda _: "torch's")
    assert double(torch.ones(2)) == "torch's"
    assert double(np.ones(2)).tolist() == [2.0, 2.0]


def test_forced_runs_the_reference(double):
    double.register("numpy", accepts=always)(lambda _: "fast")
    with lq.forced("reference"):
        assert double(np.ones(2)).tolist() == [2.0, 2.0]
        assert "forced" in double.select(np.ones(2)).reason
    assert double(np.ones(2)) == "fast"


def test_forced_ends_with_an_error_too(double):
    double.register("numpy", accepts=always)(lambda _: "fast")
    with pytest.raises(ZeroDivisionError), lq.forced("reference"):
        raise ZeroDivisionError
    assert double(np.ones(2)) == "fast"


def test_forced_holds_for_one_thread(double):
    double.register("numpy", accepts=always)(lambda _: "fast")
    seen = []
    with lq.forced("reference"):
        thread = threading.Thread(target=lambda: seen.append(double(np.ones(2))))
        thread.start()
        thread.join()
    assert seen == ["fast"]


def test_forced_knows_one_word():
    with pytest.raises(InvalidArgumentError, match="'reference' only, not 'numpy'"), lq.forced("numpy"):
        pytest.fail("the block must not run")


def test_an_operation_looks_like_its_reference(double):
    assert (double.name, double.__name__, double.__doc__) == ("double", "double", "Multiply by two.")


@pytest.mark.parametrize("name", ["block_absmax", "decode", "encode", "pack_codes", "unpack_codes"])
def test_hot_operations_are_dispatched(name):
    assert isinstance(getattr(ops, name), Operation)


def test_explain_names_the_operations_there_are():
    with pytest.raises(
        InvalidArgumentError,
        match="'to_blocks' is no operation; there are bin_sums, block_absmax, block_extremes, decode, encode",
    ):
        lq.backends.explain("to_blocks", np.zeros(1))


def test_available_tells_what_is_installed():
    found = lq.backends.available()
    assert list(found) == ["numpy", "torch", "cupy"]
    assert found["numpy"] is True
