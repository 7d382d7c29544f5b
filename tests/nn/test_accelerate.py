"""The hooks of accelerate on quantized layers: tensors come for the time of a forward pass, and are missed in words of ours."""

from __future__ import annotations

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch, accelerate = require_module("torch"), require_module("accelerate")
from accelerate import hooks  # noqa: E402 - needs accelerate

from lqlora.nn import offload_model, onload_model, save_model  # noqa: E402
from tests.nn.offloading import WIDTH, assert_same, make_model, results  # noqa: E402


@pytest.mark.parametrize("kind", ["factors", "scales", "both"])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("way", ["cpu", "disk", "map"])
def test_hooks_bring_the_tensors_of_quantized_layers(tmp_path, way, buffers, kind):
    model, expected = make_model(kind=kind), results(make_model(kind=kind))
    device, options = torch.device("cpu"), {"offload_buffers": buffers}
    if way == "cpu":
        accelerate.cpu_offload(model, device, **options)
    elif way == "disk":
        accelerate.disk_offload(model, tmp_path, device, **options)
    else:
        places = {"0": "cpu", "1": "disk", "2": "cpu", "3": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True, **options)
    assert any(own.is_meta for own in model.parameters())
    assert any(own.is_meta for own in model.buffers()) == buffers
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    assert torch.equal(y, expected[0])
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(gradient, expected[1])
    with pytest.raises(InvalidArgumentError, match="meta device"):
        save_model(tmp_path / "model", model)
    hooks.remove_hook_from_submodules(model)
    assert_same(results(model), expected)


@pytest.mark.parametrize("buffers", [False, True])
def test_functions_that_need_the_values_are_refused(tmp_path, buffers):
    start = lq.nn.factors(make_model())
    for call in (
        lq.nn.factors,
        lambda own: lq.nn.set_factors(own, start),
        lambda own: lq.nn.using_factors(own, start).__enter__(),
        lambda own: lq.nn.save_factors(tmp_path / "factors", own),
        lq.nn.train_scales,
        lq.nn.dequantize_model,
        lambda own: lq.nn.merged_weight(own[0]),
        lambda own: offload_model(own, tmp_path / "codes"),
    ):
        model = accelerate.cpu_offload(make_model(), torch.device("cpu"), offload_buffers=buffers)
        with pytest.raises(InvalidArgumentError, match="meta device"):
            call(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("convert", [lq.nn.train_scales, lq.nn.freeze_scales, lq.nn.requantize_model])
def test_hooked_layers_are_not_replaced(convert):
    model = make_model(kind="scales" if convert is lq.nn.freeze_scales else "factors")
    hooks.add_hook_to_module(model[1], hooks.ModelHook())
    with pytest.raises(InvalidArgumentError, match="'1' has a forward"):
        convert(model)


def test_a_model_that_was_offloaded_before(tmp_path):
    expected, model = results(make_model()), make_model()
    offload_model(model, tmp_path / "codes")
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        assert torch.equal(model(x), expected[0])
    with pytest.raises(InvalidArgumentError, match="meta device"):
        onload_model(model)
    hooks.remove_hook_from_submodules(model)
    onload_model(model)
    assert_same(results(model), expected)
