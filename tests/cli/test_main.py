"""The command line as a whole: help, usage errors, missing packages, and the commands demo and verify."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import lqlora as lq
from lqlora import cli
from tests.cli.running import run, sentence
from tests.requirements import require_module

for package in ("typer", "rich"):
    require_module(package)


class TestMain:
    def test_help_lists_the_commands(self, capsys):
        assert run("--help") == 0
        text = capsys.readouterr().out
        assert all(command in text for command in ("demo", "costs", "plan", "verify"))

    def test_an_option_that_is_not_a_number_is_a_usage_error(self, tmp_path, capsys):
        assert run("demo", "--rank", "many", "--output", tmp_path / "out") == 2
        assert "Traceback" not in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("package", "command"), [("typer", "--help"), ("torch", "demo")])
    def test_without_a_package_that_a_command_needs(self, monkeypatch, capsys, package, command):
        self._forget(monkeypatch, package)
        assert run(command) == 2
        assert f"needs {package}: pip install 'lqlora[demo]'" in sentence(capsys.readouterr().err)

    def test_verify_needs_no_torch(self, monkeypatch, capsys, tmp_path):
        self._forget(monkeypatch, "torch")
        assert run("verify", tmp_path / "nowhere") == 2
        message = sentence(capsys.readouterr().err)
        assert "nowhere" in message
        assert "needs torch" not in message

    @staticmethod
    def _forget(monkeypatch, package) -> None:
        """Make importing a package fail, and import the command line and the demo anew."""
        prefixes = ("lqlora.cli.", "lqlora.recipes.demo.", "lqlora.recipes.evaluation", "lqlora.recipes.fine_tuning")
        for name in [n for n in sys.modules if n.startswith(prefixes) and n != "lqlora.cli.console"]:
            monkeypatch.delitem(sys.modules, name)
            if name.startswith("lqlora.cli."):
                monkeypatch.delattr(cli, name.rpartition(".")[2])
        monkeypatch.setitem(sys.modules, package, None)


class TestVerify:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        """A checkpoint of two small matrices."""
        weights = np.random.default_rng(0).standard_normal((2, 16, 32)).astype(np.float32)
        found = {f"layers.{i}": lq.decompose(w, lq.BlockFormat(lq.NF4, 16), rank=2) for i, w in enumerate(weights)}
        lq.save(tmp_path / "c.safetensors", found)
        return tmp_path / "c.safetensors"

    def _refused(self, path, capsys) -> str:
        assert run("verify", path) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return sentence(captured.err)

    def test_an_intact_checkpoint_is_counted(self, checkpoint, capsys):
        assert run("verify", checkpoint) == 0
        assert "2 quantized matrices" in capsys.readouterr().out

    def test_a_truncated_checkpoint(self, checkpoint, capsys):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
        assert "truncated" in self._refused(checkpoint, capsys)

    def test_a_changed_byte(self, checkpoint, capsys):
        raw = bytearray(checkpoint.read_bytes())
        raw[-3] ^= 4
        checkpoint.write_bytes(raw)
        assert "SHA-256" in self._refused(checkpoint, capsys)

    def test_a_missing_file(self, tmp_path, capsys):
        assert "nowhere" in self._refused(tmp_path / "nowhere", capsys)

    def test_in_a_process_of_its_own(self, tmp_path):
        command = [sys.executable, "-m", "lqlora.cli", "verify", str(tmp_path / "nowhere")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert (done.returncode, done.stdout) == (2, "")
        assert "nowhere" in sentence(done.stderr)


class TestDemo:
    """The command passes its options on; tests/recipes/test_demo.py tests the demo itself."""

    @pytest.fixture(autouse=True)
    def _needs(self):
        for package in ("torch", "matplotlib", "gguf", "transformers"):
            require_module(package)

    @pytest.fixture
    def inputs(self, tmp_path):
        from tests.tiny_gguf import write_tiny_llama

        write_tiny_llama(tmp_path / "tiny.gguf")
        (tmp_path / "text.txt").write_text("The cat sat on the mat in the hat, and others. " * 60, encoding="utf-8")
        return ("--model", tmp_path / "tiny.gguf", "--text", tmp_path / "text.txt", "--rank", 2)

    @pytest.mark.slow
    def test_it_prints_the_table_that_it_writes(self, inputs, tmp_path, capsys):
        assert run("demo", "--fast", "--seed", 3, "--bits", "2.6", "--output", tmp_path / "out", *inputs) == 0
        captured = capsys.readouterr()
        assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") in captured.out
        assert str(tmp_path / "out") in captured.out
        assert "Fine-tuning LQ-LoRA 2.6: " in captured.err
        assert lq.verify(tmp_path / "out" / "lq-lora-2.6.safetensors").metadata["seed"] == 3

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--rank", 0], "--rank must be at least 1"),
            (["--bits", "nan"], "nan"),
            (["--text", "nowhere.txt"], "nowhere.txt"),
            ([], "--force"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_errors_are_one_sentence_about_options(self, inputs, tmp_path, capsys, options, expected):
        output = tmp_path / "out"
        if not options:
            output.mkdir()
        before = sorted(tmp_path.rglob("*"))
        assert run("demo", "--fast", "--output", output, *inputs, *options) == 2
        message = sentence(capsys.readouterr().err)
        assert expected in message
        assert "=True" not in message
        assert sorted(tmp_path.rglob("*")) == before
