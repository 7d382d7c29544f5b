"""One call from a dense language model to a compressed one: its stages are the public functions."""

from __future__ import annotations

import copy
import math

import pytest

import lqlora as lq
from lqlora import recipes
from lqlora.allocation import Plan
from lqlora.errors import CheckpointError, InfeasibleBudgetError, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from lqlora.recipes import compression  # noqa: E402 - needs torch
from lqlora.recipes.text import Split  # noqa: E402

WORDS, WIDTH = 24, 64


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(torch.nn.Module):
    """A model that has learned to predict the token after each."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(WORDS, WIDTH), torch.nn.Linear(WIDTH, WORDS)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def walks(count, length=20, seed=1):
    """Random walks on a table of likely successors."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(WORDS, (WORDS, 3), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(WORDS, (count, 1), generator=generator)
    for _ in range(length - 1):
        choice = torch.randint(3, (count,), generator=generator)
        tokens = torch.cat([tokens, successors[tokens[:, -1], choice][:, None]], dim=1)
    return tokens


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Model()
    recipes.fine_tune(model, walks(600, seed=5), learning_rate=5e-3, batch_size=10, progress=False)
    return model.eval()


SPLIT = recipes.split_sequences(walks(40), calibration=8, training=24, evaluation=8)


def compressed(trained, bits, split=SPLIT, **options):
    model = copy.deepcopy(trained)
    return model, recipes.compress(model, split, bits, progress=False, **options)


@pytest.mark.parametrize("codes", ["trellis", "scalar"])
@pytest.mark.parametrize("rank", [0, 4])
def test_each_stage_repairs_what_the_one_before_it_lost(trained, codes, rank):
    model, report = compressed(trained, 2.2, rank=rank, codes=codes)
    found = report.perplexities
    assert found["dense"] == recipes.perplexity(trained, SPLIT.evaluation, progress=False)
    assert found["dense"] < found["distilled"] < found["quantized"] * (1.0 if rank else 1.01)
    assert found["distilled"] == recipes.perplexity(model, SPLIT.evaluation, progress=False)
    assert [*report.quantization.layers] == [f"blocks.{i}.{side}" for i in range(2) for side in ("up", "down")]
    assert all(own.rank == rank for own in report.quantization.layers.values())
    assert report.formats == compression.candidates(codes, rank)[int(codes == "trellis")]
    assert report.distillation.held_out[report.distillation.best_step] < report.distillation.held_out[0]
    assert str(report).endswith(", ".join(f"{value:.4g} {name}" for name, value in found.items()))


@pytest.mark.parametrize("codes", ["trellis", "scalar"])
@pytest.mark.parametrize("rank", [0, 3])
def test_blocks_train_after_their_quantization(trained, codes, rank):
    split = SPLIT._replace(training=SPLIT.training[:0])
    reports = [compressed(trained, 2.2, split, rank=rank, codes=codes, tuning_steps=own)[1] for own in (0, 40)]
    for own in reports:
        assert all(layer.held_out_error > 0 for layer in own.quantization.layers.values())
    allowed = 1.01 if codes == "trellis" and not rank else 1.0  # scales alone gain little
    assert reports[1].perplexities["quantized"] < allowed * reports[0].perplexities["quantized"]
    assert reports[1].quantization.storage_bits == reports[0].quantization.storage_bits


def test_the_stages_are_the_public_functions(trained):
    model, report = compressed(trained, 3.2, rank=3, iterations=2)
    expected, fmt = copy.deepcopy(trained), lq.BlockFormat.parse("tcq3/64:u8/256:float32")
    outputs = lq.nn.collect_outputs(trained, [*SPLIT.training.split(1), *SPLIT.evaluation.split(1)], progress=False)
    lq.nn.quantize_blocks(
        expected, fmt, SPLIT.calibration.split(4), rank=3, fit="scale", max_iter=2, rtol=0.0, progress=False
    )
    own = report.quantization.layers.values()
    stored = sum(8 * layer.nbytes for layer in own) / sum(layer.size for layer in own)
    lq.nn.distill(
        expected, outputs, SPLIT.training.split(1), held_out=SPLIT.evaluation.split(1),
        learning_rate=4e-4 * (16 / 3) ** 0.7 / 4 ** (stored - 2.127), progress=False,
    )  # fmt: skip
    assert report.formats == fmt
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("codes", ["trellis", "scalar"])
def test_budgets_between_formats_are_planned(trained, codes):
    _, report = compressed(trained, 2.7, rank=2, codes=codes, split=SPLIT._replace(training=SPLIT.training[:0]))
    assert isinstance(report.formats, Plan)
    bits = sum(8 * own.nbytes for own in report.quantization.layers.values())
    size = sum(own.size for own in report.quantization.layers.values())
    assert 2.2 < bits / size <= 2.7
    assert len({str(own.format) for own in report.quantization.layers.values()}) > 1
    assert report.distillation is None
    assert report.perplexities.keys() == {"dense", "quantized"}


def test_a_layer_without_gradients_gets_the_fewest_bits(trained):
    model = copy.deepcopy(trained)

    class Scaled(Block):
        def forward(self, x):
            return x + 0.0 * self.down(torch.relu(self.up(x)))

    dead = Scaled()
    dead.load_state_dict(model.blocks[1].state_dict())
    model.blocks[1] = dead
    report = recipes.compress(model, SPLIT, 2.7, rank=0, progress=False)
    formats = {name: own.format for name, own in report.quantization.layers.items()}
    assert formats["blocks.1.up"].codebook.bits == formats["blocks.1.down"].codebook.bits == 1


@pytest.mark.parametrize(("codes", "rank"), [("trellis", 2), ("trellis", 0), ("scalar", 2), ("scalar", 0)])
@pytest.mark.parametrize("bits", [2.16, 2.2, 2.3, 4.2])
def test_no_budget_is_exceeded(trained, codes, rank, bits):
    """Layers this narrow have short blocks, and levels that are stored with each of them."""
    model = copy.deepcopy(trained)
    for block in model.blocks:
        block.down = torch.nn.Linear(2 * WIDTH, WIDTH)
    report = recipes.compress(model, SPLIT, bits, rank=rank, codes=codes, iterations=1, progress=False)
    stored = sum(8 * own.quantized.array.nbytes for own in model.modules() if isinstance(own, lq.nn.LQLinear))
    assert stored <= bits * sum(own.size for own in report.quantization.layers.values())


def test_ranks_are_clipped_to_the_matrices(trained):
    for bits in (2.2, 2.7):
        _, report = compressed(trained, bits, rank=1000, iterations=1)
        assert {own.rank for own in report.quantization.layers.values()} == {WIDTH}


def test_a_file_that_cannot_keep_the_run_is_found_before_any_work(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("notes", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "folder", "missing/run.safetensors"):
        model = copy.deepcopy(trained)
        with pytest.raises(CheckpointError):
            recipes.compress(model, SPLIT, 2.2, rank=2, checkpoint=tmp_path / name, progress=False)
        assert not any(isinstance(own, lq.nn.LQLinear) for own in model.modules())
    with pytest.raises(InvalidArgumentError, match="checkpoint must not be given"):
        recipes.compress(
            model, SPLIT._replace(training=SPLIT.training[:0]), 2.2, checkpoint=tmp_path / "a", progress=False
        )


@pytest.mark.parametrize("stage", ["perplexity", "collect_outputs", "quantize_blocks"])
def test_an_interrupt_before_the_model_is_quantized_leaves_it_as_it_was(trained, monkeypatch, stage):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compression, stage, interrupted)
    model = copy.deepcopy(trained)
    with pytest.raises(KeyboardInterrupt):
        recipes.compress(model, SPLIT, 2.2, progress=False)
    assert [type(own) for own in model.modules()] == [type(own) for own in trained.modules()]
    assert all(own.requires_grad for own in model.parameters())


def test_budgets_above_all_formats_take_the_largest(trained):
    _, report = compressed(trained, 16, rank=1, iterations=1)
    assert str(report.formats) == "tcq4/64:u8/256:float32"


def test_a_budget_below_all_formats_is_infeasible_and_changes_nothing(trained):
    model = copy.deepcopy(trained)
    with pytest.raises(InfeasibleBudgetError):
        recipes.compress(model, SPLIT, 0.5, rank=1, progress=False)
    assert {type(own) for own in model.modules()} == {type(own) for own in trained.modules()}


def test_the_distillation_goes_on_from_its_file(trained, tmp_path):
    path = tmp_path / "run.safetensors"
    model, first = compressed(trained, 2.2, rank=2, checkpoint=path)
    assert path.exists()
    again, second = compressed(trained, 2.2, rank=2, checkpoint=path)
    assert first.perplexities == second.perplexities
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 0}, "bits must be above 0"),
        ({"bits": math.nan}, "bits must be above 0"),
        ({"rank": -1}, "rank must be"),
        ({"iterations": 0}, "iterations must be"),
        ({"codes": "other"}, "codes must be"),
        ({"include": "nothing"}, "include"),
        ({"split": Split(SPLIT.calibration[:0], SPLIT.training, SPLIT.evaluation)}, "sequences for calibration"),
        ({"split": Split(SPLIT.calibration, SPLIT.training, SPLIT.evaluation[:, :1])}, "sequences for evaluation"),
        ({"progress": 3}, "progress must be"),
    ],
)
def test_what_is_refused(trained, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        recipes.compress(copy.deepcopy(trained), **({"split": SPLIT, "bits": 2.2, "progress": False} | changes))
