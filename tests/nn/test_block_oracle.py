"""Calibration block after block against the whole model run with hooks, its first blocks quantized by hand."""

from __future__ import annotations

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting import InputGram
from tests.nn.architectures import ARCHITECTURES
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import collect_gram, quantize_blocks, quantize_model, select_linears  # noqa: E402

NF2 = lq.BlockFormat.parse("nf2/8:float32")
BODIES = {
    "llama": "model.layers", "qwen3": "model.layers", "gpt2": "transformer.h", "falcon": "transformer.h", "bloom": "transformer.h",
    "mamba": "backbone.layers", "bert": "bert.encoder.layer", "deberta classifier": "deberta.encoder.layer", "vit": "vit.layers",
    "mixtral": "model.layers", "t5": "decoder.block",
}  # fmt: skip


def words(seed: int):
    return {"input_ids": torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(seed))}


def padded():
    batch = words(5)
    batch["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return batch


def by_hand(model, path, batches, exclude=()):
    """Quantize each block with the Gram matrices that the whole model has, and return those."""
    grams = {}
    for key, _ in model.get_submodule(path).named_children():
        names = [name for name in select_linears(model, exclude=exclude) if name.startswith(f"{path}.{key}.")]
        found = collect_gram(model, batches, include=names, progress=False)
        grams |= found
        norms = {name: InputGram(gram.numpy()) for name, gram in found.items()}
        quantize_model(model, dict.fromkeys(names, NF2), rank=2, weighting=norms.get, progress=False)
    return grams


def same(found, expected, tolerance=1e-5):
    return float((found - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("mask", [False, True])
def test_blocks_see_the_inputs_of_the_whole_model(name, mask):
    kind = ARCHITECTURES[name]
    if mask and kind.inputs.__name__ != "_words":
        pytest.skip("has no mask")
    batches = [words(1), padded() if mask else words(2)] if kind.inputs.__name__ == "_words" else [kind.batch()]
    model, other = kind.make(), kind.make()
    seen = []

    def weighting(gram):
        seen.append(torch.as_tensor(np.array(gram)))
        return InputGram(gram)

    path = BODIES[name]
    exclude = "*dt_proj" if name == "mamba" else ()  # it reads the weight itself
    report = quantize_blocks(model, NF2, batches, rank=2, weighting=weighting, blocks=path, progress=False,
                             exclude=exclude)  # fmt: skip
    expected = by_hand(other, path, batches, exclude)
    assert set(report.layers) == set(expected)
    distinct = list({id(gram): gram for gram in expected.values()}.values())
    assert len(seen) == len(distinct)
    for position, (found, right) in enumerate(zip(seen, distinct, strict=True)):
        assert same(found, right), f"gram {position} of {len(seen)}: {float((found - right).norm() / right.norm()):.2e}"
    with torch.no_grad():
        for batch in batches:
            a, b = (own(**batch)[0] for own in (model, other))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(0.5)

    def forward(self, x, shift=0.0):
        return x + self.drop(self.down(torch.tanh(self.up(x + shift))))


class InPlace(Block):
    def forward(self, x, shift=0.0):
        x += self.drop(self.down(torch.tanh(self.up(x + shift))))
        return x


class Body(nn.Module):
    def __init__(self, block=Block, count=3, shift=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(16, 5)
        self.shift = shift

    def forward(self, x):
        x = x * 1.0
        shift = torch.zeros(1)
        for layer in self.layers:
            x = layer(x, shift) if self.shift else layer(x)
        return self.head(x)


BATCHES = [torch.randn(8, 16, generator=torch.Generator().manual_seed(s)) for s in range(3)]


@pytest.mark.parametrize(("block", "shift"), [(Block, False), (Block, True), (InPlace, False)])
def test_toy_bodies(block, shift):
    model, other = Body(block, shift=shift), Body(block, shift=shift)
    seen = []
    quantize_blocks(model, NF2, BATCHES, rank=2, weighting=lambda g: seen.append(np.array(g)) or InputGram(g),
                    progress=False, exclude="head")  # fmt: skip
    expected = by_hand(other.eval(), "layers", BATCHES)
    distinct = list({id(gram): gram for gram in expected.values()}.values())
    assert len(seen) == len(distinct)
    for position, (found, right) in enumerate(zip(seen, distinct, strict=True)):
        assert same(torch.as_tensor(found), right), position


def test_order_of_batches_is_rounding():
    a, b = [], []
    for seen, batches in ((a, BATCHES), (b, BATCHES[::-1])):
        quantize_blocks(Body(), lq.BlockFormat.parse("nf8/8:float32"), batches, rank=2, progress=False,
                        weighting=lambda g, seen=seen: seen.append(np.array(g)) or InputGram(g))  # fmt: skip
    assert all(np.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_modes_hooks_and_gradients_are_restored():
    model = Body().train()
    model.layers[1].eval()
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    quantize_blocks(model, NF2, BATCHES, rank=2, progress=False)
    assert model.training
    assert model.layers[0].training
    assert not model.layers[1].training
    assert model.layers[0].up.training
    assert not model.layers[1].up.training
    assert [len(layer._forward_hooks) for layer in model.layers] == [1, 0, 0]
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def state(model):
    return {k: (v.clone(), v.requires_grad) for k, v in model.named_parameters()}


def unchanged(model, before):
    after = state(model)
    return after.keys() == before.keys() and all(
        torch.equal(after[k][0].nan_to_num(), before[k][0].nan_to_num()) and after[k][1] == before[k][1] for k in before
    )


def test_a_bad_rank_of_the_last_block():
    model = Body()
    before = state(model)
    with pytest.raises(InvalidArgumentError, match="rank"):
        quantize_blocks(model, NF2, BATCHES, rank={"layers.2.down": -1, "*": 2}, progress=False)
    assert unchanged(model, before)


def test_non_finite_weight_of_the_last_block():
    model = Body()
    with torch.no_grad():
        model.layers[2].down.weight[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(NonFiniteError):
        quantize_blocks(model, NF2, BATCHES, rank=2, progress=False)
    assert unchanged(model, before)


def test_interrupt_in_the_second_block():
    model = Body()
    handle = model.layers[0].up.register_forward_hook(lambda *_: None)
    before = state(model)

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_blocks(model, NF2, BATCHES, rank=2, progress=stop)
    assert not any(layer._forward_pre_hooks for layer in model.layers)
    assert unchanged(model, before)
    handle.remove()  # it still belongs to the restored module
    assert not model.layers[0].up._forward_hooks


class Reversed(Body):
    def forward(self, x):
        for layer in reversed(self.layers):
            x = layer(x)
        return self.head(x)


class Repeated(Body):
    def forward(self, x):
        for layer in [*self.layers, self.layers[0]]:
            x = layer(x)
        return self.head(x)


class Branched(Body):
    def forward(self, x):
        return self.head(sum(layer(x) for layer in self.layers))


class Normed(Body):
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Skipped(Body):
    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        return self.head(x)


class InsideTwice(Body):
    """Runs the first block of each pair once, but the whole list two times."""

    def forward(self, x):
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [Reversed, Repeated, Branched, Normed, Skipped, InsideTwice])
def test_other_orders_are_refused(kind):
    model = kind()
    before = state(model)
    with pytest.raises(InvalidArgumentError, match="blocks"):
        quantize_blocks(model, NF2, BATCHES, rank=2, progress=False)
    assert unchanged(model, before)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)


def test_no_batches():
    with pytest.raises(InvalidArgumentError, match="batches"):
        quantize_blocks(Body(), NF2, iter(()), rank=2, progress=False)


@pytest.mark.parametrize("count", [1, 3])
def test_hook_of_the_user_that_changes_inputs(count):
    model, other = Body(), Body()
    for own in (model, other):
        for layer in own.layers[:count]:
            layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    seen = []
    quantize_blocks(model, NF2, BATCHES, rank=2, weighting=lambda g: seen.append(np.array(g)) or InputGram(g),
                    progress=False, exclude="head")  # fmt: skip
    expected = by_hand(other.eval(), "layers", BATCHES)
    distinct = list({id(gram): gram for gram in expected.values()}.values())
    for position, (found, right) in enumerate(zip(seen, distinct, strict=True)):
        assert same(torch.as_tensor(found), right), position


def test_one_block_equals_quantize_model():
    model, other = Body(count=1), Body(count=1)
    grams = collect_gram(other.eval(), BATCHES, progress=False)
    norms = {name: InputGram(gram.numpy()) for name, gram in grams.items()}
    quantize_blocks(model, NF2, BATCHES, rank=2, progress=False)
    quantize_model(other, {"layers.*": NF2}, rank=2, weighting=norms.get, progress=False)
    for key, value in other.state_dict().items():
        own = model.state_dict()[key]
        if isinstance(value, torch.Tensor):
            assert torch.equal(own, value), key
