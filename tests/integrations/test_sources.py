"""Matrices of model files: names, selection, values, and files that cannot be read."""

from __future__ import annotations

import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lqlora._optional import is_installed
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations.sources import open_weights
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
    with pytest.raises(CheckpointError, match=r"'w'.*m\.safetensors"):
        load()
