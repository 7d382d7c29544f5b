"""Models that others have changed: every step is right, compared with the dense model, or refused in our words."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_module

if TYPE_CHECKING:
    from collections.abc import Callable

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

from lqlora.nn import (  # noqa: E402
    LQLinear,
    collect_fisher,
    collect_gram,
    collect_kronecker,
    dequantize_model,
    load_model,
    quantize_model,
    requantize_model,
    save_model,
    select_linears,
)
from lqlora.nn.linear_maps import matrix_of  # noqa: E402
from tests.nn.statistics.models import squared  # noqa: E402
from tests.nn.structures import STRUCTURES, WIDTH, WORDS, Conv1D, Sandwich, Words  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

NF4 = lq.BlockFormat.parse("nf4/8:float32")


def linear(**settings):
    return nn.Linear(WIDTH, WIDTH, **settings)


class Subclass(torch.Tensor):
    pass


class Halved(nn.Module):
    def forward(self, w):
        return 0.5 * w


class Scaled8(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.randn(WIDTH).to(torch.float8_e4m3fn))

    def forward(self, x):
        return x * self.scale.float()


class Extra(nn.Module):
    def get_extra_state(self):
        return {"factor": 3}

    def set_extra_state(self, state):
        assert state == {"factor": 3}

    def forward(self, x):
        return 3 * x


class Holder(nn.Module):
    """Holds its layer in an attribute, and calls what is there."""

    def __init__(self, hold):
        super().__init__()
        self.layer = linear()
        self.held = hold(self.layer)

    def forward(self, x):
        held = self.held[0] if isinstance(self.held, list | dict) else self.held
        return nn.functional.linear(x, held, self.layer.bias) if isinstance(held, torch.Tensor) else held(x)


def _changed(change):
    def make():
        model = Sandwich(linear())
        change(model)
        return model

    return make


def _hooks(model):
    model.part.register_forward_hook(lambda _, __, y: 2 * y)
    model.part.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model.up.register_forward_hook(lambda *_: _[-1] + 1, with_kwargs=True, always_call=True)


def _backward_hooks(model):
    model.part.register_full_backward_hook(lambda _, gradients, __: (2 * gradients[0],))
    model.part.register_full_backward_pre_hook(lambda _, gradients: (3 * gradients[0],))


def _two(change):
    first, second = linear(), linear()
    change(first, second)
    return Sandwich(nn.Sequential(first, nn.Tanh(), second))


def _views(first, second):
    both = torch.randn(WIDTH, 2 * WIDTH)
    first.weight, second.weight = nn.Parameter(both[:, :WIDTH]), nn.Parameter(both[:, WIDTH:])


def _pairs(*layers):
    twice = linear()
    return Sandwich(nn.Sequential(twice, nn.Tanh(), twice))


def _own_forward(model, name="part"):
    module = model.get_submodule(name)
    plain = module.forward
    module.forward = lambda x: 2 * plain(x)


@dataclass(frozen=True)
class Case:
    """A model, the layers to take (the default if None), and those that are taken."""

    make: Callable[[], nn.Module]
    taken: list[str]
    include: list[str] | None = None
    stored: bool = True

    def build(self, seed=0):
        torch.manual_seed(seed)
        return self.make()

    def quantized(self):
        """Return the model with layers of full rank, so that it computes what the dense one does."""
        model = self.build()
        quantize_model(model, NF4, rank=WIDTH, include=self.include)
        return model

    def untied(self):
        """Return the dense model with a weight of its own for each layer that is taken."""
        model = self.build().requires_grad_(requires_grad=True)
        for name in self.taken:
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.detach().clone())
        return model

    def inputs(self):
        generator = torch.Generator().manual_seed(7)
        if isinstance(self.build(), Words):
            return torch.randint(WORDS, (2, 5), generator=generator)
        return torch.randn(2, 5, WIDTH, generator=generator)


BOTH = ["up", "part"]
CASES = {
    "plain": Case(_changed(lambda _: None), BOTH),
    "tied head": Case(lambda: Words("lm_head", tied=True), ["up"]),
    "tied head that is taken": Case(lambda: Words("lm_head", tied=True), ["up", "lm_head"], ["up", "lm_head"]),
    "tied bias": Case(lambda: Words("lm_head", tied=True, bias=True), ["up", "lm_head"], ["up", "lm_head"]),
    "shared layer": Case(_pairs, ["up", "part.0"]),
    "shared weight": Case(lambda: _two(lambda a, b: setattr(b, "weight", a.weight)), ["up"]),
    "shared weight that is taken": Case(
        lambda: _two(lambda a, b: setattr(b, "weight", a.weight)), ["up", "part.0", "part.2"], ["up", "0", "2"]
    ),
    "shared bias": Case(lambda: _two(lambda a, b: setattr(b, "bias", a.bias)), ["up", "part.0", "part.2"]),
    "views of one array": Case(lambda: _two(_views), ["up", "part.0", "part.2"]),
    "second name of a weight": Case(_changed(lambda m: setattr(m, "again", m.part.weight)), ["up"]),
    "hooks": Case(_changed(_hooks), BOTH),
    "backward hooks": Case(_changed(_backward_hooks), BOTH),
    "hook of the weight": Case(_changed(lambda m: m.part.weight.register_hook(lambda g: 2 * g)), BOTH),
    "weight norm of old": Case(_changed(lambda m: weight_norm(m.part)), ["up"]),
    "spectral norm of old": Case(_changed(lambda m: spectral_norm(m.part)), ["up"]),
    "weight norm": Case(_changed(lambda m: parametrizations.weight_norm(m.part)), ["up"]),
    "spectral norm": Case(_changed(lambda m: parametrizations.spectral_norm(m.part)), ["up"]),
    "computed bias": Case(_changed(lambda m: parametrize.register_parametrization(m.part, "bias", Halved())), ["up"]),
    "weight norm of another module": Case(
        lambda: Sandwich(nn.Sequential(linear(), parametrizations.weight_norm(nn.Conv1d(5, 5, 1)))), ["up", "part.0"]
    ),
    "pruned": Case(_changed(lambda m: prune.l1_unstructured(m.part, "weight", 0.5)), ["up"]),
    "own forward": Case(_changed(_own_forward), ["up"]),
    "own forward of the model": Case(_changed(lambda m: _own_forward(m, "")), BOTH),
    "list of layers": Case(lambda: Sandwich(Holder(lambda layer: [layer])), ["up"]),
    "list of weights": Case(lambda: Sandwich(Holder(lambda layer: [layer.weight])), ["up"]),
    "dict of layers": Case(lambda: Sandwich(Holder(lambda layer: {0: layer})), ["up"]),
    "partial": Case(lambda: Sandwich(Holder(functools.partial)), ["up"]),
    "bound method": Case(lambda: Sandwich(Holder(lambda layer: layer.forward)), ["up"]),
    "closure": Case(lambda: Sandwich(Holder(lambda layer: lambda x: layer(x) + 0)), ["up"]),
    "subclass": Case(
        _changed(lambda m: setattr(m.part, "weight", nn.Parameter(m.part.weight.detach().as_subclass(Subclass)))),
        ["up"],
    ),
    "float8 beside": Case(lambda: Sandwich(nn.Sequential(linear(), Scaled8())), ["up", "part.0"], stored=False),
    "extra state": Case(lambda: Sandwich(nn.Sequential(linear(), Extra())), ["up", "part.0"], stored=False),
    "meta beside": Case(_changed(lambda m: setattr(m, "unused", linear(device="meta"))), BOTH, stored=False),
    "sparse beside": Case(
        _changed(lambda m: m.register_parameter("unused", nn.Parameter(torch.eye(3).to_sparse()))), BOTH, stored=False
    ),
    "traced beside": Case(lambda: Sandwich(torch.jit.trace(linear(), torch.ones(1, WIDTH))), ["up"]),
    "transposed": Case(lambda: Sandwich(Conv1D(6, WIDTH)), BOTH),
    "reader": Case(STRUCTURES["reader"].build, ["up", "part.q", "part.k"]),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


def _assert_close(found, expected, name=""):
    size = expected.abs().max().item() or 1.0
    torch.testing.assert_close(found / size, expected / size, rtol=1e-4, atol=1e-4, msg=name or None)


def _quantizes(case, _):
    dense, model, x = case.build(), case.quantized(), case.inputs()
    assert [name for name, module in model.named_modules() if isinstance(module, LQLinear)] == case.taken
    for mode in (True, False):
        _assert_close(model.train(mode)(x), dense.train(mode)(x))


def _trains(case, _):
    dense, model, x = case.untied(), case.quantized(), case.inputs()
    dense(x).square().sum().backward()
    model(x).square().sum().backward()
    for name in case.taken:
        layer, own = model.get_submodule(name), dense.get_submodule(name)
        gradient = own.weight.grad if isinstance(own, nn.Linear) else own.weight.grad.T
        # A hook of a weight sees its gradient, which quantized layers do not form: factors have the plain one.
        _assert_close(layer.lora_A.grad, layer.lora_B.detach().T @ gradient, name)
        _assert_close(layer.lora_B.grad, gradient @ layer.lora_A.detach().T, name)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3).step()
    assert model(x).isfinite().all()


def _has_statistics(case, _):
    # Layers that others read by their weight, or call in another way, see no hooks. They are dead and left out.
    model, x = case.build().eval(), case.inputs()
    dense = case.untied().eval()
    fisher = collect_fisher(model, [x], loss=squared, include=case.taken, exclude="part.q")
    gram = collect_gram(model, [x], include=case.taken, exclude="part.q")
    kronecker = collect_kronecker(model, [x], loss=squared, include=case.taken, exclude="part.q")
    losses = squared(dense, x)
    for name, found in fisher.items():
        layer = dense.get_submodule(name)
        parts = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses]
        squares = sum(part.square() for part in parts) / len(parts)
        _assert_close(found, squares if isinstance(layer, nn.Linear) else squares.T, name)
        assert gram[name].shape == (matrix_of(layer).shape[1],) * 2
        assert torch.equal(kronecker[name][1], gram[name])
    assert fisher.keys() == set(case.taken) - {"part.q"}


def _is_saved(case, path):
    model, x = case.quantized().eval(), case.inputs()
    before = model(x)
    if not case.stored:
        with pytest.raises(InvalidArgumentError, match=r"model.*'(unused|part\.1)[\w.]*' "):
            save_model(path, model)
        assert not path.exists()
        return
    save_model(path, model)
    assert torch.equal(model(x), before)
    fresh = case.build(seed=1).eval()
    load_model(path, fresh)
    assert torch.equal(fresh(x), before)


def _is_dense_again(case, _):
    dense, model, x = case.build().eval(), case.quantized().eval(), case.inputs()
    dequantize_model(model)
    assert not any(isinstance(module, LQLinear) for module in model.modules())
    _assert_close(model(x), dense(x))


STEPS = [_quantizes, _trains, _has_statistics, _is_saved, _is_dense_again]


@pytest.mark.sampled(40)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__.strip("_"))
def test_each_step_is_right(case, step, tmp_path):
    step(case, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("list of layers", r"'part\.layer' is also held by attribute 'held' of 'part'"),
        ("closure", r"'part\.layer' is also held by attribute 'held' of 'part'"),
        ("own forward", "'part' has a forward method of its own"),
        ("pruned", "'part' has a weight that is not its own parameter"),
        ("subclass", "'part' has a weight that is not a plain matrix"),
    ],
)
def test_layers_left_dense_are_refused_by_name(name, reason):
    with pytest.raises(InvalidArgumentError, match=reason):
        select_linears(CASES[name].build(), ["part", "layer"])


def test_a_layer_whose_bias_holds_no_values_is_left_dense():
    model = Sandwich(linear())
    model.part.bias = nn.Parameter(torch.empty(WIDTH, device="meta"))
    assert list(select_linears(model)) == ["up"]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("step", ["quantize", "gram", "fisher", "load", "save"])
def test_modules_without_parameters_before_their_first_call_are_refused_by_name(step, tmp_path):
    steps = {
        "quantize": lambda model: quantize_model(model, NF4, rank=2),
        "gram": lambda model: collect_gram(model, [torch.zeros(2, WIDTH)]),
        "fisher": lambda model: collect_fisher(model, [torch.zeros(2, WIDTH)], loss=squared),
        "load": lambda model: load_model(tmp_path / "model", model),
        "save": lambda model: save_model(tmp_path / "other", model),
    }
    model = _plain()
    save_model(tmp_path / "model", model)
    model.lazy = nn.LazyLinear(3)
    with pytest.raises(InvalidArgumentError, match=r"'lazy.*call"):
        steps[step](model)
    model.lazy(torch.zeros(2, WIDTH))
    if step in ("quantize", "save"):
        steps[step](model)


def _plain(seed=0):
    torch.manual_seed(seed)
    model = Sandwich(linear())
    quantize_model(model, NF4, rank=2)
    return model


def _assign_data(layer):
    layer.weight.data = torch.zeros(WIDTH, WIDTH)


def _set_flag(layer):
    layer.weight.requires_grad = False


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        (_assign_data, "data"),
        (_set_flag, "requires_grad"),
        (lambda layer: layer.weight.requires_grad_(requires_grad=False), "requires_grad"),
        (lambda layer: nn.init.zeros_(layer.weight), "zero_"),
        (lambda layer: layer.weight.data.copy_(torch.zeros(WIDTH, WIDTH)), "copy_"),
        (lambda layer: layer.reset_parameters(), "reset_parameters"),
        (lambda layer: setattr(layer, "weight", linear().weight), "weight"),
    ],
    ids=["data", "flag", "flag_", "init", "copy", "reset", "weight"],
)
def test_a_quantized_weight_is_not_changed_in_silence(change, parameter):
    model, x = _plain(), CASES["plain"].inputs()
    before = model(x)
    with pytest.raises(InvalidArgumentError, match=parameter):
        change(model.part)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("convert", [dequantize_model, requantize_model])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_own_forward, "'part' has a forward method of its own"),
        (lambda model: weight_norm(model.part, "lora_B"), "'part' computes its factors from lora_B_g"),
        (lambda model: setattr(model, "held", [model.part]), "'part' is also held by attribute 'held' of 'the model'"),
    ],
    ids=["forward", "computed factor", "held"],
)
def test_quantized_layers_that_cannot_be_replaced(convert, change, reason):
    model, x = _plain(), CASES["plain"].inputs()
    change(model)
    before = model(x)
    with pytest.raises(InvalidArgumentError, match=f"model.*{reason}"):
        convert(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("entry", "dtype", "assign"),
    [
        ("codes", torch.float32, False),
        ("codes", torch.int64, False),
        ("codes", torch.int64, True),
        ("scales", torch.bfloat16, True),
    ],
)
def test_a_state_dict_in_other_dtypes_is_refused_by_the_name_of_the_entry(entry, dtype, assign):
    model, x = _plain(1), CASES["plain"].inputs()
    before = model(x)
    state = {name: own.to(dtype) if name.endswith(entry) else own for name, own in _plain().state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"part\.quantized\.{entry} must be .*got {dtype}"):
        model.load_state_dict({name: own for name, own in state.items() if entry in name}, strict=False, assign=assign)
    assert torch.equal(model(x), before)


def test_a_state_dict_with_scales_in_half_precision_is_copied():
    model, x = _plain(1), CASES["plain"].inputs()
    model.load_state_dict(
        {name: own.bfloat16() if "scales" in name else own for name, own in _plain().state_dict().items()}
    )
    torch.testing.assert_close(model(x), _plain()(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (torch.tensor([1e6]), torch.tensor([0.0], dtype=torch.float16)),
        (torch.tensor([1e6]), torch.tensor([0.0]).to(torch.float8_e4m3fn)),
        (torch.tensor([2.7]), torch.tensor([0])),
        (torch.tensor([300]), torch.tensor([0], dtype=torch.uint8)),
        (torch.tensor([1j]), torch.tensor([0.0])),
    ],
    ids=["float16", "float8", "rounded", "uint8", "complex"],
)
def test_values_that_the_model_cannot_hold_are_not_loaded(given, own, tmp_path):
    model = _plain()
    model.register_buffer("more", given)
    save_model(tmp_path / "m", model)
    fresh = Sandwich(linear())
    fresh.register_buffer("more", own.clone())
    with pytest.raises(CheckpointError, match=rf"'more' holds values of {str(given.dtype)[6:]} in .* that {own.dtype}"):
        load_model(tmp_path / "m", fresh)
    assert not any(isinstance(module, LQLinear) for module in fresh.modules())
    fresh.more = given.clone()
    load_model(tmp_path / "m", fresh)
    assert torch.equal(fresh.more, given)


class TestInferenceMode:
    def test_what_is_converted_in_it_trains_afterwards(self, tmp_path):
        model, x = Sandwich(linear()), CASES["plain"].inputs()
        with torch.inference_mode():
            quantize_model(model, NF4, rank=2)
            save_model(tmp_path / "m", model)
        fresh = Sandwich(linear())
        with torch.inference_mode():
            load_model(tmp_path / "m", fresh)
        for own in (model, fresh):
            own(x).square().sum().backward()
            assert own.part.lora_A.grad.any()
        with torch.inference_mode():
            requantize_model(model)
            dequantize_model(model)
            dequantize_model(fresh)
        for own in (model, fresh):
            own.requires_grad_(requires_grad=True)(x).sum().backward()
            assert own.part.weight.grad.any()

    def test_a_model_that_was_built_in_it_is_loaded(self, tmp_path):
        model, x = _plain(), CASES["plain"].inputs()
        save_model(tmp_path / "m", model)
        with torch.inference_mode():
            fresh = Sandwich(linear())
            load_model(tmp_path / "m", fresh)
            assert torch.equal(fresh(x), model(x))

    @pytest.mark.parametrize("collect", [collect_fisher, collect_gram, collect_kronecker])
    def test_a_model_that_was_built_in_it_has_no_statistics(self, collect):
        with torch.inference_mode():
            model = Sandwich(linear())
        with pytest.raises(InvalidArgumentError, match=r"model.*inference_mode.*'up\.weight'"):
            collect(model, [CASES["plain"].inputs()], loss=squared)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_over_steps_average_factors_alone(use_buffers):
    model, x = _plain(), CASES["plain"].inputs()
    averaged, seen = AveragedModel(model, use_buffers=use_buffers), []
    for _ in range(3):
        with torch.no_grad():
            model.part.lora_B.add_(0.1)
        averaged.update_parameters(model)
        seen.append(model.part.lora_B.detach().clone())
    with torch.no_grad():
        model.part.lora_B.copy_(torch.stack(seen).mean(dim=0))
    assert torch.equal(averaged.module.part.quantized.codes, model.part.quantized.codes)
    torch.testing.assert_close(averaged(x), model(x))
