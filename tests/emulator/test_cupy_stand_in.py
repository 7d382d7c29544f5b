"""The stand-in refuses arguments that CuPy refuses, and those that CuPy passes on and a kernel then reads wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import build as emulator
from tests.emulator.cupy_stand_in import CuPyStandIn
from tests.requirements import require_or_skip

TEXT = """template <class T> __global__ void __launch_bounds__(64) fill(T* x, T value, int count, long long step) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) x[i * step] = value; }"""


@pytest.fixture
def cupy():
    require_or_skip("g++", emulator.is_available())
    return CuPyStandIn({})


@pytest.fixture
def fill(cupy):
    return compiled(cupy).get_function("lowered fill<float>")


def compiled(cupy):
    nvrtc, module = cupy.cuda.nvrtc, cupy.cuda.Module()
    program = nvrtc.createProgram(TEXT, "lqlora.cu", (), ())
    nvrtc.addNameExpression(program, "fill<float>")
    nvrtc.compileProgram(program, ("--fmad=false",))
    module.load(nvrtc.getCUBIN(program))
    return module


def right(cupy):
    return [cupy.empty(10, dtype="float32"), np.float32(2.5), np.int32(10), np.int64(1)]


def test_a_right_launch_runs(cupy, fill):
    arguments = right(cupy)
    assert 2.5 not in arguments[0].get()
    fill((1,), (32,), tuple(arguments))
    assert arguments[0].get().tolist() == [2.5] * 10
    assert cupy.launched == [("fill<float>", (1,), (32,))]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, 2.5, "argument 1 is float64, the parameter is f4"),
        (1, np.float64(2.5), "argument 1 is float64"),
        (1, np.int32(2), "argument 1 is int32"),
        (0, 10, "argument 0 is 10, not the address"),
        (2, 10, "argument 2 is 10, not the address of lent memory"),
        (2, True, "argument 2 is int64"),
        (3, np.int32(1), "argument 3 is int32, the parameter is i8"),
        (0, np.zeros(10, np.float32), "Unsupported type"),
        (0, None, "Unsupported type"),
        (0, np.int64(0), "argument 0 is int64, the parameter is p4"),
    ],
)
def test_what_is_no_such_number_or_array_is_refused(cupy, fill, position, value, message):
    arguments = right(cupy)
    arguments[position] = value
    with pytest.raises(TypeError, match=message):
        fill((1,), (32,), tuple(arguments))


def test_arrays_of_other_sizes_or_with_gaps_are_refused(cupy, fill):
    _, *rest = right(cupy)
    with pytest.raises(TypeError, match=r"float64.*p4"):
        fill((1,), (32,), (cupy.empty(10, dtype="float64"), *rest))
    with pytest.raises(ValueError, match="not contiguous"):
        fill((1,), (32,), (cupy.empty(20, dtype="float32")[::2], *rest))
    with pytest.raises(TypeError, match="4 parameters, not 3"):
        fill((1,), (32,), tuple(rest))


@pytest.mark.parametrize(("grid", "block"), [((1,), (65,)), ((0,), (32,)), ((1, 70_000), (32,)), ((2**31,), (1,))])
def test_launches_that_a_device_refuses_are_refused(cupy, fill, grid, block):
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        fill(grid, block, tuple(right(cupy)))


def test_sizes_are_tuples_of_int(cupy, fill):
    with pytest.raises(TypeError, match="tuples of int"):
        fill((np.int64(1),), (32,), tuple(right(cupy)))


def test_a_view_may_not_be_left(cupy, fill):
    whole = cupy.empty(20, dtype="float32")
    with pytest.raises(emulator.EmulationError, match="out of bounds"):
        fill((1,), (32,), (whole[:10], np.float32(0), np.int32(11), np.int64(1)))


def test_arrays_are_not_those_of_numpy(cupy):
    array = cupy.asarray(np.ones(3))
    for attempt in (lambda: np.asarray(array), lambda: array + np.ones(3), lambda: np.ones(3) + array):
        with pytest.raises(TypeError):
            attempt()
    with pytest.raises(TypeError):
        array[:] = np.ones(3)
    assert type(array.sum()) is type(array)


def test_memory_of_others_is_reached_by_its_address(cupy, fill):
    values, rest = np.zeros(10, np.float32), right(cupy)[1:]
    fill((1,), (32,), (cupy.lend(values), *rest))
    assert values.tolist() == [2.5] * 10
    with pytest.raises(TypeError, match=r"float64.*p4"):
        fill((1,), (32,), (cupy.lend(np.zeros(10)), *rest))


def test_modules_and_streams_are_made_as_by_cupy(cupy, fill):
    with pytest.raises(KeyError):
        compiled(cupy).get_function("fill<float>")
    with pytest.raises(TypeError, match="stream"):
        fill((1,), (32,), tuple(right(cupy)), stream=0)
    with pytest.raises(AttributeError):
        cupy.cuda.Stream.from_external(object())
