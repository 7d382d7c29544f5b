"""GGUF files that are written: values, settings, adapters, and what is refused. The library gguf reads them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lqlora as lq
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError
from lqlora.integrations.exporting import can_export, export_checkpoint
from lqlora.integrations.gguf import load_llama, open_llama, quantized_weights
from lqlora.integrations.merging import merge_checkpoint
from tests.requirements import require_module

gguf, torch = require_module("gguf"), require_module("torch")
from lqlora.nn.model import quantized_layers  # noqa: E402 - needs torch
from tests.tiny_gguf import HEADS, KV_HEADS, permute, quantized_name, write_tiny_llama  # noqa: E402 - needs gguf

FORMAT = lq.BlockFormat.parse("int4s/32:float16")
QUERY = "model.layers.0.self_attn.q_proj"


def decomposed(source, folder, formats=FORMAT, rank=2, **options):
    lq.decompose_checkpoint(
        source, folder, formats, rank=rank, max_iter=1, progress=False, factor_dtype="float32", **options
    )
    return folder


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def small(like):
    return decomposed(like, like.parent / "small")


def values_of(path):
    return {name: own.load() for name, own in open_llama(path).tensors.items()}


def settings_of(path):
    fields = gguf.GGUFReader(path).fields
    return {name: own.contents() for name, own in fields.items() if not name.startswith("GGUF.")}


def adapters_of(path):
    """Products of low-rank factors by the name of the weight, as llama.cpp adds them, in the order of its rows."""
    tensors = {own.name: np.array(own.data) for own in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    assert len(tensors) == 2 * len(names)
    return {name: tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"] for name in names}


@pytest.mark.parametrize("text", ["int4s/32:float16", "int5s/32@-1:float16", "int8s/32:float16"])
def test_codes_and_factors_are_those_of_the_checkpoint(like, tmp_path, text):
    small = decomposed(like, tmp_path / "small", lq.BlockFormat.parse(text))
    assert can_export(small, "gguf") == {}
    seen = []
    sizes = export_checkpoint(small, tmp_path / "out", "gguf", like=like, progress=lambda *own: seen.append(own))
    assert list(sizes) == ["model.gguf", "adapter.gguf"]
    assert sizes == {own.name: own.stat().st_size for own in (tmp_path / "out").iterdir()}
    assert seen[-1] == (20 + 2 * 14, 20 + 2 * 14)
    stored, found = lq.load(small), values_of(tmp_path / "out" / "model.gguf")
    assert found.keys() == values_of(like).keys()
    for name, own in stored.matrices.items():
        np.testing.assert_array_equal(found.pop(f"{name}.weight"), lq.dequantize(own.quantized))
    for name, own in found.items():
        np.testing.assert_array_equal(own, stored.tensors[name].astype(np.float32))
    products = adapters_of(tmp_path / "out" / "adapter.gguf")
    assert len(products) == len(stored.matrices)
    for ours, theirs, heads in (
        (QUERY, "blk.0.attn_q", HEADS),
        ("model.layers.1.self_attn.k_proj", "blk.1.attn_k", KV_HEADS),
    ):
        own = stored.matrices[ours]
        expected = permute(own.scaling * own.lora_B @ own.lora_A, heads)
        np.testing.assert_allclose(products[f"{theirs}.weight"], expected, rtol=1e-5, atol=1e-6)
    expected = stored.matrices["model.layers.1.mlp.up_proj"]
    np.testing.assert_allclose(products["blk.1.ffn_up.weight"], expected.lora_B @ expected.lora_A, rtol=1e-5, atol=1e-6)


def test_the_scaling_is_in_the_factors(like, small, tmp_path):
    stored = lq.load(small)
    halved = {
        name: lq.StoredMatrix(own.quantized, own.lora_A, own.lora_B, 0.5) for name, own in stored.matrices.items()
    }
    lq.save(tmp_path / "halved.safetensors", halved, stored.tensors)
    for path, out in ((small, "whole"), (tmp_path / "halved.safetensors", "half")):
        export_checkpoint(path, tmp_path / out, "gguf", like=like, progress=False)
    whole, half = (adapters_of(tmp_path / out / "adapter.gguf") for out in ("whole", "half"))
    assert whole.keys() == half.keys()
    for name, own in whole.items():
        np.testing.assert_allclose(half[name], own / 2, rtol=1e-5, atol=1e-7)


def test_settings_and_vocabulary_are_those_of_the_other_file(like, small, tmp_path):
    export_checkpoint(small, tmp_path / "out", "gguf", like=like, progress=False)
    found, expected = settings_of(tmp_path / "out" / "model.gguf"), settings_of(like)
    assert found == expected | {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    model, tokenizer = load_llama(tmp_path / "out" / "model.gguf")
    assert tokenizer("then an inner").input_ids == load_llama(like)[1]("then an inner").input_ids
    expected, _ = load_llama(like)
    lq.nn.load_model(small, expected)
    for layer in quantized_layers(expected).values():
        layer.lora_B.data.zero_()
    with torch.no_grad():
        given = {"input_ids": torch.arange(12)[None]}
        torch.testing.assert_close(model(**given).logits, expected(**given).logits, rtol=1e-4, atol=1e-5)
    settings = settings_of(tmp_path / "out" / "adapter.gguf")
    assert [settings[key] for key in ("general.type", "general.architecture", "adapter.type")] == [
        "adapter",
        "llama",
        "lora",
    ]
    assert settings["adapter.lora.alpha"] == 0


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_the_merged_model(like, small, tmp_path, dtype, kind):
    sizes = merge_checkpoint(small, tmp_path / "out", like=like, dtype=dtype, progress=False)
    assert list(sizes) == ["model.gguf"]
    merge_checkpoint(small, tmp_path / "folder", dtype=dtype, progress=False)
    expected = load_file(tmp_path / "folder" / "model.safetensors")
    for name, own in values_of(tmp_path / "out" / "model.gguf").items():
        np.testing.assert_array_equal(own, expected[name].astype(np.float32))
    kinds = {own.name: own.tensor_type.name for own in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kind
    assert {own for name, own in kinds.items() if "norm" in name} == {"F32"}


def test_matrices_may_have_several_types_and_ranks(like, tmp_path):
    names = sorted(name for name in open_llama(like).weights if "layers" in name)
    texts = ["int4s/32:float16", "int5s/32:float16", "int8s/32:float16"]
    formats = {name: lq.BlockFormat.parse(texts[index % 3]) for index, name in enumerate(names)}
    small = decomposed(like, tmp_path / "small", formats, rank={name: index % 3 for index, name in enumerate(names)})
    export_checkpoint(small, tmp_path / "out", "gguf", like=like, progress=False)
    stored, found = lq.load(small), values_of(tmp_path / "out" / "model.gguf")
    for name, own in stored.matrices.items():
        np.testing.assert_array_equal(found[f"{name}.weight"], lq.dequantize(own.quantized))
    products = adapters_of(tmp_path / "out" / "adapter.gguf")
    assert len(products) == sum(len(own.lora_A) > 0 for own in stored.matrices.values())


def test_a_folder_of_safetensors_with_heads_and_16_bits(tmp_path):
    write_tiny_llama(tmp_path / "like.gguf", tied=False)
    (tmp_path / "dense").mkdir()
    dense = {name: own.astype(np.float16) for name, own in values_of(tmp_path / "like.gguf").items()}
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    small = decomposed(tmp_path / "dense", tmp_path / "small", rank=0)
    assert set(export_checkpoint(small, tmp_path / "out", "gguf", like=tmp_path / "like.gguf", progress=False)) == {
        "model.gguf"
    }
    found = values_of(tmp_path / "out" / "model.gguf")
    np.testing.assert_array_equal(found["lm_head.weight"], dense["lm_head.weight"].astype(np.float32))
    kinds = {own.name: own.tensor_type.name for own in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert (kinds["output.weight"], kinds["blk.0.ffn_up.weight"], kinds["output_norm.weight"]) == ("F16", "Q4_0", "F32")


def test_a_table_that_stands_for_the_same_numbers_is_copied(tmp_path):
    """The checkpoint has the numbers of an embedding in eight bits as float32. The new file has the eight bits again."""
    write_tiny_llama(tmp_path / "m.gguf")
    lq.decompose_checkpoint(
        tmp_path / "m.gguf",
        tmp_path / "q8",
        lq.BlockFormat.parse("int8s/32:float16"),
        rank=0,
        exclude=(),
        progress=False,
    )
    export_checkpoint(tmp_path / "q8", tmp_path / "out", "gguf", like=tmp_path / "m.gguf", progress=False)
    source = tmp_path / "out" / "model.gguf"
    small = decomposed(source, tmp_path / "small", include="*.mlp.*")
    assert lq.load(small).tensors["model.embed_tokens.weight"].dtype == np.float32
    export_checkpoint(small, tmp_path / "again", "gguf", like=source, progress=False)
    found, expected = (
        {own.name: own for own in gguf.GGUFReader(path).tensors} for path in (tmp_path / "again" / "model.gguf", source)
    )
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_v.weight"):
        assert found[name].tensor_type.name == "Q8_0"
        np.testing.assert_array_equal(found[name].data, expected[name].data)
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    # llama.cpp rounds inputs of tables in eight bits, which a dense model must not have.
    merge_checkpoint(small, tmp_path / "merged", like=source, dtype="float16", progress=False)
    kinds = {own.name: own.tensor_type.name for own in gguf.GGUFReader(tmp_path / "merged" / "model.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_up.weight"]) == ("F32", "F16")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_factors_of_rotary_frequencies_are_taken_over(tmp_path, dtype):
    frequencies = np.array([1.0, 0.5, 2.0, 4.0], dtype)
    write_tiny_llama(tmp_path / "like.gguf", change=lambda weights: weights.update({"rope_freqs.weight": frequencies}))
    write_tiny_llama(tmp_path / "m.gguf")
    small = decomposed(tmp_path / "m.gguf", tmp_path / "small")
    export_checkpoint(small, tmp_path / "out", "gguf", like=tmp_path / "like.gguf", progress=False)
    own = next(x for x in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if x.name == "rope_freqs.weight")
    assert own.data.tolist() == frequencies.tolist()


class TestRefusals:
    def test_formats_that_no_type_holds(self, like, tmp_path):
        small = decomposed(like, tmp_path / "small", lq.BlockFormat.parse("nf4/32:float16"))
        faults = can_export(small, "gguf")
        assert len(faults) == 14
        assert "codebook must be int4s" in faults[QUERY]
        with pytest.raises(FormatError, match="cannot be exported"):
            export_checkpoint(small, tmp_path / "out", "gguf", like=like, progress=False)
        assert not (tmp_path / "out").exists()

    def test_a_file_of_another_model(self, small, tmp_path):
        write_tiny_llama(tmp_path / "headed.gguf", tied=False)
        wide = {"model.layers.0.mlp.up_proj.weight": np.ones((96, 32), np.float32)}
        write_tiny_llama(tmp_path / "wide.gguf", change=lambda weights: weights.update(wide))
        less = {"model.layers.1.mlp.up_proj.weight"}
        write_tiny_llama(tmp_path / "less.gguf", change=lambda weights: [weights.pop(name) for name in less])
        for name, match in (
            ("headed", "it has lm_head"),
            ("wide", "has shape"),
            ("less", "it lacks model.layers.1.mlp.up_proj"),
        ):
            for call in (export_checkpoint, merge_checkpoint):
                given = ("gguf",) if call is export_checkpoint else ()
                with pytest.raises(InvalidArgumentError, match=match):
                    call(small, tmp_path / "out", *given, like=tmp_path / f"{name}.gguf", progress=False)
        assert not (tmp_path / "out").exists()

    def test_bases_and_files_that_do_not_go_together(self, like, small, tmp_path):
        for base, given in (("gguf", None), ("dense", like), ("bitsandbytes", like)):
            with pytest.raises(InvalidArgumentError, match="like must be a GGUF file"):
                export_checkpoint(small, tmp_path / "out", base, like=given, progress=False)

    def test_folders_that_are_not_empty_and_files_that_are_no_models(self, like, small, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(CheckpointError, match="is not an empty folder"):
            export_checkpoint(small, tmp_path / "out", "gguf", like=like, progress=False)
        (tmp_path / "no.gguf").write_bytes(b"no model")
        with pytest.raises(CheckpointError, match="does not begin with"):
            merge_checkpoint(small, tmp_path / "new", like=tmp_path / "no.gguf", progress=False)
        assert not (tmp_path / "new").exists()

    def test_a_vocabulary_that_is_not_text(self, like, small, tmp_path):
        data = like.read_bytes()
        (tmp_path / "like.gguf").write_bytes(data.replace(b"smollm", b"smo\xff\xfem"))
        with pytest.raises(CheckpointError, match="settings that gguf does not"):
            export_checkpoint(small, tmp_path / "out", "gguf", like=tmp_path / "like.gguf", progress=False)
        assert not (tmp_path / "out").exists()


class TestReading:
    def test_codes_and_scales_of_a_file(self, like):
        found = quantized_weights(like)
        assert list(found) == [quantized_name.removesuffix(".weight")]
        q = next(iter(found.values()))()
        assert str(q.format) == "int8s/32@-1:float16"
        np.testing.assert_array_equal(lq.dequantize(q), values_of(like)[quantized_name])

    def test_a_file_that_is_written_again_has_the_same_bytes(self, like, small, tmp_path):
        export_checkpoint(small, tmp_path / "first", "gguf", like=like, progress=False)
        path = tmp_path / "first" / "model.gguf"
        stored = lq.load(small)
        matrices = {
            name: lq.StoredMatrix(load(), np.zeros((0, shape[1]), np.float32), np.zeros((shape[0], 0), np.float32), 1.0)
            for name, load in quantized_weights(path).items()
            for shape in [stored.matrices[name].quantized.shape]
        }
        assert matrices.keys() == stored.matrices.keys()
        lq.save(tmp_path / "again.safetensors", matrices, tensors=stored.tensors)
        export_checkpoint(tmp_path / "again.safetensors", tmp_path / "second", "gguf", like=path, progress=False)
        assert (tmp_path / "second" / "model.gguf").read_bytes() == path.read_bytes()

    def test_damaged_scales_are_named(self, like, tmp_path):
        shutil.copy(like, tmp_path / "m.gguf")
        place = gguf.GGUFReader(like).tensors
        offset = next(own.data_offset for own in place if own.name == "blk.1.ffn_down.weight")
        with (tmp_path / "m.gguf").open("r+b") as file:
            file.seek(int(offset))
            file.write(b"\x00\x7c")
        with pytest.raises(CheckpointError, match="finite scales"):
            next(iter(quantized_weights(tmp_path / "m.gguf").values()))()
