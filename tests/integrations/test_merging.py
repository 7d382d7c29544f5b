"""Dense models from checkpoints: values, names, orientations, files, and what is refused."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.checkpoint.folder import read_document_of, write_document
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations.merging import merge_checkpoint
from lqlora.integrations.sources import open_model
from tests.requirements import require_or_skip

FORMAT = lq.BlockFormat.parse("nf3/16:u8/256:float32")


def values(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def dense_of(matrix):
    product = np.float32(matrix.scaling) * (matrix.lora_B.astype(np.float32) @ matrix.lora_A.astype(np.float32))
    return lq.dequantize(matrix.quantized) + product


def tensors_of(folder):
    return {name: own.load() for name, own in open_model(folder).tensors.items()}


@pytest.fixture
def source(tmp_path):
    """A model with every layout that is restored: plain, transposed, in arrays of experts, and without ``.weight``."""
    folder = tmp_path / "dense"
    folder.mkdir()
    tensors = {
        "h.0.up.weight": values((48, 32)),
        "h.0.c_attn.weight": values((32, 96), 1),
        "h.0.experts.up_proj": values((3, 24, 32), 2),
        "h.0.experts.down_proj.weight": values((2, 16, 32), 3),
        "plain": values((32, 32), 4),
        "wte.weight": values((20, 32), 5).astype(ml_dtypes.bfloat16),
        "h.0.norm": values((32,), 6).astype(np.float16),
        "steps": np.array(3, np.int64),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32}))
    (folder / "tokenizer.json").write_text("{}")
    return folder, tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [3000, 2**30])
def test_names_shapes_and_values_are_those_of_the_source(source, tmp_path, dtype, shard_bytes):
    folder, tensors = source
    options = {"rank": 4, "max_iter": 2, "progress": False, "exclude": "wte", "scaling": 0.5}
    lq.decompose_checkpoint(folder, tmp_path / "small", FORMAT, shard_bytes=4000, **options)
    sizes = merge_checkpoint(tmp_path / "small", tmp_path / "merged", dtype=dtype, shard_bytes=shard_bytes)
    assert (len(sizes) > 1) == (shard_bytes == 3000)
    found = tensors_of(tmp_path / "merged")
    assert found.keys() == tensors.keys()
    matrices = lq.load(tmp_path / "small").matrices
    expected = {
        "h.0.up.weight": dense_of(matrices["h.0.up"]),
        "h.0.c_attn.weight": dense_of(matrices["h.0.c_attn"]).T,
        "h.0.experts.up_proj": np.stack([dense_of(matrices[f"h.0.experts.up_proj.{i}"]) for i in range(3)]),
        "h.0.experts.down_proj.weight": np.stack([dense_of(matrices[f"h.0.experts.down_proj.{i}"]) for i in range(2)]),
        "plain": dense_of(matrices["plain"]),
    }
    for name, own in tensors.items():
        assert found[name].shape == own.shape
        if name in expected:
            assert found[name].tobytes() == np.ascontiguousarray(expected[name].astype(dtype)).tobytes()
            assert np.linalg.norm(found[name].astype(np.float32) - own) < 0.3 * np.linalg.norm(own)
        else:
            assert found[name].dtype == own.dtype
            assert found[name].tobytes() == own.tobytes()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == {"model_type": "gpt2", "n_embd": 32}
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "merged" / "lqlora.json").exists()


def test_arrays_of_experts_that_are_stored_transposed(tmp_path):
    experts = values((3, 16, 32))
    (folder := tmp_path / "dense").mkdir()
    save_file({"l.experts.up": experts}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "dtype": "bfloat16"}))
    lq.decompose_checkpoint(folder, tmp_path / "small", FORMAT, rank=4, max_iter=2, progress=False)
    merge_checkpoint(tmp_path / "small", tmp_path / "merged", dtype="float32", progress=False)
    found = load_file(tmp_path / "merged" / "model.safetensors")["l.experts.up"]
    matrices = lq.load(tmp_path / "small").matrices
    for index, matrix in enumerate(found):
        np.testing.assert_array_equal(matrix.T, dense_of(matrices[f"l.experts.up.{index}"]))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"


def test_a_merged_model_can_be_decomposed_again(source, tmp_path):
    folder = source[0]
    options = {"rank": 4, "max_iter": 1, "progress": False}
    for number, place in enumerate([folder, tmp_path / "merged"]):
        lq.decompose_checkpoint(place, tmp_path / str(number), FORMAT, **options)
        merge_checkpoint(tmp_path / str(number), tmp_path / ("merged" if not number else "again"), dtype="float32")
    first, second = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)


def test_a_file_of_save(tmp_path):
    d = lq.decompose(values((32, 48)), FORMAT, 4, max_iter=1)
    lq.save(tmp_path / "m.safetensors", {"up": d}, {"norm": np.ones(3, np.float32)})
    sizes = merge_checkpoint(tmp_path / "m.safetensors", tmp_path / "merged", dtype="float32", progress=False)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert sizes == {"model.safetensors": (tmp_path / "merged" / "model.safetensors").stat().st_size}
    np.testing.assert_array_equal(found["up.weight"], dense_of(lq.load(tmp_path / "m.safetensors").matrices["up"]))
    np.testing.assert_array_equal(found["norm"], np.ones(3))


@pytest.mark.parametrize("make", ["dense_llama", "dense_gpt2"])
def test_plain_transformers_loads_it(tmp_path, make):
    require_or_skip("transformers", is_installed("transformers"))
    import torch

    from tests.integrations import tiny_models

    model = getattr(tiny_models, make)()
    model.save_pretrained(tmp_path / "dense")
    lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "small", FORMAT, rank=4, max_iter=2, progress=False)
    merge_checkpoint(tmp_path / "small", tmp_path / "merged", dtype="float32")
    found, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert getattr(found.config, "quantization_config", None) is None
    lq.nn.load_model(tmp_path / "small", model)
    tokens = tiny_models.tokens()
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


class TestRefusals:
    @pytest.fixture
    def small(self, source, tmp_path):
        lq.decompose_checkpoint(source[0], tmp_path / "small", FORMAT, rank=2, max_iter=1, progress=False)
        return tmp_path / "small"

    def test_a_folder_that_is_not_empty(self, small, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis").write_text("x")
        with pytest.raises(CheckpointError, match="not an empty folder"):
            merge_checkpoint(small, tmp_path / "mine")
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis"]
        with pytest.raises(CheckpointError):
            merge_checkpoint(small, small)

    def test_a_dtype_that_cannot_hold_the_values(self, tmp_path):
        d = lq.decompose(values((32, 48)) * np.float32(1e5), FORMAT, 4, max_iter=1)
        lq.save(tmp_path / "m.safetensors", {"up": d})
        with pytest.raises(InvalidArgumentError, match="'up', which float16"):
            merge_checkpoint(tmp_path / "m.safetensors", tmp_path / "merged", dtype="float16")
        assert not (tmp_path / "merged").exists()

    def test_a_damaged_or_missing_file(self, small, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere"):
            merge_checkpoint(tmp_path / "nowhere", tmp_path / "merged")
        path = next(small.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=path.name):
            merge_checkpoint(small, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_one_shard_of_several(self, small):
        path = next(small.glob("*.safetensors"))
        with pytest.raises(CheckpointError, match="is a part of the checkpoint"):
            merge_checkpoint(path, small.parent / "merged")

    @pytest.mark.parametrize(
        "origins",
        [
            {"a": {"matrices": ["h.0.up", "plain"]}},
            {"h.0.experts.up_proj.0.weight": {"matrices": ["h.0.up"]}},
            {"__metadata__": {"matrices": ["h.0.up"]}},
            {"a": {"matrices": []}},
            {"a": {"matrices": ["nowhere"]}},
            {"a": {"matrices": ["h.0.up"]}, "b": {"matrices": ["h.0.up"]}},
            {"a": 5},
            [],
        ],
        ids=["two", "another", "metadata", "none", "unknown", "twice", "number", "list"],
    )
    def test_a_crafted_document(self, small, tmp_path, origins):
        document = read_document_of(small)
        write_document(small, document.shards, {**document.metadata, "tensors": origins})
        with pytest.raises(CheckpointError, match=r"metadata\.tensors"):
            merge_checkpoint(small, tmp_path / "merged")

    def test_a_configuration_that_is_not_one(self, small, tmp_path):
        (small / "config.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            merge_checkpoint(small, tmp_path / "merged")
