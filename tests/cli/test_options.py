"""Values of every option and argument of every command: the command works, or ends with one sentence and code 2."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lqlora as lq
from lqlora.errors import InvalidArgumentError, LQLoRAError
from tests.cli.running import run, sentence
from tests.requirements import require_module

for package in ("typer", "rich", "torch", "matplotlib", "gguf", "transformers"):
    require_module(package)

torch = importlib.import_module("torch")
app = importlib.import_module("lqlora.cli.app").app
costs = importlib.import_module("lqlora.cli.costs")
plan = importlib.import_module("lqlora.cli.plan")
language_models = importlib.import_module("lqlora.integrations.language_models")
stages = importlib.import_module("lqlora.recipes.demo.stages")

#: Arguments of each command, then its options. An argument or option is replaced by each value.
COMMANDS = {
    "demo": ([], {"--output": "out", "--text": "text.txt", "--model": "model.gguf"}),
    "compress": (["model.gguf", "out"], {"--bits": "3", "--text": "text.txt", "--length": "4", "--rank": "1",
                                   "--calibration": "1", "--training": "0", "--evaluation": "1"}),
    "calibrate": (["model.gguf", "out"], {"--text": "text.txt", "--length": "4", "--sequences": "1"}),
    "costs": (["model.safetensors"], {"--output": "table.json", "--formats": "nf4/64", "--ranks": "1", "--iterations": "1"}),
    "plan": (["costs.json"], {"--bits": "4"}),
    "eval": (["model.gguf"], {"--source": "model.gguf", "--text": "text.txt", "--length": "4", "--sequences": "1"}),
    "inspect": (["checkpoint.safetensors"], {}),
    "decompose": (["model.safetensors", "folder"], {"--format": "nf4/64", "--rank": "1", "--iterations": "1"}),
    "export": (["checkpoint.safetensors", "exported"], {"--dtype": "float32"}),
    "merge": (["checkpoint.safetensors", "merged"], {"--dtype": "float32"}),
    "verify": (["checkpoint.safetensors"], {"--source": "model.safetensors"}),
}  # fmt: skip

#: Only one of these is given.
BUDGETS = ("--bits", "--bytes", "--max-error")

VALUES = {
    "empty": "", "word": "a", "zero byte": "a\0b", "escape": "\x1b[2J", "not UTF-8": "\udce9", "long": "x" * 5000, "nan": "nan",
    "infinite": "inf", "negative": "-1", "zero": "0", "half": "0.5", "2^63": str(2**63), "digits": "9" * 5000, "1e400": "1e400",
    "1e99999999": "1e99999999", "1/0": "1/0", "bytes": f"1{'0' * 400}GiB", "commas": ",,", "list": f"1,{'9' * 5000}",
    "pair": "a=b", "pair of a number": "*=1e99999999", "pair of a format": "*=nf4/64", "pattern": "re:(", "pair of a pattern": "re:(=1",
    "folder": ".",
}  # fmt: skip


def parameters():
    """The options that take a value, and the places of the arguments, by command."""
    commands = importlib.import_module("typer.main").get_command(app).commands
    found = []
    for name, command in commands.items():
        arguments = [own for own in command.params if not own.opts[0].startswith("-")]
        found += [(name, str(place)) for place in range(len(arguments))]
        found += [
            (name, own.opts[0]) for own in command.params if own not in arguments and not getattr(own, "is_flag", False)
        ]
    return found


@pytest.fixture(autouse=True)
def _inputs(tmp_path, monkeypatch):
    """Small valid inputs in an empty folder; commands that run a model end where they would read or measure it."""
    monkeypatch.chdir(tmp_path)
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    formats = [lq.BlockFormat.parse(text) for text in ("nf4/64", "nf2/64")]
    safetensors.numpy.save_file({"layers.0.weight": w}, "model.safetensors")
    Path("costs.json").write_text(lq.cost_table({"a": w}, formats, rank=1, max_iter=1).to_json(), encoding="utf-8")
    Path("text.txt").write_text("Words. " * 10, encoding="utf-8")
    lq.save("checkpoint.safetensors", {"layers.0": lq.decompose(w, formats[0], rank=1, max_iter=1)})

    def measure(*_, **__):
        raise InvalidArgumentError("model was read.")

    monkeypatch.setattr(stages, "load_llama", lambda _: (torch.nn.Sequential(torch.nn.Linear(64, 4)), None))
    monkeypatch.setattr(plan, "_picture", lambda _: b"")
    monkeypatch.setattr(stages, "_split", lambda *_: None)
    monkeypatch.setattr(stages, "_measure", measure)
    monkeypatch.setattr(language_models, "load_language_model", measure)
    monkeypatch.setattr(language_models, "load_tokenizer", measure)


def called(command, option, value):
    """The arguments of a call in which one of them is replaced."""
    arguments, options = COMMANDS[command]
    if option.isdigit():
        replaced = [*arguments[: int(option)], value, *arguments[int(option) + 1 :]]
        return [command, *(f"{key}={own}" for key, own in options.items()), "--", *replaced]
    options = {key: own for key, own in options.items() if key not in BUDGETS or option not in BUDGETS}
    return [command, *arguments, *(f"{key}={own}" for key, own in {**options, option: value}.items())]


def test_every_command_has_a_valid_call(capsys):
    assert {command for command, _ in parameters()} == COMMANDS.keys()
    for command, (arguments, options) in COMMANDS.items():
        code = run(command, *arguments, *(f"{key}={own}" for key, own in options.items()))
        assert (code, "model was read" in capsys.readouterr().err) == (
            (2, True) if command in ("demo", "compress", "calibrate", "eval") else (0, False)
        )


@pytest.mark.sampled(60)
@pytest.mark.parametrize("place", parameters(), ids=" ".join)
@pytest.mark.parametrize("kind", VALUES)
def test_every_value_works_or_is_refused_in_one_sentence(place, kind, capsys):
    code = run(*called(*place, VALUES[kind]))
    captured = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        message = sentence(captured.err)
        assert captured.out == ""
        assert message.isprintable()
        assert len(message.removeprefix("lqlora: ")) <= 400


SETTINGS = importlib.import_module("lqlora.recipes.demo.settings").Settings()
OPTIONS = costs.CostsOptions(formats="nf4/64", ranks="1", max_iter=1)


@pytest.mark.parametrize(
    "call",
    [
        lq.verify,
        lambda path: stages.run_demo(SETTINGS, path, text_file=Path("text.txt"), model_file=Path("model.gguf")),
        lambda path: stages.run_demo(SETTINGS, Path("out"), text_file=path, model_file=Path("model.gguf")),
        lambda path: stages.run_demo(SETTINGS, Path("out"), text_file=Path("text.txt"), model_file=path),
        lambda path: costs.run(path, Path("table.json"), OPTIONS, packaged=False, force=False),
        lambda path: costs.run(Path("model.safetensors"), path, OPTIONS, packaged=False, force=False),
        lambda path: costs.run(
            Path("model.safetensors"), Path("table.json"), dataclasses.replace(OPTIONS, store=path), packaged=False, force=False
        ),
        lambda path: plan.run(path, plan.PlanOptions(bits="4"), plan.PlanOutputs()),
        lambda path: plan.run(Path("costs.json"), plan.PlanOptions(bits="4"), plan.PlanOutputs(output=path)),
        lambda path: plan.run(Path("costs.json"), plan.PlanOptions(bits="4"), plan.PlanOutputs(png=path)),
    ],
    ids=["verify", "output of demo", "text", "model of demo", "model", "output of costs", "store", "table", "output of plan", "png"],
)  # fmt: skip
def test_a_zero_byte_in_a_path_is_refused_below_the_parser_too(call):
    before = sorted(Path().iterdir())
    with pytest.raises(LQLoRAError, match=r"a\\x00b"):
        call(Path("a\0b"))
    assert sorted(Path().iterdir()) == before
