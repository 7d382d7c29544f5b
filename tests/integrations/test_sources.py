"""Matrices of model files: names, selection, values, and files that cannot be read."""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations.bitsandbytes import to_bitsandbytes
from lqlora.integrations.compressed_tensors import to_compressed_tensors
from lqlora.integrations.gptq import to_gptq
from lqlora.integrations.sources import open_model, open_weights
from tests.requirements import require_or_skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of two safetensors files in three dtypes, and its matrices without embedding and output head."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    first = {f"layers.{i}.q": rng.standard_normal((32, 48)).astype(ml_dtypes.bfloat16) for i in range(2)}
    second = {"layers.0.k": rng.standard_normal((16, 48)).astype(np.float16), "table": rng.standard_normal((16, 16))}
    others = {"model.embed_tokens.weight": np.ones((8, 8)), "lm_head.weight": np.ones((8, 8))}
    others |= {"norm.weight": np.ones(8), "codes": np.ones((8, 8), np.uint8), "kernel": np.ones((2, 2, 2))}
    save_file({f"{name}.weight": w for name, w in first.items()}, folder / "a.safetensors")
    save_file({"layers.0.k.weight": second["layers.0.k"], "table": second["table"], **others}, folder / "b.safetensors")
    return folder, {name: w.astype(np.float32) for name, w in (first | second).items()}


def test_a_folder_has_the_float_matrices_of_all_its_files(shards):
    folder, weights = shards
    found = open_weights(folder)
    assert sorted(found) == sorted(weights)
    for name, load in found.items():
        assert load().dtype == np.float32
        np.testing.assert_array_equal(load(), weights[name], err_msg=name)


def test_a_file_has_its_own_matrices(shards):
    assert list(open_weights(str(shards[0] / "a.safetensors"))) == ["layers.0.q", "layers.1.q"]


def test_a_gguf_file_has_the_linear_layers(tmp_path):
    require_or_skip("gguf", is_installed("gguf"))
    from tests.tiny_gguf import write_tiny_llama

    weights = write_tiny_llama(tmp_path / "m.gguf")
    found = open_weights(tmp_path / "m.gguf")
    assert len(found) == 14
    for name, load in found.items():
        np.testing.assert_array_equal(load(), weights[f"{name}.weight"], err_msg=name)


def test_loaders_can_be_pickled(shards):
    load = open_weights(shards[0])["table"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(load))(), load())


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("layers.0.*", (), ["layers.0.k", "layers.0.q"]),
        (re.compile("model.*"), (), ["model.embed_tokens"]),
        (["layers.*", "lm_head"], ["*.q"], ["layers.0.k", "lm_head"]),
        (lambda name: name.endswith("e"), (), ["table"]),
    ],
    ids=["shell", "expression", "several", "function"],
)
def test_patterns_select_matrices(shards, include, exclude, expected):
    assert sorted(open_weights(shards[0], include, exclude)) == expected


def test_a_selection_of_nothing_names_matrices(shards):
    with pytest.raises(InvalidArgumentError, match=r"include.*\*\.v.*layers\.0"):
        open_weights(shards[0], "*.v")


@pytest.mark.parametrize("name", ["nowhere.gguf", "nowhere.safetensors", "nowhere"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["broken.gguf", "broken.safetensors"])
def test_an_invalid_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no model at all")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_weights(tmp_path / name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name}.*\.safetensors"):
        open_weights(tmp_path)


def test_two_matrices_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"w": np.ones((8, 8))}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="'w'"):
        open_weights(tmp_path)


def test_a_file_that_was_truncated_later_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": np.ones((8, 8))}, path)
    load = open_weights(path)["w"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*'w'"):
        load()


def one(value, shape=(8, 8)):
    return np.full(shape, value, np.float32)


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def refusal(path):
    """Return the sentence with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_model(path)
    message = str(caught.value)
    assert len(message) <= 400
    assert message.isprintable()
    return message


class TestFolders:
    @pytest.fixture
    def model(self, tmp_path):
        """A model in two parts with an index, once more as consolidated, an adapter, and the file of something else."""
        save_file({"a.weight": one(1), "norm": one(1, (8,))}, tmp_path / "model-00001-of-00002.safetensors")
        save_file({"b.weight": one(2)}, tmp_path / "model-00002-of-00002.safetensors")
        save_file({"layers.a.weight": one(1), "layers.b.weight": one(2)}, tmp_path / "consolidated.safetensors")
        factors = {"base.a.lora_A.weight": one(3, (2, 8)), "base.a.lora_B.weight": one(3, (8, 2))}
        save_file(factors, tmp_path / "adapter_model.safetensors")
        save_file({"other.weight": one(4)}, tmp_path / "other.safetensors")
        parts = {"a.weight": 1, "norm": 1, "b.weight": 2}
        write_index(tmp_path, {name: f"model-0000{part}-of-00002.safetensors" for name, part in parts.items()})
        return tmp_path

    def test_the_index_decides(self, model):
        contents = open_model(model)
        assert list(contents.weights) == ["a", "b"]
        assert contents.left_out == {"norm": ("of 1 dimension", 32)}
        assert [file.name for file in contents.files] == [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
        assert [file.name for file in contents.unread] == [
            "adapter_model.safetensors",
            "consolidated.safetensors",
            "other.safetensors",
        ]
        line = contents.describe_left_out()
        assert (
            line
            == "Left out: 1 tensor of 1 dimension (32 bytes; norm), 3 files not read (adapter_model.safetensors, …)."
        )

    def test_without_an_index_adapters_and_the_consolidated_copy_are_left_out(self, model):
        (model / "model.safetensors.index.json").unlink()
        assert sorted(open_model(model).weights) == ["a", "b", "other"]

    def test_a_whole_model_stands_before_other_files(self, model):
        (model / "model.safetensors.index.json").unlink()
        save_file({"whole.weight": one(5)}, model / "model.safetensors")
        assert list(open_model(model).weights) == ["whole"]

    def test_an_index_of_another_name_decides(self, model):
        (model / "model.safetensors.index.json").rename(model / "diffusion.safetensors.index.json")
        assert list(open_model(model).weights) == ["a", "b"]
        write_index(model, {"other.weight": "other.safetensors"}, "other.safetensors.index.json")
        assert "2 indexes" in refusal(model)

    def test_a_consolidated_model_alone_is_read(self, tmp_path):
        save_file({"a.weight": one(1)}, tmp_path / "consolidated.safetensors")
        assert list(open_model(tmp_path).weights) == ["a"]

    @pytest.mark.parametrize("part", [1, 2])
    @pytest.mark.parametrize("indexed", [True, False])
    def test_a_missing_part_is_named(self, model, part, indexed):
        name = f"model-0000{part}-of-00002.safetensors"
        (model / name).unlink()
        if not indexed:
            (model / "model.safetensors.index.json").unlink()
        assert name in refusal(model)
        assert name in refusal(model / f"model-0000{3 - part}-of-00002.safetensors")

    def test_a_part_stands_for_the_model(self, model):
        assert list(open_model(model / "model-00002-of-00002.safetensors").weights) == ["a", "b"]

    def test_an_adapter_alone_is_no_model(self, model):
        message = refusal(model / "adapter_model.safetensors")
        assert "no weight matrix" in message
        assert "2 tensors of an adapter" in message

    def test_a_tensor_that_the_index_does_not_list_is_left_out(self, model):
        save_file(
            {"b.weight": one(2), "c.weight": one(9), "a.weight": one(8)}, model / "model-00002-of-00002.safetensors"
        )
        contents = open_model(model)
        assert list(contents.weights) == ["a", "b"]
        assert contents.weights["a"]()[0, 0] == 1
        assert contents.left_out["c.weight"] == ("not listed in the index", 256)

    def test_a_tensor_that_only_the_index_has_is_named(self, model):
        write_index(model, {"a.weight": "other.safetensors"})
        message = refusal(model)
        assert "other.safetensors" in message
        assert "'a.weight'" in message

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{",
            "null",
            "[" * 100_000,
            '{"weight_map": []}',
            '{"weight_map": {}}',
            '{"weight_map": {"a": 5}}',
            '{"weight_map": {"a": "../x.safetensors"}}',
            '{"weight_map": {"a": "/etc/x.safetensors"}}',
            '{"weight_map": {"a": "x.bin"}}',
            '{"weight_map": {"a": "\\u0000.safetensors"}}',
            '{"weight_map": {"\\u001b[2J": "missing.safetensors"}}',
            '{"weight_map": ' + "9" * 5000 + "}",
            "\xff",
        ],
        ids=lambda text: text[:24],
    )
    def test_an_index_of_another_content_is_refused(self, model, text):
        (model / "model.safetensors.index.json").write_text(text, encoding="latin-1")
        assert "model.safetensors.index.json" in refusal(model)

    def test_an_index_that_is_no_file_or_too_long_is_refused(self, model):
        path = model / "model.safetensors.index.json"
        with path.open("r+b") as file:
            file.truncate(2**27 + 1)
        assert str(2**27) in refusal(model)
        path.unlink()
        path.mkdir()
        assert path.name in refusal(model)


class TestCodedWeights:
    @pytest.mark.parametrize(
        "tensors",
        [
            {"a.weight": np.ones((8, 8), ml_dtypes.float8_e4m3fn), "a.weight_scale_inv": one(1, (2, 2))},
            {"a.weight": np.ones((8, 8), ml_dtypes.float8_e5m2)},
            {"a.weight": np.ones((8, 8), ml_dtypes.float8_e4m3fn), "a.weight_scale": one(1, (8, 2))},
            {"a.weight": np.ones((8, 8), ml_dtypes.float8_e4m3fn), "a.weight_scale": np.ones((8, 1), np.uint8)},
            {"experts.up": np.ones((2, 8, 8), ml_dtypes.float8_e4m3fn), "experts.up_scale": one(1, (2, 8, 1))},
            {"a.qweight": np.ones((1, 8), np.int32), "a.scales": one(1, (2, 8)), "a.qzeros": np.ones((2, 1), np.int32)},
            {"a.weight": np.ones((8, 1), np.uint32), "a.scales": one(1, (8, 2)), "a.biases": one(1, (8, 2))},
            {"a.weight_packed": np.ones((8, 1), np.int32), "a.weight_scale": one(1, (8, 2))},
            {"a.weight": np.ones((8, 8), np.int8), "a.SCB": one(1, (8,))},
            {"experts_blocks": np.ones((2, 8, 4), np.uint8), "experts_scales": np.ones((2, 8), np.uint8)},
        ],
        ids=[
            "float8",
            "float8 alone",
            "float8, other scales",
            "float8, scales of 8 bits",
            "float8 experts",
            "GPTQ",
            "MLX",
            "compressed-tensors",
            "int8",
            "MXFP4",
        ],
    )
    def test_codes_and_scales_are_refused_by_name(self, tmp_path, tensors):
        save_file(tensors | {"plain.weight": one(1)}, tmp_path / "model.safetensors")
        message = refusal(tmp_path)
        assert "quantized" in message
        assert any(repr(name) in message for name in tensors)

    def test_a_checkpoint_of_this_library_is_refused(self, tmp_path):
        d = lq.decompose(one(1, (16, 16)), lq.BlockFormat.parse("nf4/16:float32"), rank=2)
        lq.save(tmp_path / "q.safetensors", {"a": d}, {"plain": one(1)})
        assert "lqlora.load" in refusal(tmp_path)

    def test_weights_of_bitsandbytes_are_decoded(self, tmp_path):
        rng = np.random.default_rng(0)
        expected, first, second = {}, {"plain.weight": one(1), "norm.weight": one(1, (8,))}, {}
        for name, text in {"a": "nf4/64:float32", "b": "fp4-bnb/32:d8/256:float32"}.items():
            q = lq.quantize(rng.standard_normal((16, 48)).astype(np.float32), lq.BlockFormat.parse(text))
            expected[name] = lq.dequantize(q)
            tensors = to_bitsandbytes(q, f"{name}.weight", "bfloat16")
            second |= {key: tensors.pop(key) for key in list(tensors) if "absmax" in key}  # parts may lie in two files
            first |= tensors
        save_file(first, tmp_path / "model-00001-of-00002.safetensors")
        save_file(second, tmp_path / "model-00002-of-00002.safetensors")
        contents = open_model(tmp_path)
        assert sorted(contents.weights) == ["a", "b", "plain"]
        assert list(contents.left_out) == ["norm.weight"]
        for name, dense in expected.items():
            load = pickle.loads(pickle.dumps(contents.weights[name]))
            assert load().tobytes() == dense.tobytes()

    def test_a_broken_weight_of_bitsandbytes_is_named(self, tmp_path):
        tensors = to_bitsandbytes(lq.quantize(one(1), lq.BlockFormat.parse("nf4/64:float32")), "a.weight")
        save_file({key: array for key, array in tensors.items() if "absmax" not in key}, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match=r"m\.safetensors.*'a\.weight'.*absmax"):
            open_model(tmp_path / "m.safetensors").weights["a"]()

    @pytest.mark.parametrize("key", ["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"])
    def test_a_part_of_another_dtype_is_named(self, tmp_path, key):
        tensors = to_bitsandbytes(lq.quantize(one(1), lq.BlockFormat.parse("nf4/64:float32")), "a.weight")
        tensors[key] = tensors[key].astype(ml_dtypes.float8_e5m2)
        save_file(tensors, tmp_path / "m.safetensors")
        message = refusal(tmp_path)
        assert repr(key) in message
        assert "F8_E5M2" in message

    def test_a_vector_of_bitsandbytes_is_listed(self, tmp_path):
        q = lq.quantize(one(1, (64,)), lq.BlockFormat.parse("nf4/64:float32"))
        save_file(to_bitsandbytes(q, "a.weight") | {"b.weight": one(1)}, tmp_path / "m.safetensors")
        contents = open_model(tmp_path / "m.safetensors")
        assert list(contents.weights) == ["b"]
        assert contents.left_out["a.weight"].reason == "of 1 dimension"
        np.testing.assert_array_equal(contents.tensors["a.weight"].load(), one(1, (64,)))

    @pytest.mark.parametrize("key", ["a.weight", "a.weight.quant_state.bitsandbytes__nf4"])
    def test_a_weight_of_bitsandbytes_without_codes_or_description_is_named(self, tmp_path, key):
        tensors = to_bitsandbytes(lq.quantize(one(1), lq.BlockFormat.parse("nf4/64:float32")), "a.weight")
        del tensors[key]
        save_file(tensors | {"b.weight": one(1)}, tmp_path / "m.safetensors")
        assert "'a.weight'" in refusal(tmp_path / "m.safetensors")

    def test_factors_of_an_adapter_are_no_weights(self, tmp_path):
        factors = {f"a.lora_{x}{end}": one(1) for x in "AB" for end in ("", ".weight", ".default.weight")}
        factors |= {"to_q_lora.up.weight": one(1), "q.lora_linear_layer.down.weight": one(1), "lora_A.weight": one(1)}
        factors |= {"flora_A.weight": one(1), "a.lora_Above": one(1)}
        save_file(factors | {"a.base_layer.weight": one(1)}, tmp_path / "m.safetensors")
        assert sorted(open_model(tmp_path).weights) == ["a.base_layer", "a.lora_Above", "flora_A"]


def test_what_is_no_matrix_is_listed(tmp_path):
    tensors = {
        "experts": one(1, (2, 4, 8)),
        "mask": np.ones((8, 8), bool),
        "ids": np.ones((1, 8), np.int64),
        "scalar": one(1, ()),
    }
    save_file(tensors | {"a": one(1)}, tmp_path / "m.safetensors")
    contents = open_model(tmp_path)
    assert list(contents.weights) == ["a"]
    assert contents.left_out == {
        "experts": ("of 3 dimensions", 256),
        "mask": ("of dtype BOOL", 64),
        "ids": ("of dtype I64", 64),
        "scalar": ("of 0 dimensions", 4),
    }
    assert contents.describe_left_out().count(";") == 4


def test_a_model_without_a_matrix_says_what_it_has(tmp_path):
    save_file({"experts": one(1, (2, 4, 8))}, tmp_path / "m.safetensors")
    assert "1 tensor of 3 dimensions (256 bytes; experts)" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["folder.safetensors", "zero\0byte.safetensors", "n" * 300 + ".safetensors", "\x1b[2J"]
)
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder.safetensors").mkdir()
    refusal(tmp_path / name)


@pytest.mark.slow
def test_twenty_thousand_matrices_are_opened_in_linear_time(tmp_path):
    tensors = {f"layers.{i}.weight": one(1, (1, 1)) for i in range(20_000)}
    save_file(tensors, tmp_path / "m.safetensors")
    start = time.perf_counter()
    assert len(open_model(tmp_path).weights) == 20_000
    assert time.perf_counter() - start < 3


def coded(text, shape=(32, 32)):
    return lq.quantize(np.random.default_rng(0).standard_normal(shape).astype(np.float32), lq.BlockFormat.parse(text))


def codes_of(tensors):
    """Names of coded weights of any layout, with the tensors that they are computed from, the one in their place first."""
    found = {key.split(".quant_state")[0]: [key.split(".quant_state")[0]] for key in tensors if ".quant_state" in key}
    for name, parts in found.items():
        parts.extend(key for key in tensors if key.startswith(f"{name}."))
    for key in tensors:
        own = key.rpartition(".")[0]
        if key.endswith(".qweight"):
            found[f"{own}.weight"] = [key, *(f"{own}.{part}" for part in ("qzeros", "scales", "g_idx"))]
        elif key.endswith(".weight_packed"):
            found[f"{own}.weight"] = [key, *(f"{own}.weight_{part}" for part in ("scale", "shape", "zero_point"))]
        elif key.endswith(".weight_scale") and f"{own}.weight_packed" not in tensors:
            found[f"{own}.weight"] = [f"{own}.weight", key, f"{own}.input_scale"]
    return found


#: Tensors of a model by kind, with one name that the kind may have.
PIECES = {
    "matrix": lambda name: {f"{name}.weight": one(1)},
    "half": lambda name: {f"{name}.weight": one(1).astype(ml_dtypes.bfloat16)},
    "bias": lambda name: {f"{name}.bias": one(1, (8,))},
    "scalar": lambda name: {f"{name}.scale": one(1, ())},
    "empty": lambda name: {f"{name}.weight": one(1, (0, 8))},
    "table": lambda name: {f"{name}.ids": np.ones((2, 8), np.int64)},
    "kernel": lambda name: {f"{name}.conv": one(1, (2, 2, 2))},
    "experts": lambda name: {f"{name}.experts.up_proj": one(1, (3, 4, 8))},
    "experts of one": lambda name: {f"{name}.experts.up.weight": one(1, (1, 4, 8))},
    "bitsandbytes": lambda name: to_bitsandbytes(
        lq.quantize(one(1), lq.BlockFormat.parse("nf4/32:d8/256:float32")), f"{name}.weight"
    ),
    "vector of bitsandbytes": lambda name: to_bitsandbytes(
        lq.quantize(one(1, (9,)), lq.BlockFormat.parse("fp4-bnb/32:float32")), f"{name}.weight"
    ),
    "GPTQ": lambda name: to_gptq(coded("affine4/8:float16"), name, checkpoint_format="gptq_v2"),
    "compressed-tensors": lambda name: to_compressed_tensors(coded("affine3/8:float16"), f"{name}.weight"),
    "float8": lambda name: {
        f"{name}.weight": one(1, (8, 8)).astype(ml_dtypes.float8_e4m3fn),
        f"{name}.weight_scale": one(1, (8, 1)),
        f"{name}.input_scale": one(1, ()),
    },
    "adapter": lambda name: {f"{name}.lora_A.weight": one(1, (2, 8)), f"{name}.lora_B.weight": one(1, (8, 2))},
}


@given(
    kinds=st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=8),
    layout=st.sampled_from(["file", "folder", "parts", "index"]),
    files=st.integers(1, 3),
    model_type=st.sampled_from([None, "gpt2", "gpt_oss", "llama", 5]),
)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_every_tensor_is_taken_or_listed_with_its_bytes(kinds, layout, files, model_type):
    tensors = {"first.weight": one(1), "layers.c_attn.weight": one(1, (8, 4))}
    for number, kind in enumerate(kinds):
        tensors |= PIECES[kind](f"layers.{number}")
    files = 1 if layout in ("file", "folder") else files
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        names = [f"model-{number + 1:05d}-of-{files:05d}.safetensors" for number in range(files)]
        place = {key: names[number % files] for number, key in enumerate(tensors)}
        for name in names:
            save_file({key: own for key, own in tensors.items() if place[key] == name}, folder / name)
        if layout == "index":
            write_index(folder, place)
        settings = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}  # others are told by their tensors
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "quantization_config": settings}))
        contents = open_model(folder / names[0] if layout == "file" else folder)
        listed = {key: own for key, own in contents.left_out.items() if key not in contents.tensors}
        parts = {part: name for name, own in codes_of(tensors).items() for part in own}
        taken = [*(key for key in contents.tensors if key not in parts.values()), *parts]
        assert sorted([*taken, *listed]) == sorted(tensors)
        assert sum(own.nbytes for own in [*contents.tensors.values(), *listed.values()]) == sum(
            own.nbytes for own in tensors.values()
        )
        matrices = [name for own in contents.tensors.values() for name in own.matrices]
        assert matrices == list(contents.weights)
        # What holds no matrix is listed, and nothing else is.
        assert contents.left_out.keys() - listed.keys() == {
            key for key, own in contents.tensors.items() if not own.matrices
        }
        for key, own in contents.tensors.items():
            array = own.load()
            assert (array.shape, str(array.dtype)) == (own.shape, own.dtype)
            if key not in parts.values():
                assert array.tobytes() == tensors[key].tobytes()
            for index, name in enumerate(own.matrices):
                matrix = (array[index] if array.ndim == 3 else array).astype(np.float32)
                turned = (model_type == "gpt2" and "c_attn" in key) or (model_type == "gpt_oss" and "experts" in key)
                np.testing.assert_array_equal(contents.weights[name](), matrix.T if turned else matrix)


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf", "nothing.safetensors"])
def test_a_model_that_is_not_there_is_named(tmp_path, name):
    assert refusal(tmp_path / name).endswith(f"{name} does not exist.")
