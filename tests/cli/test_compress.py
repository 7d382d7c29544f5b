"""The command compress: it writes the model that the library makes, or ends with one sentence and writes nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import lqlora as lq
from lqlora.errors import InvalidArgumentError
from tests.cli.running import run, sentence
from tests.requirements import require_module

for package in ("typer", "rich", "torch", "gguf", "transformers"):
    require_module(package)
torch = require_module("torch")
from lqlora import recipes  # noqa: E402
from lqlora.integrations.gguf import load_llama  # noqa: E402
from lqlora.integrations.language_models import load_language_model  # noqa: E402
from lqlora.integrations.statistics import open_statistics  # noqa: E402
from lqlora.integrations.transformers import mark_quantized  # noqa: E402
from tests.tiny_gguf import write_tiny_llama  # noqa: E402 - needs gguf

TEXT = "".join(f"The cat {i} sat on the mat in the hat, and {i * i} others. " for i in range(60))
SMALL = ("--length", 16, "--calibration", 4, "--training", 4, "--evaluation", 2, "--iterations", 1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_llama(folder / "tiny.gguf")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def _compress(inputs, output, *arguments, model=None):
    return run("compress", model or inputs / "tiny.gguf", output, "--text", inputs / "text.txt", *SMALL, *arguments)


def test_the_folder_holds_the_model_of_the_library(inputs, tmp_path, capsys):
    path = tmp_path / "out"
    assert _compress(inputs, path, "--bits", "3.13", "--rank", 2) == 0
    printed = capsys.readouterr().out
    _, tokenizer = load_llama(inputs / "tiny.gguf")
    sequences = recipes.token_sequences(tokenizer, TEXT, 16)
    split = recipes.split_sequences(sequences, calibration=4, training=4, evaluation=2)
    report = recipes.compress_checkpoint(
        inputs / "tiny.gguf", tmp_path / "again", 3.13, split, rank=2, iterations=1, progress=False
    )
    assert str(report).splitlines()[-1] in printed
    size = sum(own.stat().st_size for own in path.iterdir())
    assert f"Wrote {path} ({size:,} bytes)." in printed
    found, expected = (load_language_model(own, may_be_quantized=True)[0] for own in (path, tmp_path / "again"))
    tokens = sequences[:2]
    assert torch.equal(found(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(
    "arguments", [("--bits", "2.7", "--codes", "scalar", "--training", 0), ("--bits", "2.13", "--rank", 0)]
)
def test_folders_of_transformers_and_other_options(inputs, tmp_path, capsys, arguments):
    model, tokenizer = load_llama(inputs / "tiny.gguf")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    options = (*arguments, "--work", tmp_path / "work", "--json")
    assert _compress(inputs, output, *options, model=tmp_path / "model") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert len(lq.load(output).matrices) == len(numbers["matrices"])
    assert numbers["bits_per_weight"] <= float(arguments[1])
    assert (tmp_path / "work" / "statistics" / "statistics.json").exists()
    assert run("eval", output, "--text", inputs / "text.txt", "--length", 16, "--sequences", 2, "--json") == 0


def test_the_packaged_model_has_one_argument(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("lqlora.cli.compress.packaged_smollm2", lambda: inputs / "tiny.gguf")
    arguments = ("--bits", "3.13", "--rank", 1, "--text", inputs / "text.txt", *SMALL, "--training", 0)
    assert run("compress", tmp_path / "out", "--packaged", *arguments) == 0
    assert lq.verify(tmp_path / "out").matrices


def test_a_tokenizer_with_more_tokens_than_the_model(inputs, tmp_path, capsys):
    model, tokenizer = load_llama(inputs / "tiny.gguf")
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert _compress(inputs, tmp_path / "out", "--bits", "3", model=tmp_path / "model") == 2
    assert "got 20 embeddings and token" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "x"), "--bits must be a number"),
        (("--bits", "0.5"), "--bits"),
        (("--bits", "3", "--rank", -1), "--rank must be"),
        (("--bits", "3", "--calibration", 0), "calibration"),
        (("--bits", "3", "--calibration", 100000), "text must have at least 100006 seq"),
        (("--bits", "3", "--length", 0), "--length must be"),
        (("--bits", "3", "--length", 1000), "--length must be at most 128"),
        (("--bits", "3", "--packaged"), "and --packaged"),
        (("--bits", "3", "--evaluation", 0), "evaluation"),
    ],
)
def test_what_is_refused_leaves_nothing(inputs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert _compress(inputs, "out", *arguments) == 2
    assert message in sentence(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_read(inputs, tmp_path, capsys):
    empty, quantized = tmp_path / "empty", tmp_path / "quantized"
    empty.mkdir()
    model, _ = load_llama(inputs / "tiny.gguf")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(quantized)
    cut, (model, tokenizer) = tmp_path / "cut", load_llama(inputs / "tiny.gguf")
    tokenizer.save_pretrained(cut)
    state = {name: own for name, own in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(cut, state_dict=state)
    for folder, message in (
        (cut, "model.layers.1.mlp.up_proj.weight"),
        (empty, "cannot be read as a causal"),
        (quantized, "quantized already"),
        (tmp_path / "no", "no"),
    ):
        assert _compress(inputs, tmp_path / "out", "--bits", 3, model=folder) == 2
        assert message in sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


class TestEval:
    @pytest.fixture
    def folders(self, inputs, tmp_path):
        """A dense folder, and the same model quantized."""
        model, tokenizer = load_llama(inputs / "tiny.gguf")
        for name in ("dense", "small"):
            tokenizer.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / "dense")
        fmt = lq.BlockFormat.parse("nf3/16:float32")
        lq.nn.quantize_model(model, fmt, rank=2, max_iter=1, progress=False)
        mark_quantized(model)
        model.save_pretrained(tmp_path / "small")
        return tmp_path / "dense", tmp_path / "small", model, tokenizer

    def test_numbers_are_those_of_the_recipes(self, inputs, folders, capsys):
        dense, small, model, tokenizer = folders
        options = ("--text", inputs / "text.txt", "--length", 16, "--sequences", 3)
        assert run("eval", small, "--source", dense, *options, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        sequences = recipes.token_sequences(tokenizer, TEXT, 16)[:3]
        teacher, _ = load_llama(inputs / "tiny.gguf")
        assert found == {
            "tokens": 48,
            "perplexity": pytest.approx(recipes.perplexity(model, sequences, progress=False), rel=1e-5),
            "source_perplexity": pytest.approx(recipes.perplexity(teacher, sequences, progress=False), rel=1e-5),
            "divergence": pytest.approx(recipes.divergence(model, teacher, sequences, progress=False), rel=1e-3),
        }
        assert found["divergence"] > 0
        assert run("eval", inputs / "tiny.gguf", *options) == 0
        assert "perplexity" in capsys.readouterr().out
        assert run("eval", dense, "--source", inputs / "tiny.gguf", *options) == 0
        assert "Divergence: 0" in capsys.readouterr().out

    def test_faults_are_one_sentence(self, inputs, folders, capsys):
        options = ("--text", inputs / "text.txt", "--length", 16)
        for count in (0, 10**6):
            assert run("eval", folders[0], *options, "--sequences", count) == 2
            assert "--sequences must be from 1" in sentence(capsys.readouterr().err)
        assert run("eval", inputs, *options) == 2
        sentence(capsys.readouterr().err)


def test_the_divergence_is_that_of_the_definition():
    torch.manual_seed(0)
    first, second = (torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)) for _ in range(2))
    tokens = torch.randint(9, (5, 6))
    with torch.no_grad():
        p, q = second(tokens).double().softmax(-1), first(tokens).double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert recipes.divergence(first, second, tokens, progress=False) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InvalidArgumentError, match="one shape"):
        recipes.divergence(first, torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 8)), tokens)


class TestStatistics:
    @pytest.fixture
    def folders(self, inputs, tmp_path):
        """A dense folder, and statistics of it."""
        model, tokenizer = load_llama(inputs / "tiny.gguf")
        model.save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        options = ("--text", inputs / "text.txt", "--length", 16, "--sequences", 4)
        assert run("calibrate", tmp_path / "dense", tmp_path / "statistics", "--gradients", *options) == 0
        return tmp_path / "dense", tmp_path / "statistics"

    def test_costs_and_decompositions_are_weighted(self, inputs, folders, tmp_path, capsys):
        dense, statistics = folders
        options = ("--text", inputs / "text.txt", "--length", 16, "--sequences", 4)
        capsys.readouterr()
        assert run("calibrate", dense, statistics, "--gradients", *options, "--json") == 0  # it is complete
        assert json.loads(capsys.readouterr().out).items() >= {"matrices": 14, "tokens": 64}.items()
        formats = ("--formats", "nf2/16:float32,nf3/16:float32", "--ranks", 1, "--iterations", 1)
        assert run("costs", dense, "--output", tmp_path / "costs.json", "--statistics", statistics, *formats) == 0
        found = lq.CostTable.from_json((tmp_path / "costs.json").read_text())
        norms = open_statistics(statistics).weighting()
        weights = lq.integrations.sources.open_weights(dense)
        expected = lq.cost_table(weights, [lq.BlockFormat.parse(own) for own in formats[1].split(",")], ranks=[1], max_iter=1, weighting=norms)  # fmt: skip
        assert (found.costs == expected.costs).all()
        options = ("--format", "nf3/16@0:float32", "--rank", 0, "--quantizer", "gptq", "--iterations", 1)
        assert run("decompose", dense, tmp_path / "out", "--statistics", statistics, *options) == 0
        fmt = lq.BlockFormat.parse(options[1])
        report = lq.decompose_checkpoint(dense, tmp_path / "expected", fmt, rank=0, weighting=norms, fit="scale", quantizer="gptq", max_iter=1)  # fmt: skip
        numbers = json.loads((tmp_path / "out" / "lqlora.json").read_text())["shards"]
        assert numbers == json.loads((tmp_path / "expected" / "lqlora.json").read_text())["shards"]
        assert report.matrices

    def test_what_is_refused(self, inputs, folders, tmp_path, capsys):
        dense, statistics = folders
        values = np.ones((16, 16), np.float32)
        save_file({"other.weight": values}, tmp_path / "other.safetensors")
        save_file({"other.weight": values, "model.layers.0.mlp.up_proj.weight": values}, tmp_path / "both.safetensors")
        plain = ("--statistics", statistics, "--formats", "nf2/16:float32", "--ranks", 1)
        cases = [
            (("costs", tmp_path / "other.safetensors", "--output", tmp_path / "a.json", *plain), "--statistics must be those of this"),
            (("costs", tmp_path / "both.safetensors", "--output", tmp_path / "a.json", *plain), "--statistics must be of all"),
            (("costs", dense, "--output", statistics / "statistics.json", "--force", *plain), "is read or continued"),
            (("decompose", tmp_path / "other.safetensors", tmp_path / "out", "--statistics", statistics, "--format", "nf3/16", "--rank", 1), "--statistics must be those of this"),
            (("decompose", dense, tmp_path / "out", "--statistics", tmp_path, "--format", "nf3/16", "--rank", 1), "is not a folder of statistics"),
            (("calibrate", dense, tmp_path / "new", "--sequences", 0, "--length", 16, "--text", inputs / "text.txt"), "--sequences must be at least 1"),
            (("calibrate", inputs / "tiny.gguf", tmp_path / "new", "--length", 16, "--text", inputs / "text.txt"), "is not a folder of a model"),
        ]  # fmt: skip
        for arguments, message in cases:
            capsys.readouterr()
            assert run(*arguments) == 2
            assert message in sentence(capsys.readouterr().err)
        assert open_statistics(statistics).inputs
        assert not any((tmp_path / name).exists() for name in ("new", "out", "a.json"))
