"""Tiny random models of transformers, by architecture: each cell of the table in the documentation, and further models."""

from __future__ import annotations

import pytest

import lqlora as lq
from tests.requirements import require_module

torch = require_module("torch")
require_module("transformers")

from lqlora.nn import LQLinear, load_model, quantize_model, save_model, select_linears  # noqa: E402 - needs torch
from tests.nn.architecture_checks import COLUMNS, ROWS, descriptions, outcome, read  # noqa: E402
from tests.nn.architectures import ARCHITECTURES  # noqa: E402

NF8 = lq.BlockFormat.parse("nf8/16:float32")


@pytest.mark.sampled(10)
@pytest.mark.filterwarnings("ignore")  # of transformers and of compilers
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "column", [pytest.param(column, marks=[pytest.mark.slow] if column == "compile" else []) for column in COLUMNS]
)
def test_each_cell_of_the_table_is_as_recorded(row, column, tmp_path):
    # If it is not: python -m tests.nn.architecture_checks
    assert outcome(row, column, tmp_path) == read()["rows"][row]["outcomes"][column]


def test_the_record_is_of_the_present_table():
    content = read()
    assert content["columns"] == descriptions()
    assert {row: own["model"] for row, own in content["rows"].items()} == {
        row: ARCHITECTURES[name].model for row, name in ROWS.items()
    }
    assert all(own["outcomes"].keys() == COLUMNS.keys() for own in content["rows"].values())


@pytest.fixture(params=[name for name in ARCHITECTURES if name not in ROWS.values()])
def architecture(request):
    return ARCHITECTURES[request.param]


@pytest.mark.slow
def test_conversion_training_and_files(architecture, tmp_path):
    model = architecture.make()
    linears = select_linears(model)
    with torch.no_grad():
        dense = architecture.run(model)
    report = quantize_model(model, NF8, rank=8, max_iter=2)
    assert list(report.layers) == list(linears)
    assert len(linears) == architecture.taken
    assert {group: list(part.layers) for group, part in report.dense.items() if part.layers} == architecture.left

    quantized = architecture.run(model)
    assert float((quantized.detach() - dense).abs().max() / dense.abs().max()) < 0.02
    quantized.square().mean().backward()
    heads = {
        name for name, _ in model.named_parameters() if any(name.startswith(f"{head}.") for head in architecture.trains)
    }
    factors = {f"{name}.lora_{x}" for name in linears for x in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == heads | factors
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient <= heads | factors
    assert all("expert" in name for name in (heads | factors) - with_gradient)  # an expert that no token chose

    save_model(tmp_path / "m.safetensors", model)
    fresh = architecture.make(seed=1)
    load_model(tmp_path / "m.safetensors", fresh)
    with torch.no_grad():
        assert torch.equal(architecture.run(fresh), architecture.run(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied llama", "bert", "gpt2"])
def test_a_tied_output_embedding_that_was_asked_for_is_saved_and_loaded(name, tmp_path):
    architecture = ARCHITECTURES[name]
    (head,) = architecture.left["output embeddings"]
    model = architecture.make()
    quantize_model(model, NF8, rank=4, include=["*", head], max_iter=2)
    assert isinstance(model.get_submodule(head), LQLinear)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    save_model(tmp_path / "m.safetensors", model)
    fresh = architecture.make(seed=1)
    load_model(tmp_path / "m.safetensors", fresh)
    with torch.no_grad():
        assert torch.equal(architecture.run(fresh), architecture.run(model))


@pytest.mark.slow
def test_layers_of_a_model_in_half_precision():
    model = ARCHITECTURES["falcon"].make().bfloat16()
    assert len(select_linears(model)) == ARCHITECTURES["falcon"].taken
    model = ARCHITECTURES["gpt2"].make().half()
    assert len(select_linears(model)) == ARCHITECTURES["gpt2"].taken
