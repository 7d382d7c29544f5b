"""4-bit weights of bitsandbytes: files that it wrote, invalid files, and the package itself where it is installed."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import FormatError, MixedArraysError, NonFiniteError, UnsupportedArrayError
from lqlora.integrations.bitsandbytes import find_bitsandbytes, from_bitsandbytes, read_bitsandbytes, to_bitsandbytes
from tests.oracles import bitsandbytes as oracle
from tests.requirements import import_quietly, require_or_skip
from tests.strategies import host, on

KINDS = {"nf4": "nf4", "fp4": "fp4-bnb"}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = "d8/256:float32"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

with np.load(Path(__file__).parents[1] / "data" / "bitsandbytes.npz") as file:
    FIXTURE = {key: file[key] for key in file.files}
CASES = sorted({key.partition("/")[0] for key in FIXTURE} - {"version"})


def written(case):
    """Tensors of one case as bitsandbytes wrote them."""
    prefix = f"{case}/weight"
    return {key.removeprefix(f"{case}/"): array for key, array in FIXTURE.items() if key.startswith(prefix)}


def floats(case, which):
    return FIXTURE[f"{case}/{which}"].view(DTYPES[oracle.state_of(written(case))["dtype"]])


def bits(array):
    """Return the bits of an array, zeros without a sign: bitsandbytes decodes the second zero of FP4 to either."""
    return (array + array.dtype.type(0)).tobytes()


def codes(tensors):
    """Return the codes of a weight with one zero: of the two of FP4, bitsandbytes writes one on CPUs, one on GPUs."""
    array = np.array(oracle.codes_of(tensors))
    return np.where(array == 8, 0, array) if oracle.state_of(tensors)["quant_type"] == "fp4" else array


def described(tensors, **changes):
    """Return the tensors with changed fields in their description."""
    (key,) = (key for key in tensors if "quant_state" in key)
    state = oracle.state_of(tensors) | changes
    text = json.dumps({field: value for field, value in state.items() if value is not ...})
    return tensors | {key: np.frombuffer(text.encode(), dtype=np.uint8)}


def with_text(tensors, text):
    (key,) = (key for key in tensors if "quant_state" in key)
    return tensors | {key: np.frombuffer(text, dtype=np.uint8)}


def assert_same_tensors(found, expected):
    assert sorted(found) == sorted(expected)
    for key, array in expected.items():
        assert host(found[key]).dtype == array.dtype, key
        assert host(found[key]).shape == array.shape, key
        assert host(found[key]).tobytes() == array.tobytes(), key


@pytest.mark.parametrize("case", CASES)
class TestFilesOfBitsandbytes:
    def test_a_weight_is_decoded_to_the_same_bits(self, xp, case):
        weight = from_bitsandbytes({key: on(xp, array) for key, array in written(case).items()})
        dense = host(lq.dequantize(weight.quantized))
        expected = floats(case, "dense")
        assert dense.shape == expected.shape
        assert bits(dense.astype(DTYPES[weight.dtype])) == bits(expected)

    def test_a_weight_is_written_back_to_the_same_bytes(self, xp, case):
        tensors = {key.replace("weight", "m.weight", 1): array for key, array in written(case).items()}
        weight = from_bitsandbytes({key: on(xp, array) for key, array in tensors.items()}, "m.weight")
        assert_same_tensors(to_bitsandbytes(weight.quantized, "m.weight", weight.dtype), tensors)

    def test_a_weight_is_read_with_its_dtype_and_format(self, case):
        state, weight = oracle.state_of(written(case)), from_bitsandbytes(written(case))
        scales = NESTED if "nested_offset" in state else "float32"
        assert weight.dtype == state["dtype"]
        assert str(weight.quantized.format) == f"{KINDS[state['quant_type']]}/{state['blocksize']}:{scales}"

    def test_the_oracle_decodes_a_weight_to_the_same_bits(self, case):
        expected = floats(case, "dense")
        assert bits(oracle.decode(written(case)).astype(expected.dtype)) == bits(expected)


@pytest.mark.parametrize("case", ["nf4 plain", "fp4 plain"])
def test_this_library_finds_the_codes_and_scales_that_bitsandbytes_wrote(case):
    weight = from_bitsandbytes(written(case))
    again = lq.quantize(floats(case, "source"), weight.quantized.format)
    found, expected = to_bitsandbytes(again, dtype=weight.dtype), written(case)
    np.testing.assert_array_equal(codes(found), codes(expected))
    assert_same_tensors(found | {"weight": expected["weight"]}, expected)


def test_the_fixture_has_every_kind_and_a_negative_scale():
    assert {oracle.state_of(written(case))["quant_type"] for case in CASES} == set(KINDS)
    assert any(prod(oracle.state_of(written(case))["shape"]) % 2 for case in CASES)
    assert oracle.scales_of(written("nf4 negative scales")).min() < 0
    assert len(written("nf4 two nested blocks")["weight.nested_absmax"]) == 2


@st.composite
def exported(draw):
    """Draw a weight quantized by this library, and its tensors."""
    kind, nested = draw(st.sampled_from(sorted(KINDS))), draw(st.booleans())
    fmt = lq.BlockFormat.parse(f"{KINDS[kind]}/{draw(st.sampled_from(BLOCK_SIZES))}:{NESTED if nested else 'float32'}")
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    w = rng.standard_normal(shape) * np.exp(draw(st.sampled_from([0, 3])) * rng.standard_normal(shape))
    q = lq.quantize(w.astype(np.float32), fmt)
    return q, to_bitsandbytes(q, dtype=draw(st.sampled_from(sorted(DTYPES))))


# A mean offset decodes small blocks to zero, of which the library warns; the bytes are tested here.
@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
@given(exported())
def test_the_oracle_decodes_an_exported_weight_to_the_same_bits(drawn):
    q, tensors = drawn
    assert bits(oracle.decode(tensors)) == bits(lq.dequantize(q))


@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
@given(exported())
def test_an_exported_weight_is_imported_unchanged(drawn):
    q, tensors = drawn
    weight = from_bitsandbytes(tensors)
    assert (weight.quantized.format, weight.quantized.shape) == (q.format, q.shape)
    assert weight.dtype == oracle.state_of(tensors)["dtype"]
    assert_same_tensors(weight.quantized.to_arrays(), q.to_arrays())


def test_an_empty_weight_is_exported_and_imported():
    q = lq.quantize(np.zeros((0, 4), dtype=np.float32), lq.BlockFormat(lq.NF4, 64))
    tensors = to_bitsandbytes(q)
    assert tensors["weight"].shape == (0, 1)
    assert from_bitsandbytes(tensors).quantized.shape == (0, 4)


class TestStateDicts:
    def test_the_weights_are_listed_in_their_order(self):
        quantized = written("nf4 plain")
        state = {"embed.weight": np.zeros((2, 2), dtype=np.float32)}
        for name in ("b.weight", "a.weight"):
            state |= {key.replace("weight", name, 1): array for key, array in quantized.items()}
            state[name.replace("weight", "bias")] = np.zeros(2, dtype=np.float32)
        assert find_bitsandbytes(state) == ["b.weight", "a.weight"]
        for name in find_bitsandbytes(state):
            assert bits(lq.dequantize(from_bitsandbytes(state, name).quantized)) == bits(floats("nf4 plain", "dense"))
        for (name, weight), expected in zip(read_bitsandbytes(state), ("b.weight", "a.weight"), strict=True):
            assert name == expected
            assert bits(lq.dequantize(weight.quantized)) == bits(floats("nf4 plain", "dense"))

    def test_each_key_is_visited_a_bounded_number_of_times(self):
        visits = 0

        class Counted(dict):
            def __iter__(self):
                nonlocal visits
                for key in super().__iter__():
                    visits += 1
                    yield key

        one = written("nf4 nested")
        state = Counted(
            (key.replace("weight", f"{index}.weight", 1), array) for index in range(50) for key, array in one.items()
        )
        assert len(dict(read_bitsandbytes(state))) == 50
        assert visits == 2 * len(state)

    def test_unknown_parts_of_a_weight_are_refused(self):
        state = written("nf4 plain") | {"weight.SCB": np.zeros(5, dtype=np.float32), "weights.SCB": np.zeros(5)}
        with pytest.raises(FormatError, match="SCB"):
            dict(read_bitsandbytes(state))

    def test_a_state_dict_without_any_has_none(self):
        assert (
            find_bitsandbytes({"weight": None, "weight.absmax": None, "w.quant_state.bitsandbytes__int4": None}) == []
        )

    def test_a_name_that_begins_like_another_is_another_weight(self):
        tensors = written("nf4 plain") | {"weight2": np.zeros(3), "weight2.absmax": np.zeros(3)}
        assert from_bitsandbytes(tensors).quantized.shape == (5, 27)


class TestBrokenTensors:
    @pytest.mark.parametrize("case", ["nf4 plain", "fp4 nested"])
    def test_a_missing_tensor_is_refused(self, case):
        for key in written(case):
            tensors = {other: array for other, array in written(case).items() if other != key}
            with pytest.raises(FormatError, match=r"missing|one tensor|unknown"):
                from_bitsandbytes(tensors)

    @pytest.mark.parametrize("case", ["nf4 plain", "fp4 nested"])
    def test_a_tensor_of_another_dtype_is_refused(self, case):
        for key, array in written(case).items():
            with pytest.raises(FormatError, match="must be"):
                from_bitsandbytes(written(case) | {key: array.astype(np.float64)})

    @pytest.mark.parametrize("case", ["nf4 plain", "fp4 nested"])
    def test_a_tensor_of_another_length_is_refused(self, case):
        for key, array in written(case).items():
            for other in (array[:-1], np.concatenate([array, array[-1:]]), array[None]):
                with pytest.raises(FormatError):
                    from_bitsandbytes(written(case) | {key: other})

    def test_an_unknown_tensor_is_named(self):
        with pytest.raises(FormatError, match=r"'weight\.SCB'"):
            from_bitsandbytes(written("nf4 plain") | {"weight.SCB": np.zeros(5, dtype=np.float32)})

    def test_two_descriptions_are_refused(self):
        tensors = written("nf4 plain")
        tensors["weight.quant_state.bitsandbytes__fp4"] = tensors["weight.quant_state.bitsandbytes__nf4"]
        with pytest.raises(FormatError, match="got 2"):
            from_bitsandbytes(tensors)

    @pytest.mark.parametrize("key", ["weight.quant_map", "weight.nested_quant_map"])
    def test_another_table_of_levels_is_refused(self, key):
        table = written("fp4 nested")[key].copy()
        table[3] = np.nextafter(table[3], np.float32(9))
        with pytest.raises(FormatError, match=f"{key}.*levels"):
            from_bitsandbytes(written("fp4 nested") | {key: table})

    def test_codes_behind_the_last_weight_are_refused(self):
        codes = written("nf4 plain")["weight"].copy()
        codes[-1] ^= 1
        with pytest.raises(FormatError, match=r"^Tensor 'weight' .* got 6"):
            from_bitsandbytes(written("nf4 plain") | {"weight": codes})

    @pytest.mark.parametrize(("case", "key"), [("nf4 plain", "weight.absmax"), ("nf4 nested", "weight.nested_absmax")])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_scale_that_is_not_finite_is_refused(self, case, key, value):
        array = written(case)[key].copy()
        array[0] = value
        with pytest.raises(NonFiniteError, match=key):
            from_bitsandbytes(written(case) | {key: array})

    def test_a_negative_scale_is_refused(self):
        array = written("nf4 plain")["weight.absmax"].copy()
        array[0] = -1
        with pytest.raises(FormatError, match="negative"):
            from_bitsandbytes(written("nf4 plain") | {"weight.absmax": array})

    def test_a_list_instead_of_an_array_is_refused(self):
        with pytest.raises(UnsupportedArrayError):
            from_bitsandbytes(written("nf4 plain") | {"weight.absmax": [1.0] * 5})

    def test_tensors_of_two_libraries_are_refused(self, torch):
        tensors = written("nf4 plain")
        with pytest.raises(MixedArraysError):
            from_bitsandbytes(tensors | {"weight.absmax": torch.from_numpy(tensors["weight.absmax"].copy())})


class TestBrokenDescriptions:
    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"\xff\xfe", b"nf4", b'{"blocksize": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a": 1} {}'],
        ids=["empty", "cut", "no text", "a word", "a huge number", "deep", "two documents"],
    )
    def test_invalid_json_is_refused(self, text):
        with pytest.raises(FormatError, match=r"JSON|5000 digits"):
            from_bitsandbytes(with_text(written("nf4 plain"), text))

    @pytest.mark.parametrize("text", [b"null", b"[]", b"{}", b'"nf4"', b"7", b"NaN"])
    def test_json_without_the_fields_is_refused(self, text):
        with pytest.raises(FormatError, match=r"bitsandbytes__nf4"):
            from_bitsandbytes(with_text(written("nf4 plain"), text))

    @pytest.mark.parametrize("field", ["quant_type", "blocksize", "dtype", "shape", "nested_offset", "nested_dtype"])
    def test_a_missing_field_is_refused(self, field):
        with pytest.raises(FormatError, match=f"bitsandbytes__fp4': {field} "):
            from_bitsandbytes(described(written("fp4 nested"), **{field: ...}))

    def test_an_unknown_field_is_refused(self):
        with pytest.raises(FormatError, match="'nested_offset'"):
            from_bitsandbytes(described(written("nf4 plain"), nested_offset=0.5))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("quant_type", "fp4"),
            ("quant_type", None),
            ("blocksize", 16),
            ("blocksize", 96),
            ("blocksize", 8192),
            ("blocksize", 32.0),
            ("blocksize", True),
            ("blocksize", 10**4000),
            ("blocksize", [32]),
            ("dtype", "float64"),
            ("dtype", "torch.float32"),
            ("dtype", {}),
            ("shape", None),
            ("shape", []),
            ("shape", 135),
            ("shape", [135.0]),
            ("shape", [True, 135]),
            ("shape", [-5, -27]),
            ("shape", ["5", 27]),
            ("shape", [10**4000]),
            ("shape", [1] * 33),
            ("shape", [5, 28]),
            ("shape", [0]),
        ],
        ids=lambda value: repr(value)[:20] if isinstance(value, (str, type(None), float, bool)) else None,
    )
    def test_a_field_of_another_value_is_refused(self, field, value):
        with pytest.raises(FormatError) as caught:
            from_bitsandbytes(described(written("nf4 plain"), **{field: value}))
        assert len(str(caught.value)) < 400

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("nested_blocksize", 128),
            ("nested_blocksize", "256"),
            ("nested_dtype", "float16"),
            ("nested_offset", float("nan")),
            ("nested_offset", float("inf")),
            ("nested_offset", 1e39),
            ("nested_offset", 10**4000),
            ("nested_offset", "1.0"),
            ("nested_offset", True),
            ("nested_offset", None),
        ],
        ids=lambda value: repr(value)[:20] if isinstance(value, (str, float)) else None,
    )
    def test_a_nested_field_of_another_value_is_refused(self, field, value):
        with pytest.raises(FormatError) as caught:
            from_bitsandbytes(described(written("fp4 nested"), **{field: value}))
        assert field in str(caught.value)
        assert len(str(caught.value)) < 400


#: Formats by codebook, block size, axis, levels and scales; most cannot be exported.
FORMATS = [
    f"{codebook}/{block_size}{axis}:{scales}"
    for codebook in ("nf4", "fp4-bnb")
    for block_size in (32, 64)
    for axis in ("", "@0", "@1", "@-1")
    for scales in ("float32", NESTED)
]
OTHERS = ["nf3/32:float32", "int4/32:float32", "affine4/32:float32", "bof4s-64/32:float32", "nf4/32:float16"]
OTHERS += ["nf4/32:u8/256:float32", "nf4/32:d8+none/256:float32", "nf4/32:d8/256:d8/256:float32", "nf4+fit/32:float32"]
#: Shape, and the number of leading dimensions that count the arrays of a stack.
SHAPES = [((64,), 0), ((3, 70), 0), ((4, 64), 0), ((64, 1), 0), ((1, 40), 0), ((2, 32, 64), 0), ((0, 64), 0)]
SHAPES += [((2, 3, 70), 1), ((1, 4, 64), 1)]


def exports(text):
    """Yield the arrays of a format in all shapes that it has, and their tensors, or None where these are refused."""
    fmt = lq.BlockFormat.parse(text)
    rng = np.random.default_rng(0)
    for shape, batch_dims in SHAPES:
        if fmt.axis is not None and not -len(shape) + batch_dims <= fmt.axis < len(shape) - batch_dims:
            continue
        w = rng.standard_normal(shape).astype(np.float32)
        q = lq.quantize(w, fmt, fit="levels+scale" if fmt.levels != "codebook" else "absmax", batch_dims=batch_dims)
        try:
            yield q, to_bitsandbytes(q)
        except FormatError:
            yield q, None


@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
@pytest.mark.parametrize("text", FORMATS + OTHERS)
def test_an_export_is_refused_or_decodes_to_the_same_bits(text):
    for q, tensors in exports(text):
        if q.format.axis is None:
            assert (tensors is None) == (text in OTHERS or bool(q.batch_shape)), q.shape
        if tensors is not None:
            assert bits(lq.dequantize(from_bitsandbytes(tensors).quantized)) == bits(lq.dequantize(q)), q.shape
            assert bits(oracle.decode(tensors)) == bits(lq.dequantize(q)), q.shape


def test_blocks_along_an_axis_are_exported_where_they_follow_the_rows():
    exported = {
        (q.format.axis, q.shape) for text in ("nf4/32@0", "nf4/32@-1") for q, t in exports(text) if t is not None
    }
    assert exported == {
        (0, (64,)),
        (0, (64, 1)),
        (-1, (64,)),
        (-1, (4, 64)),
        (-1, (0, 64)),
        (-1, (1, 40)),
        (-1, (2, 32, 64)),
    }


class TestUnsupportedFormats:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize(("text", "key"), [("nf4/64:float32", "scales"), (f"nf4/64:{NESTED}", "scales.offset")])
    def test_a_scale_that_is_not_finite_is_refused(self, text, key, value):
        q = lq.quantize(np.ones((4, 64), dtype=np.float32), lq.BlockFormat.parse(text))
        arrays = q.to_arrays() | {key: np.full_like(q.to_arrays()[key], value)}
        with pytest.raises(NonFiniteError, match=key):
            to_bitsandbytes(lq.QuantizedArray.from_arrays(arrays, q.format, q.shape))

    @pytest.mark.parametrize(
        ("text", "shape", "reason"),
        [
            ("nf4/64@0", (70, 3), r"axis.*@0.*\(70, 3\)"),
            ("nf4/64@-1", (3, 70), "axis.*@-1"),
            ("nf4+fit/64", (3, 70), r"levels.*\+fit"),
        ],
    )
    def test_an_array_that_the_layout_cannot_hold_is_refused(self, text, shape, reason):
        fmt = lq.BlockFormat.parse(text)
        q = lq.quantize(np.ones(shape, dtype=np.float32), fmt, fit="absmax" if "fit" not in text else "levels+scale")
        with pytest.raises(FormatError, match=reason):
            to_bitsandbytes(q)

    def test_a_stack_is_refused(self):
        q = lq.quantize(np.ones((2, 3, 64), dtype=np.float32), lq.BlockFormat(lq.NF4, 64), batch_dims=1)
        with pytest.raises(FormatError, match=r"q .*stack.*\(2,\)"):
            to_bitsandbytes(q)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("nf3/64:float32", "codebook.*nf4 or fp4-bnb.*nf3"),
            ("int4/64:float32", "codebook.*int4"),
            ("nf4/16:float32", "block_size.*16"),
            ("nf4/96:float32", "block_size.*96"),
            ("nf4/8192:float32", "block_size.*8192"),
            ("nf4/64:float16", "scales.*float16"),
            ("nf4/64:u8/256:float32", "scales.*u8/256:float32"),
            ("nf4/64:d8/128:float32", "scales.*d8/128:float32"),
            ("nf4/64:d8/256:float16", "scales.*d8/256:float16"),
        ],
    )
    def test_a_format_is_refused_with_the_reason(self, text, reason):
        q = lq.quantize(np.ones((4, 64), dtype=np.float32), lq.BlockFormat.parse(text))
        with pytest.raises(FormatError, match=reason):
            to_bitsandbytes(q)

    def test_a_codebook_of_the_same_name_is_refused(self):
        codebook = lq.Codebook(np.linspace(-1, 1, 16), name="nf4")
        with pytest.raises(FormatError, match=r"codebook.*nf4"):
            to_bitsandbytes(lq.quantize(np.ones(64), lq.BlockFormat(codebook, 64)))

    def test_an_array_without_dimensions_is_refused(self):
        with pytest.raises(FormatError, match=r"q .*shape \(\)"):
            to_bitsandbytes(lq.quantize(np.float32(1.5).reshape(()), lq.BlockFormat(lq.NF4, 64)))

    def test_another_dtype_is_refused(self):
        with pytest.raises(FormatError, match=r"dtype.*float64"):
            to_bitsandbytes(lq.quantize(np.ones(64), lq.BlockFormat(lq.NF4, 64)), dtype="float64")


@pytest.fixture(scope="module")
def functional():
    """Return ``bitsandbytes.functional``."""
    require_or_skip("bitsandbytes", is_installed("bitsandbytes"))
    return import_quietly("bitsandbytes.functional")


def quantized_there(functional, weight, kind, block_size, nested):
    codes, state = functional.quantize_4bit(weight, None, None, block_size, nested, kind)
    return {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def dequantized_there(functional, torch, tensors):
    """Decode a weight as one row.

    On processors with AVX-512 bitsandbytes 0.50.2 takes scales of wrong blocks if the length of a row is not a multiple
    of the block size.
    """
    parts = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size([1, prod(state.shape)])
    if tensors["weight"].shape[0] == 1:  # bitsandbytes would transpose a weight of one byte
        return functional.dequantize_4bit(tensors["weight"], state).t().reshape(shape)
    return functional.dequantize_4bit(tensors["weight"], state).reshape(shape)


@st.composite
def peer_weights(draw):
    shape = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    w = rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape)) * 2.0 ** draw(st.integers(-8, 8))
    start = draw(st.integers(0, w.size))
    w.flat[start : start + draw(st.integers(0, 70))] = 0.0
    return np.clip(w, -6e4, 6e4).astype(np.float32)


KIND, BLOCK_SIZE = st.sampled_from(sorted(KINDS)), st.sampled_from(BLOCK_SIZES)
NEST, DTYPE = st.booleans(), st.sampled_from(sorted(DTYPES))


class TestAgainstThePackage:
    @given(peer_weights(), KIND, BLOCK_SIZE, NEST, DTYPE)
    def test_its_weights_decode_to_the_same_bits_and_are_written_back(
        self, functional, torch, w, kind, block_size, nested, dtype
    ):
        weight = torch.from_numpy(w).to(getattr(torch, dtype))
        tensors = quantized_there(functional, weight, kind, block_size, nested)
        read = from_bitsandbytes(tensors)
        here = lq.dequantize(read.quantized, dtype=read.dtype)
        assert bits(host(here)) == bits(host(dequantized_there(functional, torch, tensors)))
        expected = {key: host(value) for key, value in tensors.items()}
        assert_same_tensors(to_bitsandbytes(read.quantized, dtype=read.dtype), expected)

    @pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
    @given(peer_weights(), KIND, BLOCK_SIZE, NEST, DTYPE)
    def test_it_decodes_what_is_exported_to_the_same_bits(self, functional, torch, w, kind, block_size, nested, dtype):
        fmt = lq.BlockFormat.parse(f"{KINDS[kind]}/{block_size}:{NESTED if nested else 'float32'}")
        q = lq.quantize(torch.from_numpy(w), fmt)
        there = dequantized_there(functional, torch, to_bitsandbytes(q, dtype=dtype))
        assert bits(host(there)) == bits(host(lq.dequantize(q, dtype=dtype)))

    @pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
    @pytest.mark.parametrize("text", FORMATS)
    def test_it_decodes_every_export_to_the_same_bits(self, functional, torch, text):
        for q, tensors in exports(text):
            if tensors is not None and prod(q.shape):
                there = dequantized_there(
                    functional, torch, {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
                )
                assert bits(host(there)) == bits(lq.dequantize(q)), q.shape

    @given(peer_weights(), KIND, BLOCK_SIZE)
    def test_codes_and_scales_are_its_own_but_for_ties(self, functional, torch, w, kind, block_size):
        tensors = quantized_there(functional, torch.from_numpy(w), kind, block_size, nested=False)
        tensors = {key: host(value) for key, value in tensors.items()}
        fmt = lq.BlockFormat.parse(f"{KINDS[kind]}/{block_size}:float32")
        here = to_bitsandbytes(lq.quantize(w, fmt))
        # bitsandbytes puts the least scale of a short last block at 1e-38.
        np.testing.assert_array_equal(
            np.maximum(here["weight.absmax"], np.float32(1e-38)),
            np.maximum(tensors["weight.absmax"], np.float32(1e-38)),
        )
        differ = np.flatnonzero(codes(here) != codes(tensors))
        # It multiplies by the reciprocal of the scale, which is rounded twice.
        scaled = w.reshape(-1)[differ] / here["weight.absmax"][differ // block_size]
        ties = fmt.codebook.boundaries
        nearest = np.abs(scaled[:, None].astype(np.float64) - ties).argmin(axis=1)
        assert np.all(np.abs(scaled - ties[nearest]) <= np.spacing(np.abs(ties[nearest])))

    @pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
    @given(peer_weights(), BLOCK_SIZE)
    def test_nested_scales_are_its_own_but_for_its_lookup_table(self, functional, torch, w, block_size):
        tensors = quantized_there(functional, torch.from_numpy(w), "nf4", block_size, nested=True)
        tensors = {key: host(value) for key, value in tensors.items()}
        here = to_bitsandbytes(lq.quantize(w, lq.BlockFormat.parse(f"nf4/{block_size}:{NESTED}")))
        # The mean is summed in another order.
        there_offset, offset = (oracle.state_of(side)["nested_offset"] for side in (tensors, here))
        assert offset == pytest.approx(there_offset, rel=1e-6)
        # It looks codes up for 65,536 equally spaced values, so a code is that of a value up to 2**-16 away.
        absmax = np.abs(np.append(w, np.zeros(-w.size % block_size)).reshape(-1, block_size)).max(axis=1)
        ours, theirs = oracle.scales_of(here), oracle.scales_of(tensors)
        second = np.repeat(tensors["weight.nested_absmax"], 256)[: len(absmax)]
        apart = np.abs(np.abs(ours - absmax) - np.abs(theirs - absmax))
        close = apart <= 2**-15 * second + 2e-6 * absmax.max() + 1e-38
        # The nearest level may not be above zero: it takes that one, and quantize() the next that is.
        assert np.all(close | ((theirs <= 0) & (ours > 0) & (absmax > 0)))
