"""The layout of GPTQ: codes, scales and zero points, and folders in it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import lqlora as lq
from lqlora.errors import FormatError, InvalidArgumentError, NonFiniteError
from lqlora.integrations.exporting import can_export, export_checkpoint
from lqlora.integrations.gptq import decode_gptq, from_gptq, gptq_bytes, gptq_fault, to_gptq
from lqlora.integrations.sources import open_weights
from tests.integrations import tiny_models
from tests.requirements import require_module

torch = require_module("torch")

# transformers warns of its own changes.
pytestmark = pytest.mark.filterwarnings("ignore")


def quantized(text, shape=(32, 64), seed=0, least=0):
    """A matrix whose zero points are at least some number."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    q = lq.quantize(w, lq.BlockFormat.parse(text))
    if not least:
        return q
    bits = q.format.codebook.bits
    zeros = lq.ops.unpack_codes(q.zero_points, bits, q.shape[0] * q.shape[1] // q.format.block_size)
    return with_arrays(q, zero_points=lq.ops.pack_codes(np.maximum(zeros, np.uint8(least)), bits))


def with_arrays(q, **arrays):
    return lq.QuantizedArray.from_arrays(q.to_arrays() | arrays, q.format, q.shape)


def decoded_by_hand(tensors, bits, less):
    """Weights of a layer, code by code, as the layout is described."""
    codes, zeros, scales, index = (tensors[f"layer.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx"))

    def code(words, number):
        stream = int.from_bytes(words.astype("<i4").tobytes(), "little")
        return stream >> number * bits & 2**bits - 1

    rows, columns = scales.shape[1], len(index)
    found = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            group = index[column]
            zero = code(zeros[group], row) + less
            found[row, column] = np.float32(scales[group, row]) * np.float32(code(codes[:, row], column) - zero)
    return found


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([8, 16, 32]),
    axis=st.sampled_from(["", "@-1", "@1"]),
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    kind=st.sampled_from(["gptq", "gptq_v2"]),
)
def test_what_is_written_is_read_back(bits, group, axis, rows, groups, kind):
    side = {2: 16, 3: 32, 4: 8, 8: 4}[bits]  # fills words
    q = quantized(f"affine{bits}/{group}{axis}:float16", (side * rows, max(side, group) * groups), least=kind == "gptq")
    tensors = to_gptq(q, "up", checkpoint_format=kind)
    assert {key.removeprefix("up.") for key in tensors} == {"qweight", "qzeros", "scales", "g_idx"}
    assert sum(own.nbytes for own in tensors.values()) == gptq_bytes(q.format, q.shape)
    back = from_gptq(tensors, "up", checkpoint_format=kind)
    assert np.array_equal(back.codes, q.codes)
    assert np.array_equal(back.zero_points, q.zero_points)
    assert lq.dequantize(back).tobytes() == lq.dequantize(q).tobytes()
    assert decode_gptq(tensors, "up", checkpoint_format=kind).tobytes() == lq.dequantize(q).tobytes()
    again = to_gptq(back, "up", checkpoint_format=kind)
    assert all(np.array_equal(again[key], own) for key, own in tensors.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("kind", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_the_layout_is_the_one_that_is_described(bits, kind, less):
    q = quantized(f"affine{bits}/16:float16", (32, 32), least=1)
    tensors = to_gptq(q, checkpoint_format=kind)
    np.testing.assert_array_equal(decoded_by_hand(tensors, bits, less), lq.dequantize(q))


def test_columns_in_another_order_are_decoded():
    q = quantized("affine4/16:float16", least=1)
    tensors, order = to_gptq(q), np.random.default_rng(1).permutation(64)
    codes = np.asarray(q.codes).reshape(32, 64)[:, order]
    words = np.zeros((8, 32), np.uint32)
    for column in range(64):
        words[column // 8] |= codes[:, column].astype(np.uint32) << np.uint32(4 * (column % 8))
    turned = tensors | {"layer.qweight": words.view(np.int32), "layer.g_idx": tensors["layer.g_idx"][order]}
    np.testing.assert_array_equal(decode_gptq(turned), lq.dequantize(q)[:, order])
    with pytest.raises(FormatError, match="desc_act"):
        from_gptq(turned)


def test_zero_points_beyond_the_codes_are_decoded_and_not_read():
    tensors = to_gptq(quantized("affine4/16:float16", least=1))
    tensors["layer.qzeros"] = np.full_like(tensors["layer.qzeros"], -1)
    codes = from_gptq(to_gptq(quantized("affine4/16:float16", least=1))).codes.astype(np.int64)
    expected = tensors["layer.scales"].T.astype(np.float32).repeat(16, 1) * (codes - 16).astype(np.float32)
    np.testing.assert_array_equal(decode_gptq(tensors), expected)
    with pytest.raises(FormatError, match="zero points below 16, got 16"):
        from_gptq(tensors)


def test_zero_points_of_0_need_the_second_format():
    q = lq.quantize(np.random.default_rng(0).random((32, 64), np.float32), lq.BlockFormat.parse("affine2/16:float16"))
    assert "gptq_v2" in gptq_fault(q)
    assert gptq_fault(q, checkpoint_format="gptq_v2") == ""
    with pytest.raises(FormatError, match="zero points must be at least 1"):
        to_gptq(q)


@pytest.mark.parametrize(
    ("text", "shape", "match"),
    [
        ("nf4/16:float16", (32, 64), "codebook must be"),
        ("affine5/16:float16", (32, 64), "codebook must be"),
        ("affine4/16~both:float16", (64, 64), "rotation must be None"),
        ("affine4/16:float16", (64,), "q must be one matrix"),
        ("affine4/16@0:float16", (32, 64), "blocks must be along"),
        ("affine4/16:float16", (32, 40), "blocks must be along"),
        ("affine4/16:float16", (5, 64), "shape must have rows"),
        ("affine3/16:float16", (32, 48), "shape must have rows"),
        ("affine4/16:float32", (32, 64), "scales must be such"),
        ("affine4/16:u8/256:float32", (32, 64), "scales must be such"),
    ],
)
def test_what_the_layout_does_not_hold_is_refused(text, shape, match):
    q = quantized(text, shape)
    assert match in gptq_fault(q, checkpoint_format="gptq_v2")
    with pytest.raises(FormatError, match=match):
        to_gptq(q, checkpoint_format="gptq_v2")


def test_scales_that_are_no_numbers_are_refused():
    q = quantized("affine4/16:float16")
    scales = q.scales.copy()
    scales[3] = np.inf
    for call in (to_gptq, gptq_fault):
        with pytest.raises(NonFiniteError, match="scales"):
            call(with_arrays(q, scales=scales))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"qweight": None}, "must hold layer.qweight"),
        ({"qweight": np.zeros((7, 32), np.int32)}, "qweight must be int32"),
        ({"qweight": np.zeros((8, 32), np.int64)}, "qweight must be int32"),
        ({"qzeros": np.zeros((4, 5), np.int32)}, "qzeros must be int32"),
        ({"qzeros": np.zeros((4, 4), np.float32)}, "qzeros must be int32"),
        ({"scales": np.zeros((4, 32), np.int32)}, "scales must have floating"),
        ({"scales": np.zeros((0, 32), np.float16)}, "scales must have floating"),
        ({"scales": np.zeros(32, np.float16)}, "scales must have floating"),
        ({"g_idx": np.zeros((64, 1), np.int32)}, "g_idx must be integers"),
        ({"g_idx": np.zeros(0, np.int32)}, "g_idx must be integers"),
        ({"g_idx": np.full(64, 4, np.int32)}, "g_idx must have numbers"),
        ({"g_idx": np.full(64, -1, np.int32)}, "g_idx must have numbers"),
    ],
)
def test_tensors_that_contradict_each_other_are_named(change, match):
    tensors = to_gptq(quantized("affine4/16:float16", least=1)) | {f"layer.{key}": own for key, own in change.items()}
    for call in (from_gptq, decode_gptq):
        with pytest.raises(FormatError, match=match):
            call(tensors)


def test_an_unknown_format_is_refused():
    with pytest.raises(InvalidArgumentError, match="checkpoint_format must"):
        to_gptq(quantized("affine4/16:float16"), checkpoint_format="marlin")


class TestFolders:
    @pytest.mark.parametrize("rank", [0, 2])
    def test_tensors_settings_and_adapter(self, tmp_path, rank):
        require_module("transformers")
        tiny_models.dense_llama().save_pretrained(tmp_path / "dense")
        names = [name for name in open_weights(tmp_path / "dense") if "layers" in name]
        formats = {
            name: lq.BlockFormat.parse(f"affine{4 if index % 3 else 8}/16:float16") for index, name in enumerate(names)
        }
        lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", formats, rank=rank, max_iter=1, progress=False)
        narrow = [name for name in names if "k_proj" in name or "v_proj" in name]
        assert can_export(tmp_path / "small", "gptq") == {}
        export_checkpoint(tmp_path / "small", tmp_path / "out", "gptq", progress=False)
        stored, found = lq.load(tmp_path / "small"), load_file(tmp_path / "out" / "model.safetensors")
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 16)
        assert narrow
        for name, own in stored.matrices.items():
            back = from_gptq(found, name, checkpoint_format=config["checkpoint_format"])
            assert lq.dequantize(back).tobytes() == lq.dequantize(own.quantized).tobytes()
            dynamic = config["dynamic"].get("+:^" + name.replace(".", r"\.") + "$", {"bits": 4, "group_size": 16})
            assert dynamic == {"bits": own.quantized.format.codebook.bits, "group_size": 16}
        assert "-:^lm_head$" in config["dynamic"]
        assert {key for key in found if key.endswith(".weight")} == {
            key for key in stored.tensors if key.endswith(".weight")
        }
        assert (tmp_path / "out" / "adapter").is_dir() == bool(rank)

    def test_what_does_not_fit_is_listed(self, tmp_path):
        require_module("transformers")
        tiny_models.dense_llama().save_pretrained(tmp_path / "dense")
        lq.decompose_checkpoint(
            tmp_path / "dense", tmp_path / "small", lq.BlockFormat.parse("nf4/16:float16"), rank=0, progress=False
        )
        assert len(can_export(tmp_path / "small", "gptq")) == 14
        with pytest.raises(FormatError, match="cannot be exported"):
            export_checkpoint(tmp_path / "small", tmp_path / "out", "gptq", progress=False)

    def test_a_file_becomes_a_folder_that_is_read_back(self, tmp_path):
        matrices = {name: quantized("affine4/16:float16", seed=seed) for seed, name in enumerate(("up", "down"))}
        lq.save(tmp_path / "m.safetensors", matrices)
        export_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", "gptq", progress=False)
        weights = open_weights(tmp_path / "out")
        assert weights.keys() == matrices.keys()
        for name, q in matrices.items():
            np.testing.assert_array_equal(weights[name](), lq.dequantize(q))

    @pytest.mark.parametrize(("lowest", "kind"), [(1, "gptq"), (0, "gptq_v2")])
    def test_the_format_that_more_programs_read_is_taken_if_it_holds_all_zero_points(self, tmp_path, lowest, kind):
        other = quantized("affine2/16:float16", least=1)
        zeros = np.full(128, lowest, np.uint8)
        matrices = {"up": other, "down": with_arrays(other, zero_points=lq.ops.pack_codes(zeros, 2))}
        lq.save(tmp_path / "m.safetensors", matrices)
        export_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", "gptq", progress=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["checkpoint_format"] == kind
        assert lq.dequantize(matrices["down"]).tobytes() == open_weights(tmp_path / "out")["down"]().tobytes()
