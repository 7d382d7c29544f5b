"""A stand-in for CuPy: NumPy arrays behind CuPy's names, and kernels that the emulator runs.

It provides the part of CuPy that the backend, the references of the operations and their tests use, and is at least as
strict. Its arrays do not convert to NumPy arrays and do not mix with them, and reductions return arrays. It raises
where CuPy would pass an argument that the kernel then reads wrongly: a number of another width or kind than the
parameter, an array of another item size, or an array that is not contiguous. New memory holds a pattern.
"""

from __future__ import annotations

import functools
import json
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any, Self

import array_api_compat.numpy as reference
import ml_dtypes
import numpy as np

from tests.emulator.build import Range, build

__all__ = ["CuPyStandIn", "Device", "Stream", "ndarray"]

_LARGEST_GRID = (2**31 - 1, 65535, 65535)


class Device:
    """The only device."""

    id = 0
    compute_capability = "90"

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return 0


class Stream:
    """The only stream of the device; a launch returns when the kernel has ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @classmethod
    def from_external(cls, stream: Any) -> Stream:
        version, handle = stream.__cuda_stream__()
        if (version, type(handle)) != (0, int):
            raise TypeError("stream must give the version of the protocol and an address.")
        return cls()

    def synchronize(self) -> None:
        pass


class ndarray:  # noqa: N801 - as CuPy calls it
    """An array. It does not derive from NumPy's class, because NumPy would accept it as its own."""

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    device = property(lambda _: Device())
    data = property(lambda self: types.SimpleNamespace(device_id=0, ptr=self.values.ctypes.data))

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _wrapped(getattr(self.values, name))

    def get(self) -> np.ndarray:
        return self.values.copy()

    def __getitem__(self, index: Any) -> Any:
        return _wrapped(self.values[_unwrapped(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.values[_unwrapped(index)] = _unwrapped(value)

    def __len__(self) -> int:
        return len(self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __int__(self) -> int:
        return int(self.values)

    def __float__(self) -> float:
        return float(self.values)


def _operator(name: str) -> Any:
    def operate(*operands: Any) -> Any:
        return _wrapped(getattr(np.ndarray, name)(*map(_unwrapped, operands)))

    return operate


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "floordiv",
    "mod",
    "matmul",
    "and",
    "or",
    "invert",
    "lshift",
    "rshift",
    "neg",
    "abs",
]:
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ["iadd", "ior", "eq", "ne", "lt", "le", "gt", "ge"]:
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _wrapped(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return ndarray(np.asarray(value))
    if isinstance(value, tuple | list):
        return type(value)(map(_wrapped, value)) if type(value) in (tuple, list) else tuple(map(_wrapped, value))
    if isinstance(value, types.BuiltinMethodType):
        return lambda *args, **options: _wrapped(value(*map(_unwrapped, args), **options))
    return value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value.values
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if type(value) in (tuple, list):
        return type(value)(map(_unwrapped, value))
    return value


class _Function:
    """A kernel of a compiled module, launched like a CuPy kernel."""

    def __init__(self, cupy: CuPyStandIn, kernel: Any) -> None:
        self._cupy, self._kernel = cupy, kernel

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], *, stream: Stream | None = None
    ) -> None:
        if not isinstance(stream, Stream | None):
            raise TypeError("stream must be a stream of CuPy.")
        kernel = self._kernel
        if any(type(size) is not int for size in (*grid, *block)):
            raise TypeError("grid and block must be tuples of int.")
        if not 1 <= np.prod(block) <= kernel.most_threads or any(
            not 1 <= size <= most for size, most in zip(grid, _LARGEST_GRID, strict=False)
        ):
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {kernel.name} with grid {grid} and block {block}")
        if len(arguments) != len(kernel.parameters):
            raise TypeError(f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(arguments)}.")
        given = [
            self._bytes(f"{kernel.name}, argument {i}", value, parameter)
            for i, (value, parameter) in enumerate(zip(arguments, kernel.parameters, strict=True))
        ]
        ranges = [Range(array.ctypes.data, array.ctypes.data + array.nbytes) for array in self._arrays(arguments)]
        self._cupy.launched.append((kernel.name, grid, block))
        kernel.launch(grid, block, given, ranges, self._cupy.schedule)

    def _arrays(self, arguments: tuple[Any, ...]) -> list[np.ndarray]:
        """Return the arrays that the kernel may access: CuPy arrays, and lent memory by its address."""
        own = [value.values for value in arguments if isinstance(value, ndarray)]
        return own + [self._cupy.lent[value] for value in arguments if type(value) is int]

    def _bytes(self, where: str, value: Any, parameter: str) -> bytes:
        kind, size = parameter[0], int(parameter[1])
        if type(value) is int and value not in self._cupy.lent:
            raise TypeError(f"{where} is {value}, not the address of lent memory. Pass numbers as NumPy scalars.")
        if isinstance(value, ndarray) or type(value) is int:
            values = value.values if isinstance(value, ndarray) else self._cupy.lent[value]
            if kind != "p" or size != values.itemsize:
                raise TypeError(f"{where} is an array of {values.dtype}, the parameter is {parameter}.")
            if not values.flags.c_contiguous:
                raise ValueError(f"{where} is not contiguous.")
            return values.ctypes.data.to_bytes(8, sys.byteorder)
        if isinstance(value, bool):
            value = np.int64(value)  # as CuPy does, whatever the parameter is
        elif type(value) is float:
            value = np.float64(value)
        if not isinstance(value, np.generic):
            raise TypeError(f"Unsupported type {type(value)}")
        if (("f" if value.dtype.kind == "f" else "i") != kind) or value.dtype.itemsize != size:
            raise TypeError(f"{where} is {value.dtype}, the parameter is {parameter}.")
        return value.tobytes()


class _Compiler:
    """CuPy's bindings of the run-time compiler. The compiled code is the text itself, which the emulator compiles."""

    NVRTCError = RuntimeError

    def __init__(self, cupy: CuPyStandIn) -> None:
        self._cupy, self._programs = cupy, {}

    def getVersion(self) -> tuple[str, int]:
        return "stand-in", id(self)  # the version is part of the cache's key: files of another stand-in are not used

    def getSupportedArchs(self) -> list[int]:
        return [75, 80, 90]

    def createProgram(self, text: str, name: str, headers: tuple[()], include_names: tuple[()]) -> int:
        assert (name, headers, include_names) == ("lqlora.cu", (), ())
        self._programs[len(self._programs)] = [text, ""]
        return len(self._programs) - 1

    def addNameExpression(self, program: int, name: str) -> None:
        self._programs[program][1] = name

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        self._cupy.options.add(options)
        if not self._programs[program][0]:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getProgramLog(self, program: int) -> str:
        return "" if self._programs[program][0] else "nothing to compile"

    def getLoweredName(self, program: int, name: str) -> str:
        assert name == self._programs[program][1]
        return f"lowered {name}"

    def getCUBIN(self, program: int) -> bytes:
        return json.dumps(self._programs[program]).encode()

    getPTX = getCUBIN

    def destroyProgram(self, program: int) -> None:
        self._programs[program] = None


class _Module:
    def __init__(self, cupy: CuPyStandIn) -> None:
        self._cupy = cupy

    def load(self, code: bytes) -> None:
        self._text, self._name = json.loads(code)

    def get_function(self, symbol: str) -> _Function:
        if symbol != f"lowered {self._name}":
            raise KeyError(symbol)
        together = self._cupy.together.get(self._name, [self._name])
        return _Function(self._cupy, build(self._text, tuple(together))[self._name])


class CuPyStandIn(types.ModuleType):
    """The module ``cupy``. Tests make new ones, because each records its launches.

    ``together`` lists, for a kernel, the kernels that are compiled with it: one run of the compiler beats many.
    """

    def __init__(self, together: dict[str, list[str]]) -> None:
        super().__init__("cupy")
        self.__spec__ = ModuleSpec("cupy", None)
        self.together, self.schedule = together, 0
        self.launched: list[Any] = []
        self.options: set[tuple[str, ...]] = set()
        self.ndarray = ndarray
        #: Memory outside CuPy's arrays that kernels may access, by its address.
        self.lent: dict[int, np.ndarray] = {}
        self.cuda = types.SimpleNamespace(
            is_available=lambda: True,
            Device=Device,
            Stream=Stream,
            get_current_stream=Stream,
            Module=functools.partial(_Module, self),
            nvrtc=_Compiler(self),
            runtime=types.SimpleNamespace(getDevice=lambda: 0),
        )

    def lend(self, values: np.ndarray) -> int:
        """Allow kernels to access an array by its address, and return the address."""
        self.lent[values.ctypes.data] = values
        return values.ctypes.data

    @staticmethod
    def empty(shape: Any, dtype: Any = float, **_: Any) -> ndarray:
        values = np.empty(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        values.reshape(-1).view(np.uint8)[...] = 0xA5
        return ndarray(values)

    @staticmethod
    def asarray(values: Any, dtype: Any = None, **_: Any) -> ndarray:
        values = values.values if isinstance(values, ndarray) else np.array(values)
        return ndarray(values if dtype is None else values.astype(dtype, copy=False))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(reference, name)
        if not callable(found) or isinstance(found, type):
            return found

        def call(*args: Any, **options: Any) -> Any:
            options.pop("device", None)
            with np.errstate(all="ignore"):
                return _wrapped(found(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in options.items()}))

        return call
