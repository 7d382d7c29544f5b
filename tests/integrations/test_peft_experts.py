"""PEFT over quantized experts that a model stored in one array."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch, _, peft = (require_module(name) for name in ("torch", "transformers", "peft"))

from lqlora.integrations.peft import register  # noqa: E402 - needs torch
from lqlora.nn import LQLinear, quantize_model  # noqa: E402
from tests.nn.architectures import ARCHITECTURES  # noqa: E402

# PEFT warns of settings that it changes itself, and torch of what PEFT calls.
pytestmark = pytest.mark.filterwarnings("ignore")

register()

NF4 = lq.BlockFormat.parse("nf4/16:float32")
TARGETS = {
    "parameters": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "arrays": {"target_modules": ["gate_up_proj", "experts.down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "some": {"target_modules": ["q_proj", "gate_up_proj.0", "down_proj.3"]},
}


def _dense(name):
    own = ARCHITECTURES[name]
    few = {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return dataclasses.replace(own, settings={**own.settings, **few}).make()


@functools.cache
def _quantized(name):
    model = _dense(name)
    quantize_model(model, NF4, rank=2, max_iter=1)
    return model


def _model(name="mixtral"):
    return copy.deepcopy(_quantized(name))


def _tokens():
    return torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))


def _logits(model, **options):
    with torch.no_grad():
        return model(input_ids=_tokens(), **options).logits


def _adapted(targets, name="mixtral", **options):
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **TARGETS[targets], **options)
    return peft.get_peft_model(_model(name), config).eval()


@pytest.mark.parametrize(("name", "targets"), [*(("mixtral", own) for own in TARGETS), ("gpt-oss", "parameters")])
def test_outputs_are_those_of_the_merged_model(name, targets):
    model = _adapted(targets, name)
    below, found = _logits(_model(name)), _logits(model)
    with model.disable_adapter():
        assert torch.equal(_logits(model), below)
    merged = copy.deepcopy(model).merge_and_unload()
    assert (found - below).abs().max() > 0.01
    torch.testing.assert_close(_logits(merged), found, rtol=1e-3, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(_logits(model), found, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(_logits(model), found)
    assert torch.equal(_logits(model.unload()), below)


def test_gradients_are_the_slopes_of_the_loss():
    model = _adapted("parameters")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 16
    assert all("experts" in name and ".lora_" in name for name in trained)

    def loss():
        return model(input_ids=_tokens(), labels=_tokens()).loss

    loss().backward()
    slope = sum(p.grad.square().sum() for p in trained.values())
    step = 1e-2 / slope.sqrt()
    found = []
    with torch.no_grad():
        for side in (1, -2):
            for p in trained.values():
                p.add_(p.grad, alpha=float(side * step))
            found.append(loss())
    torch.testing.assert_close((found[0] - found[1]) / (2 * step), slope, rtol=1e-2, atol=0)


def test_several_adapters_are_switched_and_added():
    model = _adapted("parameters")
    first = _logits(model)
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, **TARGETS["parameters"]))
    assert torch.equal(_logits(model), first)
    model.set_adapter("other")
    second = _logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = _logits(model)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    assert (second - first).abs().max() > 0.01
    torch.testing.assert_close(_logits(merged), both, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("targets", ["parameters", "all-linear"])
def test_saved_adapters_come_back_bit_for_bit(targets, tmp_path):
    model = _adapted(targets)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(_model(), tmp_path).eval()
    assert torch.equal(_logits(again), _logits(model))


def test_merged_experts_are_arrays_again():
    """So transformers finds them in a saved model, and collectors see their products."""
    model = _adapted("parameters").merge_and_unload()
    expected = _dense("mixtral").state_dict()
    assert {name for name in model.state_dict() if "experts" in name} == {n for n in expected if "experts" in n}
    assert "model.layers.0.mlp.experts.down_proj.3" in lq.nn.collect_gram(
        model, [_tokens()], include="experts.down_proj"
    )


def test_experts_that_were_merged_alone_are_seen_by_collectors():
    model = _adapted("some").merge_and_unload()
    assert list(lq.nn.collect_gram(model, [_tokens()], include="gate_up_proj.0"))


def test_adapters_stay_over_experts_that_are_dequantized():
    model = _adapted("parameters")
    expected = _logits(model)
    lq.nn.dequantize_model(model)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(InvalidArgumentError, match=r"^adapters .*dequantize_model"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"use_dora": True}, "use_dora"), ({"lora_dropout": 0.1}, "lora_dropout"), ({"lora_bias": True}, "lora_bias")],
)
def test_adapters_that_are_not_a_product_are_refused(options, named):
    model = _model()
    with pytest.raises(InvalidArgumentError, match=rf"^config .*experts.*{named}.*exclude_modules"):
        peft.get_peft_model(model, peft.LoraConfig(**TARGETS["parameters"], **options))
    assert all(isinstance(own, LQLinear) for own in model.model.layers[0].mlp.experts.gate_up_proj.children())


def test_ia3_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"^config .*experts.*IA3"):
        peft.get_peft_model(_model(), peft.IA3Config(target_modules=["gate_up_proj.0"], feedforward_modules=[]))


def test_dense_experts_of_a_converted_array_are_refused():
    model = _dense("mixtral")
    quantize_model(model, NF4, rank=2, max_iter=1, include=["q_proj", "gate_up_proj.0"])
    with pytest.raises(InvalidArgumentError, match=r"target_parameters must .*experts"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"]))
    found = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert [name for name, _ in found.named_parameters() if "experts" in name and "lora_A.default" in name] == [
        "base_model.model.model.layers.0.mlp.experts.gate_up_proj.0.lora_A.default.weight"
    ]


def test_a_batch_of_several_adapters_is_refused():
    model = _adapted("parameters")
    with pytest.raises(InvalidArgumentError, match=r"^adapter_names .*experts"):
        _logits(model, adapter_names=["default", "__base__", "default"])
