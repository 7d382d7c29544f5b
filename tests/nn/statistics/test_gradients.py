"""Gradients of single examples in layers of any layout, against one pass for each example."""

from __future__ import annotations

import pytest

from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import collect_fisher, collect_kronecker  # noqa: E402
from tests.nn.statistics.layouts import MODELS, Checkpointed, Experts, Positions, assert_close, by_example, make  # noqa: E402
from tests.nn.statistics.models import squared  # noqa: E402


def _batches(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, 4, generator=generator, dtype=torch.float64) for shape in shapes]


def _expected(model, batches):
    return by_example(model, [lambda m, x=x: squared(m, x[None]) for batch in batches for x in batch])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "shapes", [[(3, 5), (1, 2)], [(4, 4)], [(19, 2), (17, 3)]], ids=["few", "as many tokens", "more than 16"]
)
def test_they_are_those_of_one_pass_for_each_example(name, shapes):
    model, batches = make(MODELS[name]), _batches(*shapes)
    fisher, kronecker = _expected(model, batches)
    assert_close(collect_fisher(model, batches, loss=squared), fisher)
    found = collect_kronecker(model, batches, loss=squared)
    assert_close({name: own for name, (own, _) in found.items()}, {name: own for name, (own, _) in kronecker.items()})


@pytest.mark.parametrize("examples", [2, 3, 4])
def test_an_expert_may_see_as_many_tokens_as_there_are_examples(examples):
    """All tokens of the first expert are in the first example, and they are as many as the batch has examples."""
    (x,) = _batches((examples, 6))
    x[..., 0] = -x[..., 0].abs()
    x[0, :examples, 0] *= -1
    model = make(Experts)
    fisher, _ = _expected(model, [x])
    assert_close(collect_fisher(model, [x], loss=squared), fisher)


def test_losses_may_depend_on_other_examples():
    """With statistics of the batch, each loss has gradients at all rows."""

    def loss(model, x):
        h = model(x)
        return (h - h.mean(dim=0)).pow(3).flatten(1).sum(dim=1)

    model, (x,) = make(lambda: nn.Sequential(nn.Linear(4, 4))), _batches((5, 3))
    squares = [torch.autograd.grad(own, model[0].weight, retain_graph=True)[0].square() for own in loss(model, x)]
    assert_close(collect_fisher(model, [x], loss=loss), {"0": sum(squares) / 5})


@pytest.mark.parametrize("factors", [[2, 0, 1], [1, 0, 3], [1, 1, 1], [3, 3, -1], [0, 0, 5]])
def test_a_row_of_several_examples_has_the_squares_of_its_parts(factors):
    """The parts of one row are multiples of each other, so that only their sizes tell whose they are."""
    model, x = make(lambda: nn.Sequential(nn.Linear(4, 1))), torch.ones(1, 4, dtype=torch.float64)
    sizes = torch.tensor(factors, dtype=torch.float64)
    found = collect_fisher(model, [x], loss=lambda m, x: sizes * m(x)[0, 0])["0"]
    assert found.unique().tolist() == pytest.approx([float(sizes.square().mean())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_other_dtypes_it_is_as_exact_as_the_gradients(dtype):
    model, (x,) = make(Experts, dtype=dtype), _batches((20, 6))
    loss = lambda m, x: 1e-2 * squared(m, x).float()  # noqa: E731
    expected, _ = by_example(model, [lambda m, x=x: loss(m, x[None].to(dtype)) for x in x])
    found = collect_fisher(model, [x.to(dtype)], loss=loss)
    for name, values in expected.items():
        scale = values.abs().max().item()
        torch.testing.assert_close(found[name], values.float(), rtol=0.1, atol=0.05 * scale)


def test_a_pass_for_each_example_runs_only_for_rows_of_several():
    passes = []
    for kind in (Experts, Positions):
        seen = []

        def loss(model, x, seen=seen):
            losses = squared(model, x)
            losses.register_hook(lambda _: seen.append(1))
            return losses

        collect_fisher(make(kind), _batches((5, 3)), loss=loss)
        collect_fisher(make(kind), _batches((1, 3)), loss=loss)
        passes.append(len(seen))
    assert passes == [2 + 1, 2 + 5 + 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("examples", "digits"), [(2, 1), (16, 1), (17, 2), (256, 2), (257, 3)])
def test_few_passes_find_the_example_of_each_row_in_every_dtype(dtype, examples, digits):
    passes = []

    def loss(model, x):
        losses = 1000 * squared(model, x).float()
        losses.register_hook(lambda _: passes.append(1))
        return losses

    (batch,) = _batches((examples, 3))
    collect_fisher(make(Experts).to(dtype), [batch.to(dtype)], loss=loss)
    assert len(passes) == digits + 1


@pytest.mark.parametrize("collect", [collect_fisher, collect_kronecker])
def test_reentrant_checkpointing_is_refused_by_name(collect):
    with pytest.raises(InvalidArgumentError, match=r"'layer'.*use_reentrant=False"):
        collect(make(lambda: Checkpointed(reentrant=True)), _batches((2, 3)), loss=squared)
