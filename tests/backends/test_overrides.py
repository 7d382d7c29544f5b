"""Every override returns the bytes of the reference, and runs for the calls that it is made for."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from array_api_compat import device

import lqlora as lq
from lqlora import NF4, ops
from lqlora._dispatch import known_libraries
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError, UnsupportedArrayError
from lqlora.testing import assert_backend_conforms
from lqlora.testing.backends._cases import Blocks
from lqlora.testing.backends._subject import operations
from tests.requirements import require_or_skip
from tests.strategies import flushes, host, on

#: Overrides that typical arguments run without compiled kernels. Operations without an entry have no override.
FAST = {
    "numpy": {
        "nearest_codes": "numpy.nearest_codes_in_buckets",
        "decode": "numpy.decode_lookup",
        "bin_sums": "numpy.bin_sums_counted",
    },
    "torch": {name: f"torch.{name}_as_numpy" for name in ("nearest_codes", "decode", "bin_sums")},
}


#: Properties that draw subnormal numbers.
WITH_SUBNORMALS = ("special_values", "combinations", "quantize", "dequantize")


@pytest.mark.slow_on_strict
def test_a_library_returns_the_bytes_of_the_reference(xp):
    options = {"device": device(on(xp, np.zeros(1))), "max_examples": 3}
    assert_backend_conforms(xp, exclude=WITH_SUBNORMALS if flushes(xp) else (), **options)


def test_kernels_keep_subnormal_numbers_where_the_library_flushes_them(xp):
    if not flushes(xp):
        pytest.skip("The library keeps them too.")
    kernels = [name for name in operations() if getattr(ops, name).overrides("cupy")]
    options = {"device": device(on(xp, np.zeros(1))), "max_examples": 15}
    assert_backend_conforms(xp, only=WITH_SUBNORMALS[:2], operations=kernels, **options)


@pytest.mark.slow
def test_a_library_returns_the_bytes_of_the_reference_however_often_it_is_asked(fast_xp):
    assert_backend_conforms(fast_xp, max_examples=60, derandomize=False)


def typical(xp, bits=4):
    """Return arguments by operation, as quantize and dequantize pass them."""
    case = Blocks(0, bits=bits, count=1000)
    arguments = {name: operation.examples(case) for name, operation in operations().items() if operation.examples}
    return {name: tuple(_put(xp, value) for value in values) for name, values in arguments.items()}


def _put(xp, value):
    if isinstance(value, ops.PackedBlocks):
        return ops.PackedBlocks(*(_put(xp, field) for field in value))
    is_table = isinstance(value, np.ndarray) and not value.flags.writeable
    return on(xp, value) if isinstance(value, np.ndarray) and not is_table else value


def test_typical_arguments_take_the_fast_path(fast_xp):
    library = fast_xp.__name__.rpartition(".")[2]
    with lq.forced("numpy"):
        for name, arguments in typical(fast_xp, 8).items():
            expected = FAST[library].get(name, "reference")
            assert lq.backends.explain(name, *arguments).implementation == expected
            assert getattr(ops, name).select(*arguments).implementation == expected


def test_the_table_lists_what_runs(fast_xp):
    library = fast_xp.__name__.rpartition(".")[2]
    listed = {
        (entry.operation, entry.implementation) for entry in lq.backends.capabilities() if entry.library == library
    }
    assert listed >= set(FAST[library].items())
    for name, implementation in sorted(listed):
        overrides = {override.name: override for override in getattr(ops, name).overrides(library)}
        assert overrides[implementation].takes.memory == ("device" if implementation.startswith("cuda.") else "host")


def test_the_table_needs_no_library_that_is_absent():
    libraries = {entry.library for entry in lq.backends.capabilities()}
    assert libraries <= {name for name in known_libraries() if is_installed(name)}


@pytest.mark.parametrize("length", [-1, 1])
def test_a_wrong_number_of_bytes_is_refused_on_the_fast_path_too(fast_xp, length):
    stored, out = typical(fast_xp)["decode"]
    packed = stored.packed
    wrong = packed[:length] if length < 0 else fast_xp.concat([packed, packed[:length]])
    with pytest.raises(InvalidArgumentError, match=r"1000 codes.*500 bytes"):
        ops.decode(stored._replace(packed=wrong), out)


def test_few_boundaries_and_narrow_ones_are_left_to_the_reference():
    w = np.linspace(-1, 1, 1000, dtype=np.float32)
    many, tiny = lq.normal_float(8).boundaries, np.float32(2.0**-101)
    with lq.forced("numpy"):
        for boundaries in (NF4.boundaries, many * tiny):
            assert lq.backends.explain("nearest_codes", w, boundaries).implementation == "reference"
        assert lq.backends.explain("nearest_codes", w, many).implementation == "numpy.nearest_codes_in_buckets"
        assert ops.nearest_codes(w * tiny, many * tiny).tolist() == ops.nearest_codes(w, many).tolist()


def test_tensors_without_memory_are_not_taken_for_arrays(torch):
    # Compilers trace with tensors that have a shape and nothing else.
    values = torch.zeros(8, device="meta")
    assert lq.backends.explain("nearest_codes", values, NF4.boundaries).implementation == "reference"
    with pytest.raises(UnsupportedArrayError, match=r"^values .*meta"):
        ops.nearest_codes(values, NF4.boundaries)


def test_parameters_take_the_fast_path_without_a_graph(torch):
    terms, bins = torch.nn.Parameter(torch.ones(4, dtype=torch.float64)), torch.tensor([0, 1, 1, 0])
    assert lq.backends.explain("bin_sums", terms, bins, 2).implementation == "torch.bin_sums_as_numpy"
    assert not ops.bin_sums(terms, bins, 2).requires_grad


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_arguments_by_name_are_those_by_position(library, request):
    xp = request.getfixturevalue("torch") if library == "torch" else np
    codes = xp.asarray([1, 2, 3], dtype=xp.uint8)
    assert host(ops.pack_codes(codes=codes, bits=4)).tolist() == host(ops.pack_codes(codes, 4)).tolist()
    assert ops.pack_codes.select(codes, bits=4) == ops.pack_codes.select(codes, 4)


ORDER = """
import lqlora.ops
for name in lqlora.ops.__all__:
    operation = getattr(lqlora.ops, name)
    if hasattr(operation, "overrides"):
        print(name, *(override.name for override in operation.overrides("numpy")))
"""


def order_after(first):
    """Names of NumPy's overrides in a fresh interpreter, in the order in which they are tried."""
    return subprocess.run(
        [sys.executable, "-c", f"import {first}\n{ORDER}"], capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "numpy", "buffer_pool"])
def test_overrides_are_tried_in_one_order_whatever_is_imported_first(module):
    require_or_skip("torch", module != "torch" or is_installed("torch"))
    expected = order_after("lqlora")
    assert "native." in expected or not lq.backends.available()["native"]
    assert order_after(f"lqlora.backends.cpu.{module}") == expected


class TestStoredWeights:
    """Arrays that do not fit are refused by every implementation as the reference refuses them."""

    STORED = ops.PackedBlocks(np.arange(4, dtype=np.uint8), np.array([5, 1], np.float32), None, NF4.levels, 4, 4)

    def put(self, xp, **changes):
        return ops.PackedBlocks(*(_put(xp, field) for field in self.STORED._replace(**changes)))

    @pytest.mark.parametrize("implementation", [None, "numpy"])
    @pytest.mark.parametrize("scales", [3, 8])
    def test_too_many_scales_are_refused(self, fast_xp, scales, implementation):
        stored = self.put(fast_xp, scales=np.ones(scales, np.float32))
        with lq.forced(implementation) if implementation else nullcontext(), pytest.raises((ValueError, RuntimeError)):
            ops.decode(stored, on(fast_xp, np.zeros(8, np.float32)))

    @pytest.mark.parametrize("dtype", ["float64", "float16", "int64", ">f4"])
    def test_levels_of_any_dtype_are_read_as_numbers(self, dtype):
        levels = np.arange(16).astype(dtype)
        with lq.forced("numpy"):
            found = ops.decode(self.STORED._replace(levels=levels), np.zeros(8, np.float32))
        assert (
            found.tolist()
            == ops.decode.reference(
                self.STORED._replace(levels=levels.astype(np.float32)), np.zeros(8, np.float32)
            ).tolist()
        )

    @pytest.mark.parametrize("shapes", [((8, 64, 0), (8, 4, 0)), ((1, 64, 0), (1, 4)), ((2, 64, 3), (2, 4))])
    def test_rows_of_other_dimensions_are_left_to_the_reference(self, fast_xp, shapes):
        x, out = (on(fast_xp, np.zeros(shape, np.float32)) for shape in shapes)
        stored = self.put(fast_xp, packed=np.zeros(128, np.uint8), scales=np.ones(4, np.float32), block_size=64)
        assert ops.matmul_packed.select(x, stored, out).implementation == "reference"
