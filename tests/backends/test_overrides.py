"""Every override returns the very bytes of the reference, and is the one that really runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import NF4, ops, quantize
from lqlora.errors import InvalidArgumentError, MixedArraysError
from lqlora.testing.strategies import ALL_CODEBOOKS, formats, largest_for, weights
from tests.strategies import host, on, stored

#: What typical arguments are to run on. An operation without an entry has no override in that library.
FAST = {
    "numpy": {
        "nearest_codes": "numpy.nearest_codes_in_buckets",
        "decode": "numpy.decode_lookup",
        "bin_sums": "numpy.bin_sums_counted",
    },
    "torch": {name: f"torch.{name}_as_numpy" for name in ("nearest_codes", "decode", "bin_sums")},
}


def typical(xp, codebook=NF4, block_size=64, count=1000):
    """Arguments of every operation, as quantize and dequantize would pass them."""
    rng = np.random.default_rng(0)
    w = on(xp, rng.standard_normal(count).astype(np.float32))
    codes = on(xp, rng.integers(0, len(codebook), count).astype(np.uint8))
    scales = ops.block_absmax(w, block_size)
    zeros = rng.integers(0, len(codebook), scales.shape[0]).astype(np.uint8)
    zeros = on(xp, zeros) if codebook.normalization == "affine" else None
    packed = ops.pack_codes(codes, codebook.bits)
    return {
        "block_absmax": (w, block_size),
        "nearest_codes": (w, codebook.boundaries),
        "encode": (w, scales, zeros, codebook.boundaries, block_size),
        "decode": (
            packed,
            scales,
            zeros,
            codebook.levels,
            codebook.bits,
            block_size,
            on(xp, np.zeros(count, np.float32)),
        ),
        "pack_codes": (codes, codebook.bits),
        "unpack_codes": (packed, codebook.bits, count),
        "bin_sums": (on(xp, rng.standard_normal(count)), on(xp, rng.integers(0, 7, count)), 7),
    }


def test_typical_arguments_take_the_fast_path(fast_xp):
    library = fast_xp.__name__.rpartition(".")[2]
    for name, arguments in typical(fast_xp, lq.normal_float(8)).items():
        expected = FAST[library].get(name, "reference")
        assert lq.backends.explain(name, *arguments).implementation == expected
        assert getattr(ops, name).select(*arguments).implementation == expected


def test_an_operation_without_an_override_runs_its_reference(xp):
    w = on(xp, np.linspace(-1, 1, 100, dtype=np.float32))
    assert lq.backends.explain("block_extremes", w, 64).implementation == "reference"


@pytest.mark.parametrize("codebook", ALL_CODEBOOKS, ids=lambda codebook: codebook.name)
@pytest.mark.parametrize("count", [0, 1, 7, 64, 65, 1000])
def test_operations_return_the_bytes_of_the_reference(fast_xp, codebook, count):
    for name, arguments in typical(fast_xp, codebook, 16, count).items():
        operation = getattr(ops, name)
        found, expected = host(operation(*arguments)), host(operation.reference(*arguments))
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("block_size", [1, 63, 4096, 32768, 32769, 100_000])
@pytest.mark.parametrize(("count", "bits"), [(32768, 3), (70_001, 3), (300_003, 4), (300_003, 6), (300_003, 8)])
def test_chunks_end_where_they_should(fast_xp, block_size, count, bits):
    for name, arguments in typical(fast_xp, lq.normal_float(bits), block_size, count).items():
        operation = getattr(ops, name)
        assert host(operation(*arguments)).tobytes() == host(operation.reference(*arguments)).tobytes()


@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64]))
def test_quantization_stores_the_bytes_of_the_reference(fast_xp, data, dtype):
    fmt = data.draw(formats())
    w = on(fast_xp, data.draw(weights(dtype, largest_for(fmt))) + dtype(0))
    fast = quantize(w, fmt)
    with lq.forced("reference"):
        slow = quantize(w, fmt)
        dense = host(lq.dequantize(slow))
    assert stored(fast) == stored(slow)
    assert host(lq.dequantize(fast)).tobytes() == dense.tobytes()


@pytest.mark.parametrize("codebook", [NF4, lq.affine(4), lq.normal_float(8)], ids=lambda codebook: codebook.name)
def test_arguments_are_not_changed(fast_xp, codebook):
    for name, arguments in typical(fast_xp, codebook).items():
        read = arguments[:-1] if name == "decode" else arguments  # the last one is what it writes to
        arrays = [argument for argument in read if not isinstance(argument, int | None)]
        before = [host(array).tobytes() for array in arrays]
        getattr(ops, name)(*arguments)
        assert [host(array).tobytes() for array in arrays] == before


def test_results_share_no_memory_with_a_cache(fast_xp):
    # The lookup tables are kept from call to call: writing into a result must not reach them.
    arguments = typical(fast_xp)["decode"]
    first = ops.decode(*arguments)
    expected = host(first).tobytes()
    first[...] = 7.0
    assert host(ops.decode(*arguments)).tobytes() == expected


@pytest.mark.parametrize("length", [-1, 1])
def test_a_wrong_number_of_bytes_is_refused_on_the_fast_path_too(fast_xp, length):
    packed, *rest = typical(fast_xp)["decode"]
    wrong = packed[:length] if length < 0 else fast_xp.concat([packed, packed[:length]])
    with pytest.raises(InvalidArgumentError, match="1000 codes of 4 bits are 500 bytes"):
        ops.decode(wrong, *rest)


def test_codes_that_lie_apart_in_memory_are_decoded_by_the_reference():
    packed, *rest = typical(np)["decode"]
    apart = np.repeat(packed, 2)[::2]
    assert lq.backends.explain("decode", apart, *rest).implementation == "reference"
    assert ops.decode(apart, *rest).tobytes() == ops.decode(packed, *rest).tobytes()


@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-45])
@pytest.mark.parametrize("codebook", [NF4, lq.affine(3), lq.normal_float(8)], ids=lambda codebook: codebook.name)
def test_scales_of_zero_and_of_either_sign_are_those_of_the_reference(fast_xp, scale, codebook):
    w, scales, zeros, boundaries, _ = typical(fast_xp, codebook, 60)["encode"]
    scales[::3] = scale
    expected = ops.encode.reference(w, scales, zeros, boundaries, 60)
    assert host(ops.encode(w, scales, zeros, boundaries, 60)).tobytes() == host(expected).tobytes()


def test_few_boundaries_and_narrow_ones_are_left_to_the_reference():
    w = np.linspace(-1, 1, 1000, dtype=np.float32)
    many, tiny = lq.normal_float(8).boundaries, np.float32(2.0**-101)
    for boundaries in (NF4.boundaries, many * tiny):
        assert lq.backends.explain("nearest_codes", w, boundaries).implementation == "reference"
    assert lq.backends.explain("nearest_codes", w, many).implementation == "numpy.nearest_codes_in_buckets"
    assert ops.nearest_codes(w * tiny, many * tiny).tolist() == ops.nearest_codes(w, many).tolist()


@pytest.mark.parametrize("other", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["encode", "decode"])
def test_overrides_do_not_mix_libraries(torch, name, other):
    here, there = (np, torch) if other == "torch" else (torch, np)
    first, _, *rest = typical(here)[name]
    scales = typical(there)[name][1]
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        getattr(ops, name)(first, scales, *rest)


def test_tensors_without_memory_are_not_taken_for_arrays(torch):
    # Compilers trace with tensors that have a shape and nothing else.
    values = torch.zeros(8, device="meta")
    assert lq.backends.explain("nearest_codes", values, NF4.boundaries).implementation == "reference"
    assert tuple(ops.nearest_codes(values, NF4.boundaries).shape) == (8,)


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
