"""Layers that no batch reaches: all collectors name them together, and keep the statistics of the others."""

from __future__ import annotations

import pytest

from lqlora.errors import DeadLayerWarning, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import collect_fisher, collect_gram, collect_kronecker  # noqa: E402
from tests.nn.statistics.models import squared  # noqa: E402

COLLECTORS = {
    "fisher": collect_fisher,
    "gram": collect_gram,
    "kronecker": collect_kronecker,
}


class Partly(nn.Module):
    """Has a layer that runs, one without rows, one that never runs, and one whose result is not used."""

    def __init__(self):
        super().__init__()
        self.first, self.empty, self.never, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        self.empty(x[:0])
        with torch.no_grad():
            self.unused(x)
        return self.first(x)


@pytest.fixture(params=COLLECTORS)
def name(request):
    return request.param


def test_they_are_listed_together_and_the_others_are_kept(name):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = Partly()
    dead = ["empty", "never", *(["unused"] if name != "gram" else [])]
    with pytest.warns(DeadLayerWarning, match=rf"include.*{len(dead)} of 4.*{', '.join(dead)}") as caught:
        found = COLLECTORS[name](model, [x, x + 1], loss=squared)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert list(found) == [own for own in ("first", "unused") if own not in dead]
    alone = COLLECTORS[name](model, [x, x + 1], loss=squared, include="first")
    for own, other in zip(found["first"], alone["first"], strict=True):
        assert torch.equal(own, other)


def test_if_all_are_dead_it_is_an_error(name):
    with pytest.raises(InvalidArgumentError, match=r"include.*none of 2 \(empty, never\)"):
        COLLECTORS[name](Partly(), [torch.ones(3, 4)], loss=squared, include=["empty", "never"])


@pytest.mark.parametrize("collect", [collect_fisher, collect_kronecker])
def test_a_loss_without_gradients_reaches_no_layer(collect):
    with pytest.raises(InvalidArgumentError, match=r"include.*a gradient"):
        collect(Partly(), [torch.ones(3, 4)], loss=lambda model, x: squared(model, x).detach(), include="first")
