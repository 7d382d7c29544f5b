"""Models whose weights are in layouts that are decoded: GPTQ, compressed-tensors, float8."""

from __future__ import annotations

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import CheckpointError
from lqlora.integrations.bitsandbytes import to_bitsandbytes
from lqlora.integrations.compressed_tensors import to_compressed_tensors
from lqlora.integrations.gptq import to_gptq
from lqlora.integrations.merging import merge_checkpoint
from lqlora.integrations.sources import open_model
from tests.integrations import tiny_models
from tests.requirements import require_module, require_or_skip

FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def values(shape, seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def quantized(text, shape=(32, 64)):
    return lq.quantize(values(shape), lq.BlockFormat.parse(text))


def model_of(folder, tensors, settings=None, **others):
    """Write a model with one more matrix."""
    folder.mkdir(exist_ok=True)
    save_file(tensors | {"plain.weight": values((8, 8))}, folder / "model.safetensors")
    config = {"model_type": "llama"} | ({} if settings is None else {"quantization_config": settings})
    (folder / "config.json").write_text(json.dumps(config | others))
    return folder


def loaded(folder, name="a"):
    """The decoded matrix, read by a loader that was pickled."""
    contents = open_model(folder)
    assert sorted(contents.weights) == sorted({name, "plain"})
    assert contents.tensors[f"{name}.weight"].matrices == (name,)
    dense = pickle.loads(pickle.dumps(contents.weights[name]))()
    assert dense.dtype == np.float32
    assert dense.shape == contents.tensors[f"{name}.weight"].shape
    return dense


class TestGPTQ:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize(
        ("kind", "stated"),
        [("gptq", {}), ("gptq", {"checkpoint_format": "gptq"}), ("gptq_v2", {"checkpoint_format": "gptq_v2"})],
    )
    def test_weights_are_decoded(self, tmp_path, bits, kind, stated):
        q = quantized(f"affine{bits}/16:float16")
        zeros = lq.ops.unpack_codes(q.zero_points, bits, 128)
        zeros = lq.ops.pack_codes(np.maximum(zeros, np.uint8(1)), bits)
        q = lq.QuantizedArray.from_arrays(q.to_arrays() | {"zero_points": zeros}, q.format, q.shape)
        tensors = to_gptq(q, "a", checkpoint_format=kind)
        assert (
            loaded(model_of(tmp_path / "m", tensors, {"quant_method": "gptq", **stated})).tobytes()
            == lq.dequantize(q).tobytes()
        )

    def test_its_parts_may_lie_in_several_files(self, tmp_path):
        q = quantized("affine8/16:float16")
        tensors = to_gptq(q, "a", checkpoint_format="gptq_v2")
        model_of(tmp_path, {}, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"})
        (tmp_path / "model.safetensors").unlink()
        for number, (key, own) in enumerate({**tensors, "plain.weight": values((8, 8))}.items(), 1):
            save_file({key: own}, tmp_path / f"model-{number:05d}-of-00005.safetensors")
        np.testing.assert_array_equal(loaded(tmp_path), lq.dequantize(q))

    @pytest.mark.parametrize(
        "settings", [None, {"quant_method": "awq"}, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq"]
    )
    def test_without_a_configuration_that_says_how_it_is_refused(self, tmp_path, settings):
        tensors = to_gptq(quantized("affine4/16:float16"), "a", checkpoint_format="gptq_v2")
        with pytest.raises(CheckpointError, match="layout that is not read"):
            open_model(model_of(tmp_path, tensors, settings))

    def test_codes_of_awq_are_refused(self, tmp_path):
        tensors = to_gptq(quantized("affine4/16:float16"), "a", checkpoint_format="gptq_v2")
        del tensors["a.g_idx"]
        with pytest.raises(CheckpointError, match="layout that is not read"):
            open_model(model_of(tmp_path, tensors, {"quant_method": "gptq"}))

    def test_damaged_tensors_are_named(self, tmp_path):
        tensors = to_gptq(quantized("affine4/16:float16"), "a", checkpoint_format="gptq_v2")
        tensors["a.scales"][0, 0] = np.inf
        contents = open_model(model_of(tmp_path, tensors, {"quant_method": "gptq"}))
        with pytest.raises(CheckpointError, match="which cannot be decoded"):
            contents.weights["a"]()


class TestCompressedTensors:
    @pytest.mark.parametrize("text", ["affine2/16:float16", "affine4/32:float32", "affine8/64:float16"])
    def test_weights_are_decoded(self, tmp_path, text):
        q = quantized(text)
        tensors = to_compressed_tensors(q, "a.weight")
        assert loaded(model_of(tmp_path / "m", tensors)).tobytes() == lq.dequantize(q).tobytes()

    def test_a_configuration_tells_bits_that_shapes_do_not(self, tmp_path):
        q = quantized("affine3/8:float16", (32, 8))  # a word holds eight codes of three or of four bits
        tensors = to_compressed_tensors(q, "a.weight")
        del tensors["a.weight_zero_point"]
        with pytest.raises(CheckpointError, match="bits must be given"):
            open_model(model_of(tmp_path, tensors)).weights["a"]()
        groups = {"group_0": {"weights": {"num_bits": 3}}, "group_1": {"weights": None}, "group_2": 5}
        found = loaded(model_of(tmp_path, tensors, {"quant_method": "compressed-tensors", "config_groups": groups}))
        expected = tensors["a.weight_scale"] * (np.asarray(q.codes).reshape(32, 8).astype(np.float32) - 4)
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        "change",
        [
            {"a.weight_g_idx": np.zeros(64, np.int32)},
            {"a.weight_packed": np.zeros((32, 8), np.uint8)},
            {"a.weight_shape": None},
        ],
        ids=["order", "another dtype", "no shape"],
    )
    def test_other_layouts_of_it_are_refused(self, tmp_path, change):
        tensors = to_compressed_tensors(quantized("affine4/16:float16"), "a.weight") | change
        with pytest.raises(CheckpointError, match="layout that is not read"):
            open_model(model_of(tmp_path, {key: own for key, own in tensors.items() if own is not None}))

    @pytest.mark.parametrize(
        "shape", [np.array([32], np.int64), np.array([32, 64], np.int32), np.array([32, 65], np.int64)]
    )
    def test_a_shape_that_does_not_fit_is_named(self, tmp_path, shape):
        tensors = to_compressed_tensors(quantized("affine4/16:float16"), "a.weight") | {"a.weight_shape": shape}
        with pytest.raises(CheckpointError, match="weight"):
            open_model(model_of(tmp_path, tensors)).weights["a"]()

    def test_codes_beside_values_are_refused(self, tmp_path):
        tensors = to_compressed_tensors(quantized("affine4/16:float16"), "a.weight") | {"a.weight": values((32, 64))}
        with pytest.raises(CheckpointError, match="has both codes and values"):
            open_model(model_of(tmp_path, tensors))

    def test_a_folder_of_that_library(self, tmp_path):
        require_or_skip("compressed_tensors", is_installed("compressed_tensors"))
        torch = require_module("torch")
        from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from safetensors.torch import save_file as save_torch

        scale = torch.rand(32, 4) + 0.1
        weight = torch.randint(-8, 8, (32, 64)) * scale.repeat_interleave(16, 1)
        args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=16)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        found = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        save_torch({f"a.{key}": own.contiguous() for key, own in found.items()}, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(open_model(tmp_path).weights["a"](), weight.numpy())


class TestFloat8:
    @pytest.mark.parametrize("dtype", sorted(FLOAT8))
    @pytest.mark.parametrize("shape", [(), (1,), (1, 1), (40,), (40, 1)], ids=str)
    @pytest.mark.parametrize("key", ["weight_scale", "weight_scale_inv"])
    @pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_one_scale_or_one_for_each_row(self, tmp_path, dtype, shape, key, kind):
        weight, scale = values((40, 24)).astype(FLOAT8[dtype]), np.asarray(np.abs(values(shape, 1)), kind)
        tensors = {"a.weight": weight, f"a.{key}": scale, "a.input_scale": values((1,))}
        expected = weight.astype(np.float32) * scale.astype(np.float32).reshape(-1, 1)
        np.testing.assert_array_equal(loaded(model_of(tmp_path, tensors)), expected)

    @given(
        rows=st.integers(1, 40),
        columns=st.integers(1, 40),
        block=st.sampled_from([(1, 8), (8, 8), (16, 1), (128, 128)]),
        is_stated=st.booleans(),
    )
    def test_one_scale_for_each_block(self, tmp_path_factory, rows, columns, block, is_stated):
        block = block if is_stated else (128, 128)
        weight = values((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        scale = np.abs(values((-(-rows // block[0]), -(-columns // block[1])), 1))
        settings = {"quant_method": "fp8"} | ({"weight_block_size": list(block)} if is_stated else {})
        expected = np.empty((rows, columns), np.float32)
        for row in range(rows):
            for column in range(columns):
                expected[row, column] = np.float32(weight[row, column]) * scale[row // block[0], column // block[1]]
        tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
        np.testing.assert_array_equal(loaded(model_of(tmp_path_factory.mktemp("m"), tensors, settings)), expected)

    @pytest.mark.parametrize("block", ["128", [128], [0, 128], [128, 128, 1], [True, 1], None])
    def test_a_block_size_that_is_none_is_not_used(self, tmp_path, block):
        weight, scale = np.ones((130, 8), ml_dtypes.float8_e4m3fn), np.array([[2.0], [3.0]], np.float32)
        settings = {"quant_method": "fp8", "weight_block_size": block}
        found = loaded(model_of(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, settings))
        assert found[127, 0] == 2.0
        assert found[128, 0] == 3.0

    def test_scales_that_are_no_numbers_are_named(self, tmp_path):
        tensors = {
            "a.weight": np.ones((8, 8), ml_dtypes.float8_e4m3fn),
            "a.weight_scale": np.array([np.nan], np.float32),
        }
        with pytest.raises(CheckpointError, match="cannot be decoded: a"):
            open_model(model_of(tmp_path, tensors)).weights["a"]()

    def test_a_model_is_decomposed_and_opened_by_transformers(self, tmp_path):
        torch, transformers = require_module("torch"), require_module("transformers")
        from safetensors.torch import load_file
        from safetensors.torch import save_file as save_torch

        from lqlora.integrations import transformers as ours

        transformers.utils.logging.disable_progress_bar()
        ours.register()
        tiny_models.dense_llama().save_pretrained(tmp_path / "dense")
        tensors = load_file(tmp_path / "dense" / "model.safetensors")
        for name in [own for own in tensors if "proj" in own]:
            scale = tensors[name].abs().amax() / 448
            tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
        save_torch(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "dense" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
        lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", tiny_models.FORMAT, rank=2, progress=False)
        stored = lq.verify(tmp_path / "small")
        assert len(stored.matrices) == 14
        assert not any("scale" in name for name in stored.tensors)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert sum(isinstance(own, lq.nn.LQLinear) for own in model.modules()) == 14


class TestTransposedLayers:
    """GPT-2 stores (inputs, outputs). GPTQ and bitsandbytes store what a linear layer would, float8 numbers what the model has."""

    @pytest.mark.parametrize("layout", ["GPTQ", "bitsandbytes", "float8"])
    @pytest.mark.parametrize("name", ["h.0.attn.c_attn", "h.0.attn.c_proj"])
    def test_orientations_are_those_of_the_dense_model(self, tmp_path, layout, name):
        shape = (64, 32) if "c_attn" in name else (32, 32)  # (outputs, inputs)
        w = values(shape)
        if layout == "GPTQ":
            q = lq.quantize(w, lq.BlockFormat.parse("affine8/32:float16"))
            tensors, expected = to_gptq(q, name, checkpoint_format="gptq_v2"), lq.dequantize(q)
        elif layout == "bitsandbytes":
            q = lq.quantize(w, lq.BlockFormat.parse("nf4/64:float32"))
            tensors, expected = to_bitsandbytes(q, f"{name}.weight"), lq.dequantize(q)
        else:
            coded = np.ascontiguousarray(w.T).astype(ml_dtypes.float8_e4m3fn)
            tensors = {f"{name}.weight": coded, f"{name}.weight_scale": np.ones((1,), np.float32)}
            expected = coded.astype(np.float32).T
        settings = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
        contents = open_model(model_of(tmp_path / "m", tensors, settings, model_type="gpt2"))
        np.testing.assert_array_equal(contents.weights[name](), expected)
        own = contents.tensors[f"{name}.weight"]
        assert own.is_transposed
        assert own.shape == shape[::-1]
        np.testing.assert_array_equal(own.load(), expected.T)
        lq.decompose_checkpoint(
            tmp_path / "m",
            tmp_path / "small",
            lq.BlockFormat.parse("int8s/32:float16"),
            rank=0,
            include=name,
            progress=False,
        )
        merge_checkpoint(tmp_path / "small", tmp_path / "merged", dtype="float32", progress=False)
        merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
        assert merged.shape == shape[::-1]
        assert np.abs(merged - expected.T).max() < 0.05
