"""The commands inspect, decompose and verify: what they print, as text and as JSON, and how they fail."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lqlora as lq
from tests.requirements import require_module

for package in ("typer", "rich", "gguf"):
    require_module(package)
from tests.cli.running import run, sentence  # noqa: E402 - needs typer
from tests.tiny_gguf import write_tiny_llama  # noqa: E402 - needs gguf

FORMAT = "nf3/16:u8/256:float32"


@pytest.fixture
def model(tmp_path):
    """A model file, and its matrices."""
    chance = np.random.default_rng(0)
    matrices = {
        f"layers.{layer}.{kind}": chance.standard_normal((32, 48)).astype(np.float32)
        for layer in range(2)
        for kind in ("up", "down")
    }
    others = {"norm.weight": np.ones(32, np.float32), "embed.weight": np.ones((4, 32), np.float32)}
    adapter = {"layers.0.up.lora_A.weight": np.ones((2, 48), np.float32)}
    path = tmp_path / "model.safetensors"
    save_file({f"{name}.weight": own for name, own in matrices.items()} | others | adapter, path)
    return path, matrices


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_model_is_decomposed_inspected_and_verified(model, tmp_path, capsys):
    path, matrices = model
    folder = tmp_path / "small"
    command = ("decompose", path, folder, "--format", FORMAT, "--rank", 4, "--iterations", 3, "--json")
    assert run(*command, "--dry-run") == 0
    planned = printed(capsys)
    assert not folder.exists()
    assert planned["estimated_memory_bytes"] > 0
    assert run(*command) == 0
    report = printed(capsys)
    assert report["total_bytes"] == planned["total_bytes"]
    assert report["estimated_seconds"] is None
    assert report["matrices"].keys() == matrices.keys()
    assert report["left_out"] == {"layers.0.up.lora_A.weight": {"reason": "of an adapter", "bytes": 384}}
    content = lq.verify(folder)
    for name, matrix in matrices.items():
        own = lq.decompose(matrix, lq.BlockFormat.parse(FORMAT), 4, fit="scale", max_iter=3)
        assert content.matrices[name].lora_A.tobytes() == own.lora_A.tobytes()
        assert report["matrices"][name]["relative_error"] == own.relative_error
    assert run("verify", folder, "--source", path, "--json") == 0
    found = printed(capsys)
    assert (found["matrices"], found["tensors"]) == (4, 2)
    assert found["relative_errors"] == pytest.approx(
        {name: own["relative_error"] for name, own in report["matrices"].items()}, rel=1e-6
    )
    assert run("inspect", folder, "--json") == 0
    found = printed(capsys)
    assert found["kind"] == "checkpoint"
    assert sum(own["bytes"] for own in found["tensors"].values()) == sum(report["copied"].values())
    assert {name: own["bytes"] for name, own in found["matrices"].items()} == {
        name: own["bytes"] for name, own in report["matrices"].items()
    }


def test_text_names_what_was_done(model, tmp_path, capsys):
    path, folder = model[0], tmp_path / "small"
    assert run("decompose", path, folder, "--format", FORMAT, "--rank", 40) == 0
    out = capsys.readouterr().out
    for text in (
        "4 matrices of 6,144 weights",
        "clipped ranks",
        "2 tensors copied",
        "1 tensor left out",
        f"Wrote {folder}",
    ):
        assert text in out
    assert run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert f"| `layers.*.up` | 2 | 32 x 48 | {FORMAT} | 32 |" in out
    assert run("verify", folder, "--source", path) == 0
    assert "Relative error: median" in capsys.readouterr().out
    assert run("inspect", path) == 0
    out = capsys.readouterr().out
    assert "| `layers.*.up` | 2 | 32 x 48 | float32 | 12,288 |" in out
    assert "Not part of the model: 1 tensors" in out


def test_a_plan_gives_formats_and_ranks(model, tmp_path, capsys):
    path = model[0]
    assert run("costs", path, "--output", tmp_path / "t.json", "--formats", f"nf2/16,{FORMAT}", "--ranks", "2,4") == 0
    assert run("plan", tmp_path / "t.json", "--bits", "7", "--output", tmp_path / "p.json") == 0
    capsys.readouterr()
    assert run("decompose", path, tmp_path / "small", "--plan", tmp_path / "p.json", "--json") == 0
    plan = lq.Plan.from_json((tmp_path / "p.json").read_text())
    found = printed(capsys)["matrices"]
    assert {name: (own["format"], own["rank"]) for name, own in found.items()} == {
        name: (str(own.format), own.rank) for name, own in plan.matrices.items()
    }


def test_a_gguf_file_is_inspected_and_decomposed(tmp_path, capsys):
    write_tiny_llama(tmp_path / "m.gguf")
    assert run("inspect", tmp_path / "m.gguf", "--json") == 0
    assert printed(capsys)["kind"] == "model"
    assert (
        run("decompose", tmp_path / "m.gguf", tmp_path / "small", "--format", FORMAT, "--rank", 2, "--iterations", 1)
        == 0
    )
    assert run("verify", tmp_path / "small", "--source", tmp_path / "m.gguf") == 0


def test_verify_finds_another_source(model, tmp_path, capsys):
    path, matrices = model
    assert run("decompose", path, tmp_path / "small", "--format", FORMAT, "--rank", 2) == 0
    changes = {
        "other values of 'layers.1.up'": {"layers.1.up.weight": matrices["layers.1.up"] + 1},
        "other values in the tensor 'norm.weight'": {"norm.weight": np.zeros(32, np.float32)},
        "lacks the tensor 'more.weight'": {"more.weight": np.ones(3, np.float32)},
        "of shape": {"layers.1.up.weight": np.ones((32, 16), np.float32)},
        "has the matrix 'layers.0.down'": {"layers.0.down.weight": None},
        "has the tensor 'norm.weight'": {"norm.weight": None},
    }
    tensors = {f"{name}.weight": own for name, own in matrices.items()}
    tensors |= {"norm.weight": np.ones(32, np.float32), "embed.weight": np.ones((4, 32), np.float32)}
    for text, change in changes.items():
        other = {name: own for name, own in (tensors | change).items() if own is not None}
        save_file(other, tmp_path / "other.safetensors")
        capsys.readouterr()
        assert run("verify", tmp_path / "small", "--source", tmp_path / "other.safetensors") == 2
        assert text in sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rank", "2"], "--format must be given, or --plan instead of it, got neither"),
        (["--rank", "2", "--format", FORMAT, "--plan", "p.json"], "got both"),
        (["--format", FORMAT], "--rank must be given with --format"),
        (["--plan", "model.safetensors"], "not a readable plan"),
        (["--rank", "2", "--format", FORMAT, "--iterations", "0"], "--iterations must be"),
        (["--rank", "2", "--format", FORMAT, "--include", "nothing"], "--include must match"),
        (["--rank", "2", "--format", FORMAT, "--shard-size", "5 apples"], "--shard-size must be"),
        (["--rank", "99", "--format", FORMAT, "--strict"], "--rank must be at most 32"),
    ],
    ids=["neither", "both", "no rank", "plan", "iterations", "include", "size", "strict"],
)
def test_errors_name_options(model, tmp_path, monkeypatch, arguments, text, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("decompose", "model.safetensors", "small", *arguments) == 2
    assert text in sentence(capsys.readouterr().err)
    assert not (tmp_path / "small").exists()


def test_inspect_refuses_what_is_no_model(tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"no model")
    assert run("inspect", tmp_path / "m.safetensors") == 2
    assert "m.safetensors" in sentence(capsys.readouterr().err)


def test_an_unfinished_folder_says_so(model, tmp_path, capsys):
    path, folder = model[0], tmp_path / "small"
    assert run("decompose", path, folder, "--format", FORMAT, "--rank", 2) == 0
    (folder / "lqlora.json").unlink()
    assert run("verify", folder) == 2
    assert "not a complete checkpoint" in sentence(capsys.readouterr().err)
    shutil.rmtree(folder)


def test_a_checkpoint_is_merged(model, tmp_path, capsys):
    path, matrices = model
    assert run("decompose", path, tmp_path / "small", "--format", FORMAT, "--rank", 2) == 0
    capsys.readouterr()
    assert run("merge", tmp_path / "small", tmp_path / "merged", "--dtype", "float32", "--json") == 0
    assert list(printed(capsys)["files"]) == ["model.safetensors"]
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: own.shape for name, own in found.items() if "layers" in name} == {
        f"{name}.weight": own.shape for name, own in matrices.items()
    }
    assert run("merge", tmp_path / "small", tmp_path / "other", "--shard-size", "4kB") == 0
    assert "bytes in" in capsys.readouterr().out
    assert run("merge", tmp_path / "small", tmp_path / "merged") == 2
    assert "not an empty folder" in sentence(capsys.readouterr().err)


def test_a_checkpoint_is_exported(model, tmp_path, capsys):
    require_module("torch")
    assert run("decompose", model[0], tmp_path / "small", "--format", "nf4/32:float32", "--rank", 2) == 0
    capsys.readouterr()
    assert run("export", tmp_path / "small", tmp_path / "base", "--base", "bitsandbytes", "--json") == 0
    found = printed(capsys)
    assert list(found["files"]) == ["model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "base" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert run("export", tmp_path / "small", tmp_path / "dense") == 0
    assert "the adapter" in capsys.readouterr().out
    assert run("decompose", model[0], tmp_path / "other", "--format", FORMAT, "--rank", 2) == 0
    assert run("export", tmp_path / "other", tmp_path / "no", "--base", "bitsandbytes") == 2
    assert "codebook must be" in sentence(capsys.readouterr().err)
