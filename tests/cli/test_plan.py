"""The command plan: it makes the plan that the library makes, prints and writes it, and fails in one sentence."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import lqlora as lq
from tests.requirements import require_module

for package in ("typer", "rich", "matplotlib"):
    require_module(package)
from tests.cli.running import run, sentence  # noqa: E402 - needs typer

FORMATS = [lq.BlockFormat.parse(f"nf{bits}/16:float16") for bits in (2, 3, 4)]
NAMES = [f"layers.{layer}.{kind}_proj" for layer in range(3) for kind in ("q", "k", "up")]


@pytest.fixture(scope="module")
def table() -> lq.CostTable:
    rng = np.random.default_rng(2)
    weights = {name: (3.0**i) * rng.standard_normal((32, 32)) for i, name in enumerate(NAMES)}
    return lq.cost_table(weights, FORMATS, rank=2)


@pytest.fixture
def file(table, tmp_path):
    (tmp_path / "t.json").write_text(table.to_json())
    return tmp_path / "t.json"


class TestPlans:
    @pytest.mark.parametrize(
        ("words", "options"),
        [
            (["--bits", "3.7"], {"bits_per_weight": Fraction("3.7")}),
            (["--bytes", "4.3kB"], {"total_bytes": 4300}),
            (["--max-error", "5e9"], {"max_error": 5e9}),
            (["--bits", "4", "--tie", "fused"], {"bits_per_weight": 4, "ties": [[n for n in NAMES if i in n and "up" not in n] for i in "012"]}),
            (["--bits", "4", "--fix", "*.up_proj=nf2/16:float16"], {"bits_per_weight": 4, "fixed": {"*.up_proj": FORMATS[0]}}),
            (["--bits", "4", "--minimum-bits", "layers.0.*=4"], {"bits_per_weight": 4, "minimum_bits": {"layers.0.*": 4}}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )  # fmt: skip
    def test_the_plan_is_that_of_allocate(self, file, table, tmp_path, words, options):
        assert run("plan", file, *words, "--output", tmp_path / "p.json") == 0
        written = (tmp_path / "p.json").read_text()
        assert lq.Plan.from_json(written) == lq.allocate(table, **options)
        assert written.endswith("}\n")

    def test_its_table_and_constraints_are_printed(self, file, table, capsys):
        assert run("plan", file, "--bits", "3.5") == 0
        plan = lq.allocate(table, bits_per_weight=3.5)
        out = capsys.readouterr().out
        assert lq.reports.table(plan, by="kind") in out
        assert plan.limits[0].describe() in out
        assert "OPTIMAL" in out
        assert f"{plan.nbytes:,} bytes; low-rank factors, not counted: " in out

    def test_a_budget_that_does_not_bind_is_noted(self, file, capsys):
        assert run("plan", file, "--bits", "9") == 0
        assert "does not bind" in capsys.readouterr().out

    def test_the_same_call_writes_the_same_files(self, file, tmp_path):
        for folder in (tmp_path / "a", tmp_path / "b"):
            folder.mkdir()
            names = ("--output", folder / "p.json", "--png", folder / "p.png")
            assert run("plan", file, "--bits", "3.5", *names) == 0
            assert sorted(entry.name for entry in folder.iterdir()) == ["p.json", "p.png"]
        for name in ("p.json", "p.png"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / "p.png").read_bytes().startswith(b"\x89PNG\r\n")

    def test_a_dry_run_prints_the_same_and_writes_nothing(self, file, tmp_path, capsys):
        names = ("--output", tmp_path / "p.json", "--png", tmp_path / "p.png")
        assert run("plan", file, "--bits", "3.5", *names, "--dry-run") == 0
        dry = capsys.readouterr().out
        assert [entry.name for entry in tmp_path.iterdir()] == ["t.json"]
        assert run("plan", file, "--bits", "3.5", *names) == 0
        assert capsys.readouterr().out == dry.replace("Would write", "Wrote")
        for path in names[1::2]:
            assert f"Would write {path} ({path.stat().st_size:,} bytes)" in dry

    def test_force_does_not_replace_the_table(self, file, capsys):
        before = file.read_bytes()
        assert run("plan", file, "--bits", "3.5", "--output", file, "--force") == 2
        assert "is read or continued" in sentence(capsys.readouterr().err)
        assert file.read_bytes() == before

    def test_force_replaces_a_plan(self, file, tmp_path):
        (tmp_path / "p.json").write_text("old")
        assert run("plan", file, "--bits", "3.5", "--output", tmp_path / "p.json", "--force") == 0
        assert json.loads((tmp_path / "p.json").read_text())["lqlora_plan"] == 4


class TestFailures:
    @pytest.fixture
    def failure(self, file, tmp_path, capsys):
        """Run the command; it must fail with one sentence, which is returned, and change nothing."""

        def fail(*arguments: object, table=file) -> str:
            before = {entry: entry.read_bytes() for entry in tmp_path.rglob("*")}
            assert run("plan", table, *arguments) == 2
            assert {entry: entry.read_bytes() for entry in tmp_path.rglob("*")} == before
            captured = capsys.readouterr()
            assert captured.out == ""
            return sentence(captured.err)

        return fail

    def test_a_plan_that_exists(self, failure, tmp_path):
        (tmp_path / "p.png").write_text("old")
        words = failure("--bits", "3.5", "--output", tmp_path / "p.json", "--png", tmp_path / "p.png")
        assert "p.png" in words
        assert "--force" in words

    def test_two_files_of_one_name(self, failure, tmp_path):
        assert "two outputs" in failure("--bits", "3", "--output", tmp_path / "p", "--png", tmp_path / "p")

    def test_a_folder_that_does_not_exist(self, failure, tmp_path):
        assert "nowhere" in failure("--bits", "3", "--output", tmp_path / "nowhere" / "p.json")

    def test_a_name_that_is_a_folder(self, failure, tmp_path):
        assert "is a folder" in failure("--bits", "3", "--output", tmp_path, "--force")

    @pytest.mark.skipif(sys.platform == "win32", reason="links are those of other systems")
    @pytest.mark.parametrize("name", ["x" * 256, "loop", "file/p.json"])
    def test_a_name_that_no_file_can_have(self, failure, tmp_path_factory, name):
        folder = tmp_path_factory.mktemp("names")
        (folder / "loop").symlink_to("loop")
        (folder / "file").touch()
        assert name[:4] in failure("--bits", "3", "--output", folder / name)

    def test_a_folder_without_permission(self, failure, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        assert "Permission denied" in failure("--bits", "3", "--output", tmp_path / "p.json")

    @pytest.mark.parametrize("words", [[], ["--bits", "3", "--bytes", "3000"], ["--bits", "3", "--max-error", "1"]])
    def test_no_budget_and_two_budgets(self, failure, words):
        assert "--bits, --bytes" in failure(*words)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--bits", "many"], "many"),
            (["--bits", "1"], "infeasible"),
            (["--bytes", "10"], "infeasible"),
            (["--bytes", "lots"], "lots"),
            (["--max-error", "1e-9"], "infeasible"),
            (["--bits", "3.5", "--tie", "*.v_proj"], "v_proj"),
            (["--bits", "3.5", "--tie", "experts"], "experts"),
            (["--bits", "3.5", "--fix", "*.q_proj"], "q_proj"),
            (["--bits", "3.5", "--fix", "*.q_proj=nf8/16:float16"], "nf8/16:float16"),
            (["--bits", "3.5", "--minimum-bits", "*.q_proj=lots"], "lots"),
            (["--bits", "3.5", "--minimum-bits", "*.q_proj=99"], "q_proj"),
            (["--bits", "3.5", "--solver", "abacus"], "abacus"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_invalid_options_fail_in_one_sentence(self, failure, words, said):
        assert said in failure(*words)

    @pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"lqlora_cost_table": 99}', "\x00"])
    def test_a_file_that_is_not_a_table(self, failure, file, text):
        file.write_text(text)
        assert "t.json" in failure("--bits", "3")

    def test_a_table_that_is_missing(self, failure, tmp_path):
        assert "nowhere.json" in failure("--bits", "3", table=tmp_path / "nowhere.json")

    def test_a_full_disk_leaves_the_old_file(self, file, tmp_path, monkeypatch, capsys):
        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        (tmp_path / "p.json").write_text("old")
        assert run("plan", file, "--bits", "3.5", "--output", tmp_path / "p.json", "--force") == 2
        assert "No space left" in sentence(capsys.readouterr().err)
        assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()}["p.json"] == "old"
        assert len(list(tmp_path.iterdir())) == 2
