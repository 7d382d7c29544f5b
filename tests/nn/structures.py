"""Small models with the structures that selection by role must recognize, and what is expected of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, WORDS = 8, 11


@dataclass(frozen=True)
class Structure:
    """A model, its input, the layers taken by default, and the others with the group they are left dense for.

    ``trains`` names the parameters that stay trainable beside factors, ``refused`` the layers that cannot be quantized.
    """

    build: Callable[[], nn.Module]
    taken: list[str]
    left: dict[str, str]
    trains: list[str] = field(default_factory=list)
    tokens: bool = False
    refused: tuple[str, ...] = ()
    random: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build()

    def inputs(self):
        generator = torch.Generator().manual_seed(7)
        if self.tokens:
            return torch.randint(WORDS, (2, 5), generator=generator)
        return torch.randn(2, 5, WIDTH, generator=generator)


class Sandwich(nn.Module):
    """A linear layer, a part, and a head with any name."""

    def __init__(self, part: nn.Module, **others: nn.Module):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.part = part
        for name, module in others.items():
            setattr(self, name, module)
        self.others = list(others)

    def forward(self, x):
        x = self.part(torch.tanh(self.up(x)))
        for name in self.others:
            x = getattr(self, name)(x)
        return x


class Words(nn.Module):
    def __init__(self, head: str, *, tied: bool, bias: bool = False):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.last = head
        if bias:
            self.register_parameter("bias", nn.Parameter(torch.randn(WORDS)))
        setattr(self, head, nn.Linear(WIDTH, WORDS, bias=bias))
        if tied:
            getattr(self, head).weight = self.embed.weight
        if bias:
            getattr(self, head).bias = self.bias

    def forward(self, ids):
        return getattr(self, self.last)(self.up(self.embed(ids)))


class Conv1D(nn.Module):
    """The layer of GPT-2, as transformers has it."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class NoBias(nn.Module):
    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)

    def forward(self, x):
        return x @ self.weight


NoBias.__name__ = "Conv1D"


class FalconLinear(nn.Linear):
    def forward(self, input):  # noqa: A002 - the name that torch gives it
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Dropping(nn.Linear):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, self.training)


class Helping(nn.Linear):
    def columns(self):
        return self.weight.T

    def forward(self, x):
        return x @ self.columns() + self.bias


class Failing(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x * mask if mask is not None else x) if x.ndim == 3 and len(x) else None


class Reader(nn.Module):
    """Its owner passes the weight to a function."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.slow = False

    def forward(self, x):
        x = functional.linear(x, self.q.weight, self.q.bias)
        return functional.linear(x, self.k.weight) if self.slow else self.k(x.to(self.k.weight.dtype))


class Asker(nn.Module):
    """Asks for the dtype and the device of the weight."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x.to(self.wo.weight.device))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x, chosen):
        return torch.einsum("...i,eoi,...e->...o", x, self.up_proj, chosen)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.experts = Experts()
        self.shared_expert_gate = nn.Linear(WIDTH, 1)
        self.gate_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        mixed = self.experts(x, self.gate(x).softmax(-1))
        return mixed + self.shared_expert_gate(x).sigmoid() * self.gate_proj(x)


class Gated(nn.Module):
    """A gate without experts is a linear map like any other."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x * self.gate(x).sigmoid()


class Adapted(nn.Module):
    """A layer of PEFT."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH)
        self.base_layer.requires_grad_(requires_grad=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, WIDTH, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Saved(nn.Module):
    """A module that PEFT trains as a whole."""

    def __init__(self):
        super().__init__()
        self.original_module = nn.Linear(WIDTH, WIDTH)
        self.original_module.requires_grad_(requires_grad=False)
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x):
        return self.modules_to_save["default"](x)


def _frozen_but_adapters() -> nn.Module:
    model = Sandwich(Adapted(), saved=Saved())
    model.up.requires_grad_(requires_grad=False)
    return model


def _shared() -> nn.Module:
    part = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    part[1].weight = part[0].weight
    return Sandwich(part)


def _with_forward() -> nn.Module:
    model = Sandwich(nn.Linear(WIDTH, WIDTH))
    plain = model.part.forward
    model.part.forward = lambda x: 2 * plain(x)
    return model


def _with_buffer() -> nn.Module:
    model = Sandwich(nn.Linear(WIDTH, WIDTH))
    model.part.register_buffer("mask", torch.ones(WIDTH))
    return model


def _linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


OTHER, COMPUTED = "layers of other classes", "computed weights"
HEAD, OUTPUT, ADAPTER = "heads", "output embeddings", "adapters of other libraries"

STRUCTURES = {
    "plain": Structure(lambda: Sandwich(nn.Linear(WIDTH, 4)), ["up", "part"], {}),
    "head": Structure(lambda: Words("lm_head", tied=False), ["up"], {"lm_head": OUTPUT}, tokens=True),
    "tied head": Structure(lambda: Words("lm_head", tied=True), ["up"], {"lm_head": OUTPUT}, tokens=True),
    "tied head and bias": Structure(
        lambda: Words("lm_head", tied=True, bias=True), ["up"], {"lm_head": OUTPUT}, tokens=True
    ),
    "tied projection": Structure(
        lambda: Words("project", tied=True), ["up"], {"project": "shared weights"}, tokens=True
    ),
    "head for words": Structure(lambda: Words("head", tied=False), ["up"], {"head": HEAD}, tokens=True),
    "classifier": Structure(
        lambda: Sandwich(_linear(), classifier=nn.Linear(WIDTH, 2)),
        ["up", "part"],
        {"classifier": HEAD},
        ["classifier.weight", "classifier.bias"],
    ),
    "deep classifier": Structure(
        lambda: Sandwich(_linear(), classifier=nn.Sequential(_linear(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))),
        ["up", "part"],
        {"classifier.0": HEAD, "classifier.2": HEAD},
        [f"classifier.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")],
    ),
    "attention": Structure(
        lambda: Sandwich(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)),
        ["up", "part.self_attn.out_proj", "part.linear1", "part.linear2"],
        {},
    ),
    "reader": Structure(lambda: Sandwich(Reader()), ["up", "part.q", "part.k"], {}),
    "asker": Structure(lambda: Sandwich(Asker()), ["up", "part.wo"], {}),
    "experts": Structure(
        lambda: Sandwich(Mixture()),
        ["up", "part.gate_proj"],
        {"part.gate": "routers", "part.shared_expert_gate": "routers"},
    ),
    "gate": Structure(lambda: Sandwich(Gated()), ["up", "part.gate"], {}),
    "adapters": Structure(
        _frozen_but_adapters,
        ["up", "part.base_layer"],
        {
            "part.lora_A.default": ADAPTER,
            "part.lora_B.default": ADAPTER,
            "saved.original_module": ADAPTER,
            "saved.modules_to_save.default": ADAPTER,
        },
        [
            "part.lora_A.default.weight",
            "part.lora_B.default.weight",
            "saved.modules_to_save.default.weight",
            "saved.modules_to_save.default.bias",
        ],
        refused=(
            "part.lora_A.default",
            "part.lora_B.default",
            "saved.original_module",
            "saved.modules_to_save.default",
        ),
    ),
    "shared": Structure(_shared, ["up"], {"part.0": "shared weights", "part.1": "shared weights"}),
    "parametrized": Structure(
        lambda: Sandwich(parametrizations.weight_norm(_linear())), ["up"], {"part": COMPUTED}, refused=("part",)
    ),
    "spectral norm": Structure(
        lambda: Sandwich(spectral_norm(_linear())), ["up"], {"part": COMPUTED}, refused=("part",)
    ),
    "own forward": Structure(_with_forward, ["up"], {"part": "replaced forward methods"}, refused=("part",)),
    "buffer": Structure(_with_buffer, ["up"], {"part": "layers with further tensors"}, refused=("part",)),
    "falcon": Structure(lambda: Sandwich(FalconLinear(WIDTH, WIDTH)), ["up", "part"], {}),
    "falcon, no bias": Structure(lambda: Sandwich(FalconLinear(WIDTH, WIDTH, bias=False)), ["up", "part"], {}),
    "transposed": Structure(lambda: Sandwich(Conv1D(6, WIDTH)), ["up", "part"], {}),
    "transposed, no bias": Structure(lambda: Sandwich(NoBias(6, WIDTH)), ["up", "part"], {}),
    "doubled": Structure(lambda: Sandwich(Doubled(WIDTH, WIDTH)), ["up"], {"part": OTHER}, refused=("part",)),
    "dropout": Structure(
        lambda: Sandwich(Dropping(WIDTH, WIDTH)), ["up"], {"part": OTHER}, refused=("part",), random=True
    ),
    "further method": Structure(lambda: Sandwich(Helping(WIDTH, WIDTH)), ["up"], {"part": OTHER}, refused=("part",)),
    "special input": Structure(lambda: Sandwich(Failing(WIDTH, WIDTH)), ["up"], {"part": OTHER}, refused=("part",)),
}


class InBlocks(nn.Module):
    """Model whose body is a list of blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
