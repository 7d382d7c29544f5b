from __future__ import annotations

import array_api_compat
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from lqlora.errors import LQLoRAError, UnsupportedArrayError
from lqlora.ops import convert, dtype_name, is_on_host, storage_cast, stored_bytes, widen
from lqlora.testing.strategies import weights
from tests.oracles.quantize import STORAGE
from tests.strategies import host, on, on_device, scale_dtypes

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@given(w=weights())
def test_storage_rounds_to_nearest_even_on_every_library(xp, w):
    for dtype in scale_dtypes(xp):
        with np.errstate(over="ignore", under="ignore"):
            expected = w.astype(STORAGE[dtype])
        assert host(storage_cast(on(xp, w), dtype)).tobytes() == expected.tobytes()


@given(w=weights())
def test_widening_is_exact(xp, w):
    for dtype in scale_dtypes(xp):
        with np.errstate(over="ignore", under="ignore"):
            narrow = w.astype(STORAGE[dtype])
        wide = host(widen(on(xp, narrow)))
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, narrow.astype(np.float32))


def test_float64_stays_float64(xp):
    assert dtype_name(widen(on(xp, np.ones(2)))) == "float64"


def test_dtypes_have_the_same_name_everywhere(xp):
    for dtype in (*scale_dtypes(xp), "float64"):
        assert dtype_name(on(xp, np.ones(2, dtype=STORAGE.get(dtype, np.float64)))) == dtype
    assert dtype_name(on(xp, np.ones(2, dtype=np.uint8))) == "uint8"


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex64])
def test_other_dtypes_are_refused_by_name(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match=rf"^The weight.*float16.*got {np.dtype(dtype).name}\."):
        widen(on(xp, np.ones(2, dtype=dtype)), "The weight")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_library_without_narrow_floats_is_told_so(dtype, strict):
    with pytest.raises(UnsupportedArrayError, match=f"^dtype {dtype}.*array_api_strict"):
        storage_cast(strict.ones(2), dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8", ""])
def test_storage_in_other_dtypes_is_refused(xp, dtype):
    with pytest.raises(LQLoRAError):
        storage_cast(on(xp, np.ones(2, dtype=np.float32)), dtype)


def test_the_message_is_a_sentence_whatever_the_array_is_called():
    for what in ("array", "the array", "q_proj"):
        with pytest.raises(UnsupportedArrayError) as caught:
            widen(np.ones(2, dtype=np.int64), what)
        assert "the the" not in str(caught.value).lower()


def test_bytes_are_counted(xp):
    for dtype in (*scale_dtypes(xp), "float64"):
        assert stored_bytes(on(xp, np.ones((2, 3), dtype=STORAGE.get(dtype, np.float64)))) == 6 * BYTES[dtype]
    assert stored_bytes(on(xp, np.ones((2, 0), dtype=np.uint8))) == 0


@given(w=weights())
def test_conversion_keeps_every_bit(xp, w):
    for dtype in scale_dtypes(xp):
        with np.errstate(over="ignore", under="ignore"):
            array = w.astype(STORAGE[dtype])
        there = convert(array, xp)
        back = convert(there, np)
        assert type(back) is np.ndarray
        assert (dtype_name(there), tuple(there.shape)) == (dtype, array.shape)
        assert host(there).tobytes() == back.tobytes() == array.tobytes()


def test_conversion_takes_arrays_that_are_read_only(xp):
    array = np.arange(3, dtype=np.float32)
    array.flags.writeable = False
    assert host(convert(array, xp)).tolist() == [0.0, 1.0, 2.0]


def test_conversion_takes_negative_strides(xp):
    assert host(convert(np.arange(3, dtype=np.float32)[::-1], xp)).tolist() == [2.0, 1.0, 0.0]


def test_conversion_to_a_library_without_the_dtype_is_refused(strict):
    with pytest.raises(UnsupportedArrayError):
        convert(np.ones(2, dtype=ml_dtypes.bfloat16), strict)


def test_conversion_between_two_libraries_detaches(torch):
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert convert(parameter, np).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lazily_negated_tensors_are_resolved(torch, dtype):
    negated = torch._neg_view(torch.arange(3.0).to(getattr(torch, dtype)))
    assert convert(negated, np).astype(float).tolist() == [0.0, -1.0, -2.0]
    there = convert(negated, torch)
    assert (there.is_neg(), there.tolist()) == (False, [0.0, -1.0, -2.0])


def test_arrays_stay_on_their_device_unless_another_is_named(strict):
    home, away = strict.Device("CPU_DEVICE"), strict.Device("device1")
    array = strict.ones(2, device=away)
    assert convert(array, strict).device == away
    assert convert(array, strict, home).device == home
    assert convert(strict.ones(2), strict, away).device == away
    assert convert(np.ones(2), strict, away).device == away


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_tensors_stay_on_their_device_unless_another_is_named(torch, dtype):
    tensor = torch.ones((2, 3), dtype=getattr(torch, dtype), device="meta").T
    for namespace in (torch, array_api_compat.torch):
        there = convert(tensor, namespace)
        assert (there.device.type, there.dtype, tuple(there.shape)) == ("meta", tensor.dtype, (3, 2))
        assert there.is_contiguous()
    assert convert(torch.ones(2), torch, "meta").device.type == "meta"
    assert convert(np.ones(2), torch, "meta").device.type == "meta"
    assert convert(torch.ones(2), torch).device.type == "cpu"


def test_conversion_within_a_library_detaches_and_copies_nothing(torch):
    parameter = torch.nn.Parameter(torch.ones(2))
    there = convert(parameter, torch)
    assert not there.requires_grad
    assert there.data_ptr() == parameter.data_ptr()


@pytest.mark.gpu
def test_tensors_on_a_device_stay_there(cuda_torch):
    tensor = cuda_torch.arange(6, device="cuda").reshape(2, 3)
    assert convert(tensor, cuda_torch).data_ptr() == tensor.data_ptr()
    assert convert(tensor, cuda_torch, "cpu").device.type == "cpu"
    assert convert(tensor, np).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_host_is_told_from_other_devices(xp, strict):
    array = on(xp, np.ones(2))
    assert is_on_host(array) is not on_device(array)
    assert not is_on_host(strict.ones(2, device=strict.Device("device1")))


def test_tensors_without_memory_are_not_on_the_host(torch):
    assert not is_on_host(torch.zeros(2, device="meta"))
