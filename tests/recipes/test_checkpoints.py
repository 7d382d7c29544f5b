"""One call from the files of a language model to a folder: its stages, interruptions, and who opens the result."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

import lqlora as lq
from lqlora.allocation import Plan
from lqlora.errors import CheckpointError, InfeasibleBudgetError, InvalidArgumentError
from tests.requirements import require_module

torch, transformers, _ = (require_module(name) for name in ("torch", "transformers", "accelerate"))
from lqlora import recipes  # noqa: E402 - needs torch
from lqlora.integrations.exporting import export_checkpoint  # noqa: E402
from lqlora.integrations.gguf import load_llama  # noqa: E402
from lqlora.integrations.language_models import load_causal_model, load_language_model  # noqa: E402
from lqlora.integrations.sources import open_weights  # noqa: E402
from lqlora.recipes import checkpoints, compression  # noqa: E402
from tests.nn.architectures import ARCHITECTURES  # noqa: E402
from tests.tiny_gguf import write_tiny_llama  # noqa: E402 - needs gguf

require_module("gguf")

# transformers warns of its own changes.
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a Llama of two layers that has learned walks along the tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_llama(folder / "tiny.gguf")
    model, tokenizer = load_llama(folder / "tiny.gguf")
    recipes.fine_tune(model, walks(300, seed=5), learning_rate=5e-3, batch_size=10, progress=False)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def walks(count, seed=0, length=16):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 2, (count, length), generator=generator)
    steps[:, 0] = torch.randint(0, TOKENS, (count,), generator=generator)
    return steps.cumsum(1) % TOKENS


@pytest.fixture(scope="module")
def begun(trained, tmp_path_factory):
    """Results of the stages of a compression."""
    folder = tmp_path_factory.mktemp("begun")
    compressed(trained, folder / "out")
    return folder / "out-work"


SPLIT = recipes.split_sequences(walks(40), calibration=8, training=24, evaluation=8)
PLAIN = SPLIT._replace(training=SPLIT.training[:0])


def compressed(trained, folder, bits=2.4, split=SPLIT, **options):
    return recipes.compress_checkpoint(
        trained, folder, bits, split, **{"rank": 2, "iterations": 1, "progress": False} | options
    )


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ("scalar", 2),
        *(pytest.param(*own, marks=pytest.mark.slow) for own in (("scalar", 0), ("trellis", 0), ("trellis", 2))),
    ],
)
def test_the_folder_holds_the_model_that_was_measured(trained, tmp_path, codes, rank):
    report = compressed(trained, tmp_path / "out", 2.4, rank=rank, codes=codes)
    found = report.perplexities
    assert found["dense"] < found["distilled"] <= found["quantized"] * (1.0 if rank else 1.01)
    model, _ = load_language_model(tmp_path / "out", may_be_quantized=True)
    assert recipes.perplexity(model, SPLIT.evaluation, progress=False) == found["distilled"]
    dense, _ = load_language_model(trained)
    assert recipes.perplexity(dense, SPLIT.evaluation, progress=False) == found["dense"]
    stored = lq.load(tmp_path / "out")
    assert report.quantization.bits_per_weight <= 2.4
    assert {len(own.lora_A) for own in stored.matrices.values()} == {rank}
    assert {own.lora_A.dtype.name for own in stored.matrices.values()} == {"bfloat16"}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_stages_are_the_public_functions(trained, tmp_path):
    report = compressed(trained, tmp_path / "out", 2.7, PLAIN)
    assert isinstance(report.formats, Plan)
    assert report.quantization.bits_per_weight <= 2.7
    assert len({str(own.format) for own in report.quantization.matrices.values()}) > 1
    statistics = lq.integrations.calibration.calibrate_checkpoint(
        trained, tmp_path / "statistics", SPLIT.calibration.split(4), gradients=True, progress=False
    )
    weights = lq.integrations.sources.open_weights(trained)
    table = lq.cost_table(
        {name: weights[name] for name in statistics.inputs}, compression.candidates("trellis", 2), rank=2, clip_rank=True, fit="scale",
        max_iter=1, weighting=statistics.weighting(), progress=False,
    )  # fmt: skip
    plan = lq.allocate(table, bits_per_weight=2.7)
    assert plan.formats == report.formats.formats
    lq.decompose_checkpoint(
        trained, tmp_path / "expected", plan, rank=2, weighting=statistics.weighting(), fit="scale", max_iter=1, rtol=0.0,
        quantizer="nearest", factor_dtype="bfloat16", progress=False,
    )  # fmt: skip
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize(
    "stage",
    [
        "decompose_checkpoint",
        *(
            pytest.param(own, marks=pytest.mark.slow)
            for own in ("calibrate_checkpoint", "cost_table", "collect_outputs", "distill", "perplexity")
        ),
    ],
)
def test_a_run_goes_on_after_an_interruption(trained, tmp_path, monkeypatch, stage):
    compressed(trained, tmp_path / "whole", 2.7)
    expected, real = files(tmp_path / "whole"), getattr(checkpoints, stage)

    def interrupted(*arguments, **options):
        real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compressed(trained, tmp_path / "out", 2.7)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(checkpoints, stage, real)
    compressed(trained, tmp_path / "out", 2.7)
    assert files(tmp_path / "out") == expected


@pytest.mark.parametrize("changes", [{"bits": 2.3}, {"rank": 3}, {"codes": "scalar"}, {"iterations": 2}, {"split": PLAIN}], ids=lambda own: next(iter(own)))  # fmt: skip
def test_results_of_other_settings_are_refused(trained, begun, tmp_path, changes):
    shutil.copytree(begun, tmp_path / "out-work")
    before = files(tmp_path / "out-work")
    with pytest.raises(CheckpointError, match="was begun with"):
        compressed(trained, tmp_path / "out", **changes)
    assert files(tmp_path / "out-work") == before


def test_folders_of_others_are_left_alone(trained, tmp_path):
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="exists"):
        compressed(trained, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not empty"):
        compressed(trained, tmp_path / "new", work=tmp_path / "work")
    with pytest.raises(CheckpointError, match="exists"):
        compressed(trained, tmp_path / "out", split=PLAIN)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "out-work") == ["out", "work"]
    assert {(tmp_path / name / "letter.txt").read_text() for name in ("out", "work")} == {"dear"}


def test_what_is_refused_leaves_nothing(trained, tmp_path):
    cases = [
        ({"bits": 0.5}, InfeasibleBudgetError, "bits must be at least"),
        ({"bits": -1}, InvalidArgumentError, "bits must be"),
        ({"rank": -1}, InvalidArgumentError, "rank must be"),
        ({"codes": "morse"}, InvalidArgumentError, "codes must be"),
        ({"iterations": 0}, InvalidArgumentError, "iterations must be"),
        ({"split": SPLIT._replace(calibration=SPLIT.calibration[:0])}, InvalidArgumentError, "for calibration"),
        ({"split": SPLIT._replace(evaluation=SPLIT.evaluation[:0])}, InvalidArgumentError, "for evaluation"),
        ({"include": "nothing"}, InvalidArgumentError, "nothing"),
        ({"split": SPLIT._replace(training=SPLIT.training.float())}, InvalidArgumentError, "whole numbers"),
        ({"split": SPLIT._replace(training=[])}, InvalidArgumentError, "whole numbers"),
        ({"split": SPLIT._replace(evaluation=[[1, 2]])}, InvalidArgumentError, "whole numbers"),
        ({"split": SPLIT._replace(calibration=None)}, InvalidArgumentError, "whole numbers"),
        ({"split": SPLIT._replace(evaluation=SPLIT.evaluation + 1000)}, InvalidArgumentError, "must have tokens"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            compressed(trained, tmp_path / "out", **changes)
        assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError):
        compressed(tmp_path / "no", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_sequences_for_evaluation_need_no_model_in_memory(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_language_model", None)
    report = compressed(trained, tmp_path / "out", split=PLAIN._replace(evaluation=SPLIT.evaluation[:0]))
    assert report.perplexities == {}
    assert str(report) == str(report.quantization)
    assert lq.verify(tmp_path / "out").matrices


def test_selected_layers(trained, tmp_path):
    report = compressed(trained, tmp_path / "out", split=PLAIN, include="*.mlp.*", exclude="*.0.mlp.up_proj")
    names = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("down", "gate", "up")]
    assert sorted(report.quantization.matrices) == [name for name in names if name != "model.layers.0.mlp.up_proj"]


def test_selected_layers_have_the_budget(trained, tmp_path):
    options = {"codes": "scalar", "split": PLAIN, "include": "*.mlp.*"}
    with pytest.raises(InfeasibleBudgetError) as caught:
        compressed(trained, tmp_path / "out", 1, **options)
    report = compressed(trained, tmp_path / "out", caught.value.minimum, **options)
    assert report.quantization.bits_per_weight == caught.value.minimum


def test_numbers_of_other_types(trained, tmp_path):
    report = compressed(trained, tmp_path / "out", np.float32(2.4), PLAIN, rank=np.int64(2))
    assert report.quantization.bits_per_weight <= 2.4


def test_a_model_without_a_tokenizer(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    report = compressed(tmp_path / "model", tmp_path / "out")
    assert report.perplexities.keys() == {"dense", "quantized", "distilled"}


def test_another_model_is_refused(trained, tmp_path, monkeypatch):
    write_tiny_llama(tmp_path / "a.gguf", seed=0)
    write_tiny_llama(tmp_path / "b.gguf", seed=1)
    monkeypatch.setattr(checkpoints, "decompose_checkpoint", lambda *_, **__: _interrupt())
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path / "a.gguf", tmp_path / "out", split=PLAIN)
    with pytest.raises(CheckpointError, match="a model of other weights"):
        compressed(tmp_path / "b.gguf", tmp_path / "out", split=PLAIN)


def _interrupt():
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3 experts"])
def test_a_mixture_of_experts(tmp_path, name):
    model = ARCHITECTURES[name].make()
    model.save_pretrained(tmp_path / "model")
    report = compressed(tmp_path / "model", tmp_path / "out", 3.5)
    expected = {own for own in open_weights(tmp_path / "model") if ".experts." in own}
    assert expected
    assert expected <= report.quantization.matrices.keys()
    found = recipes.perplexity(
        load_causal_model(tmp_path / "out", may_be_quantized=True), SPLIT.evaluation, progress=False
    )
    assert found == report.perplexities["distilled"]


@pytest.mark.parametrize(("out", "work"), [("model", None), ("out", "out"), ("out", "out/work"), ("work/out", "work"), ("model/out", None), ("out", "model")])  # fmt: skip
def test_folders_in_each_other_are_refused_before_any_work(trained, tmp_path, out, work):
    shutil.copytree(trained, tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match="must not be, or be in"):
        compressed(tmp_path / "model", tmp_path / out, split=PLAIN, work=work and tmp_path / work)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


SCRIPT = """
import sys, torch, transformers, peft
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").eval()
assert not any(name.partition(".")[0] == "lqlora" for name in sys.modules)
tokens = torch.arange(2, 14)[None]
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_transformers_and_peft_alone_open_what_is_exported(trained, tmp_path):
    require_module("peft")
    compressed(trained, tmp_path / "out", 2.7)
    export_checkpoint(tmp_path / "out", tmp_path / "base", "dense", dtype="float32", progress=False)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "base", tmp_path / "logits"], capture_output=True, text=True, check=False, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, _ = load_language_model(tmp_path / "out", may_be_quantized=True)
    with torch.no_grad():
        expected = model(torch.arange(2, 14)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-4, atol=1e-4)
