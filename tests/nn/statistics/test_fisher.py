"""Fisher information against one backward pass for each example."""

from __future__ import annotations

import warnings

import pytest

from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import causal_lm_loss, collect_fisher, select_linears  # noqa: E402
from tests.nn.statistics.models import mixed_state_model, squared, state_of, tokens  # noqa: E402


def _brute_force(model, batches, loss) -> dict:
    """Mean over examples of squared gradients, from one backward pass per example."""
    weights = {name: module.weight for name, module in select_linears(model).items()}
    totals = {name: torch.zeros_like(w) for name, w in weights.items()}
    examples = [example[None] for batch in batches for example in batch]
    for example in examples:
        gradients = torch.autograd.grad(loss(model, example).sum(), list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient.square()
    return {name: total / len(examples) for name, total in totals.items()}


def _assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-9, msg=name)


class Twice(nn.Module):
    """Uses one layer at two depths."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Unused(nn.Module):
    """Uses one layer twice, but only one of the results."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        self.layer(2 * x)
        return self.layer(x)


class Doubled(nn.Module):
    """Changes a slice of its input in place."""

    def forward(self, x):
        x[..., :2] *= 2
        return x


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(input=x)


def _mlp(activation=None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation or nn.Tanh(), nn.Linear(6, 3, bias=False))


MODELS = {
    "mlp": _mlp,
    "in-place activation": lambda: _mlp(nn.ReLU(inplace=True)),
    "in-place activation in the middle": lambda: nn.Sequential(nn.Linear(4, 4), _mlp(nn.ReLU(inplace=True))),
    "in-place change of a slice": lambda: nn.Sequential(nn.Linear(4, 4), _mlp(Doubled())),
    "layer used twice": Twice,
    "result not used": Unused,
    "input by keyword": ByKeyword,
    "first layer frozen": lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(requires_grad=False), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4)], ids=["vectors", "sequences"])
def test_it_is_the_mean_square_of_single_gradients(name, shape):
    torch.manual_seed(0)
    model = MODELS[name]()
    batches = [torch.randn(shape), torch.randn(shape), torch.randn(1, *shape[1:])]
    found = collect_fisher(model, batches, loss=squared)
    model.requires_grad_()
    _assert_close(found, _brute_force(model, batches, squared))


def test_it_is_exact_on_a_language_model(llama):
    batches = [tokens(3), tokens(1)]
    found = collect_fisher(llama, batches)
    assert len(found) == 14
    assert "lm_head" not in found
    assert all(values.abs().sum() > 0 for values in found.values())
    _assert_close(found, _brute_force(llama, batches, causal_lm_loss))


def test_the_loss_is_that_of_transformers_on_each_sequence(llama):
    batch = tokens(3)
    losses = causal_lm_loss(llama, batch)
    assert losses.shape == (3,)
    for i in range(3):
        expected = llama(batch[i : i + 1], labels=batch[i : i + 1]).loss
        torch.testing.assert_close(losses[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "seen"),
    [(torch.zeros(3, 1, dtype=torch.int64), r"\(3, 1\)"), (torch.zeros(3, dtype=torch.int64), r"\(3,\)"), ({}, "dict")],
    ids=["one token", "one axis", "dict"],
)
def test_batches_without_a_next_token_are_refused(batch, seen):
    with pytest.raises(InvalidArgumentError, match=f"batch.*{seen}"):
        causal_lm_loss(nn.Identity(), batch)


def test_how_examples_are_batched_does_not_matter():
    torch.manual_seed(0)
    model, data = _mlp(), torch.randn(12, 4)
    whole = collect_fisher(model, [data], loss=squared)
    for size in (1, 5):
        _assert_close(collect_fisher(model, data.split(size), loss=squared), whole)


def test_include_and_exclude_select_layers():
    model = _mlp()
    assert list(collect_fisher(model, [torch.ones(1, 4)], loss=squared, include="2")) == ["2"]
    assert list(collect_fisher(model, [torch.ones(1, 4)], loss=squared, exclude="2")) == ["0"]


def test_half_precision_models_give_float32():
    found = collect_fisher(_mlp().bfloat16(), [torch.ones(2, 4, dtype=torch.bfloat16)], loss=squared)
    assert {values.dtype for values in found.values()} == {torch.float32}


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(off):
    model, data = _mlp(), torch.randn(3, 4)
    expected = collect_fisher(model, [data], loss=squared)
    with off():
        found = collect_fisher(model, [data.clone()], loss=squared)
    _assert_close(found, expected)
    assert not found["0"].is_inference()


class TestNothingIsLeftBehind:
    @pytest.fixture
    def model(self) -> nn.Module:
        return mixed_state_model()

    def test_after_success(self, model):
        before = state_of(model)
        collect_fisher(model, [torch.randn(5, 4)], loss=squared)
        assert state_of(model) == before

    @pytest.mark.parametrize("batch", [0, 1])
    def test_after_an_exception(self, model, batch):
        before = state_of(model)
        calls = []

        def loss(model, x):
            calls.append(x)
            if len(calls) > batch:
                raise KeyError("the caller's own")
            return squared(model, x)

        with pytest.raises(KeyError, match="own"):
            collect_fisher(model, [torch.randn(5, 4)] * 2, loss=loss)
        assert state_of(model) == before

    def test_after_a_loss_that_is_not_finite(self, model):
        before = state_of(model)
        with pytest.raises(NonFiniteError, match=r"loss.*example 2\b"):
            collect_fisher(model, [torch.ones(2, 4), torch.full((1, 4), float("nan"))], loss=squared)
        assert state_of(model) == before


def test_a_loss_of_no_dimensions_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"loss.*\(\)"):
        collect_fisher(_mlp(), [torch.ones(2, 4)], loss=lambda model, x: model(x).sum())


def test_no_batches_are_refused():
    with pytest.raises(InvalidArgumentError, match="batches"):
        collect_fisher(_mlp(), [], loss=squared)


def test_no_matching_layers_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"include.*nothing"):
        collect_fisher(_mlp(), [torch.ones(1, 4)], loss=squared, include="nothing")


def test_autocast_does_not_lower_the_precision_of_products():
    """Layers compute in the 8 bits of bfloat16, but the products of inputs and gradients are those of float32."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 3, bias=False))
    x = torch.randn(1, 200, 64).bfloat16().float()

    def loss(model, batch):
        return model(batch).float().sum(dim=(1, 2))

    with torch.autocast("cpu", torch.bfloat16):
        found = collect_fisher(layer, [x], loss=loss)
    expected = x.double().sum(dim=(0, 1)).square().expand(3, 64)
    torch.testing.assert_close(found["0"].double(), expected, rtol=1e-4, atol=1e-6)


def _sum(model, x):
    return model(x).sum(dim=1)


def test_squares_that_overflow_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(NonFiniteError, match=r"^gradient of the weight of '0'.*overflow float32"):
        collect_fisher(model, [torch.ones(1, 4), torch.full((1, 4), 1e25)], loss=_sum)


@pytest.mark.parametrize("size", [1e-21, 1e-30, 1e-40])
def test_squares_that_underflow_are_named_in_a_warning(size):
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"^gradients of weights of the") as caught:
        collect_fisher(model, [torch.full((3, 4), size)], loss=_sum)
    assert len(caught) == 1


def test_gradients_of_zero_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = collect_fisher(nn.Sequential(nn.Linear(4, 2)), [torch.zeros(3, 4), torch.zeros(1, 4)], loss=_sum)
    assert not found["0"].any()
