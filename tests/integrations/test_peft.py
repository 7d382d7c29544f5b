"""PEFT over quantized layers, compared with PEFT over dense layers of the same values; and adapter folders."""

from __future__ import annotations

import functools
import json
import math
import warnings

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch, _, peft = (require_module(name) for name in ("torch", "transformers", "peft"))
from safetensors.torch import load_file  # noqa: E402 - needs torch
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from lqlora.integrations.peft import load_adapter, register, save_adapter  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    dense_gpt2,
    dense_nested_model,
    gpt2,
    llama,
    low_rank_model,
    nested_model,
    tokens,
    without_factors,
)

# PEFT warns of settings that it changes itself, and torch of what PEFT calls.
pytestmark = pytest.mark.filterwarnings("ignore")

register()

NF4 = lq.BlockFormat.parse("nf4/16:float32")
LORA = {"r": 3, "lora_alpha": 5}
LLAMA = {"target_modules": ["q_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
KINDS = {
    "lora": lambda targets: peft.LoraConfig(**LORA, **targets),
    "rslora": lambda targets: peft.LoraConfig(**LORA, **targets, use_rslora=True),
    "all": lambda targets: peft.LoraConfig(**LORA, **{**targets, "target_modules": "all-linear"}),
    "dora": lambda targets: peft.LoraConfig(**LORA, **targets, use_dora=True),
    "ia3": lambda targets: peft.IA3Config(**targets, feedforward_modules=targets["target_modules"][1:]),
}
MODELS = {"llama": (llama, LLAMA), "gpt2": (gpt2, GPT2)}


def adapted(kind, name="llama", model=None, seed=3):
    """A model with an adapter whose parameters are random."""
    make, targets = MODELS[name]
    torch.manual_seed(seed)
    found = peft.get_peft_model(make() if model is None else model, KINDS[kind](targets))
    shake(found, "default", seed)
    return found.eval()


def shake(model, adapter, seed=3):
    """Move the parameters of an adapter away from where they do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def loss(model):
    return model(input_ids=tokens(), labels=tokens()).loss


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first, second):
    torch.testing.assert_close(first, second, rtol=2e-4, atol=2e-6)


def layer_of(model, end="q_proj"):
    return next(module for name, module in model.named_modules() if name.endswith(end))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_a_dense_model(name, kind):
    dense = MODELS[name][0]()
    lq.nn.dequantize_model(dense)
    expected, found = adapted(kind, name, dense), adapted(kind, name)
    wanted = gradients(expected)
    assert wanted.keys() == {n for n, p in found.named_parameters() if p.requires_grad}
    close(logits(found), logits(expected))
    for parameter, gradient in gradients(found).items():
        close(gradient, wanted[parameter])


@pytest.mark.parametrize("kind", ["lora", "all", "ia3"])
def test_a_new_adapter_changes_no_output(kind):
    model = llama()
    before = logits(model)
    assert torch.equal(logits(peft.get_peft_model(model, KINDS[kind](LLAMA)).eval()), before)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_training_lowers_the_loss_and_changes_the_adapter_alone(kind):
    model = adapted(kind)
    before, start = bits(model), loss(model).item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < start
    changed = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_all_linear_takes_every_layer_but_the_output_embedding():
    model = llama()
    expected = {name for name, module in model.named_modules() if isinstance(module, lq.nn.LQLinear)}
    found = adapted("all", model=model)
    assert len(expected) == 14
    assert found.peft_config["default"].target_modules == expected
    again = peft.LoraConfig(r=2, target_modules="all-linear")
    found.add_adapter("again", again)
    assert again.target_modules == expected


def test_layers_that_stayed_dense_are_adapted_beside_quantized_ones():
    found = adapted("lora", model=llama(exclude="q_proj", max_iter=1))
    kinds = {
        type(found.get_submodule(f"base_model.model.model.layers.0.{name}").base_layer)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert kinds == {nn.Linear, lq.nn.LQLinear}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_merging_gives_dense_layers_with_the_same_outputs(name, kind):
    model = adapted(kind, name)
    expected = logits(model)
    merged = model.merge_and_unload()
    close(logits(merged), expected)
    assert not any("peft" in type(module).__module__ for module in merged.modules())
    end = "q_proj" if name == "llama" else "c_attn"
    assert type(layer_of(merged, end)).__name__ == ("Linear" if name == "llama" else "Conv1D")


def test_a_merged_model_of_transposed_layers_has_the_state_of_a_dense_one():
    model = gpt2(include=["*c_attn", "*c_proj"], max_iter=1)
    # A square matrix would fit the wrong way round, too.
    found = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"])).eval()
    shake(found, "default")
    merged, again = found.merge_and_unload(), dense_gpt2()
    again.load_state_dict(merged.state_dict())
    close(logits(again), logits(merged))


def test_merging_uses_the_dtype_of_quantized_embeddings():
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)).bfloat16()
    lq.nn.quantize_model(model, NF4, rank=2, max_iter=1, embeddings=NF4, include=["1", "2"])
    merged = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["1"])).merge_and_unload()
    assert merged[1].weight.dtype == torch.bfloat16


def test_merging_uses_the_dtype_of_the_model():
    model = llama().to(torch.bfloat16)
    found = adapted("lora", model=model)
    expected = logits(found)
    assert expected.dtype == torch.bfloat16
    merged = found.merge_and_unload()
    assert layer_of(merged).weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(merged), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_unmerging_brings_back_every_bit(kind):
    model = adapted(kind, "gpt2")
    before, expected = bits(model), logits(model)
    model.merge_adapter()
    close(logits(model), expected)
    assert type(layer_of(model, "c_attn").base_layer).__name__ == "Conv1D"
    with model.disable_adapter():  # unmerges, as PEFT has it
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same(bits(model), before)


def test_adapters_are_merged_one_after_another():
    model = adapted("dora")
    model.add_adapter("second", peft.LoraConfig(**LORA, **LLAMA))
    shake(model, "second", 5)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_bias_of_an_adapter_is_merged():
    config = peft.LoraConfig(**LORA, target_modules=["q_proj"], lora_bias=True)
    model = peft.get_peft_model(llama(), config).eval()
    shake(model, "default")
    expected = logits(model)
    close(logits(model.merge_and_unload()), expected)


def test_a_sum_that_is_not_finite_is_refused_and_nothing_changes():
    model = adapted("lora")
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"adapters .*default"):
        layer.merge()
    assert isinstance(layer.base_layer, lq.nn.LQLinear)
    assert not layer.merged


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_unloading_gives_the_quantized_model_back(kind):
    model = llama()
    before, layer, expected = bits(model), layer_of(model), logits(model)
    unloaded = adapted(kind, model=model).unload()
    assert layer_of(unloaded) is layer
    assert same(bits(unloaded), before)
    assert torch.equal(logits(unloaded), expected)


def test_several_adapters_are_switched_disabled_and_deleted():
    model = adapted("lora")
    first = logits(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    shake(model, "second", 5)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    mixed = model(input_ids=tokens(), adapter_names=["default", "second", "default", "__base__"]).logits
    for row, whole in ((0, first), (1, second), (3, logits(llama()))):
        close(mixed[row].detach(), whole[row])
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def own_factors(model):
    return [p for m in model.modules() if isinstance(m, lq.nn.LQLinear) for p in (m.lora_A, m.lora_B)]


def test_own_factors_are_frozen_and_stay_trainable_if_the_user_says_so():
    model = adapted("lora")
    assert not any(p.requires_grad for p in own_factors(model))
    for parameter in own_factors(model):
        parameter.requires_grad_(True)
    model.add_adapter("second", peft.LoraConfig(**LORA, **LLAMA))
    model.set_adapter("second")
    assert all(p.requires_grad for p in own_factors(model))
    loss(model).backward()
    assert all(p.grad is not None for p in own_factors(model))


def test_dora_with_dropout_follows_trainable_factors_below():
    linear = nn.Linear(16, 8)
    model = nn.Sequential(linear)
    lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/16:float32"), rank=2, scaling=0.5)
    config = peft.LoraConfig(**LORA, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    wrapped = peft.get_peft_model(model, config)
    shake(wrapped, "default")
    layer = wrapped.base_model.model[0]
    below, inner, outer = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    factors = below.lora_A.requires_grad_(True), below.lora_B.requires_grad_(True)
    x = torch.randn(5, 16)
    torch.manual_seed(1)
    found = torch.autograd.grad(wrapped(x).square().sum(), [*factors, inner, outer])

    torch.manual_seed(1)
    dropped = functional.dropout(x, 0.5)
    low = 0.5 * (factors[1] @ factors[0])
    weight = (lq.nn.merged_weight(below) - low).detach() + low
    delta = layer.scaling["default"] * (outer @ inner)
    ratio = layer.lora_magnitude_vector["default"].weight / (weight + delta).norm(dim=1).detach()
    y = functional.linear(x, weight, below.bias) + (ratio - 1) * (dropped @ weight.T) + ratio * (dropped @ delta.T)
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), [*factors, inner, outer]), strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_come_back_bit_for_bit(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert not any("base_layer" in key for key in keys)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert same(bits(again), bits(model))
    assert torch.equal(logits(again), logits(model))
    again.load_adapter(tmp_path, "other")
    again.set_adapter("other")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "mica"])
def test_starts_that_change_the_weight_below_are_refused(start):
    with pytest.raises(InvalidArgumentError, match=f"init_lora_weights .*{start}"):
        peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA, init_lora_weights=start))


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal"])
def test_other_starts_work(start):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, **LLAMA, init_lora_weights=start))
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["0", "2"])
def test_quantized_embeddings_among_modules_to_train_are_refused(name):
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    model[2].weight = model[0].weight
    lq.nn.quantize_model(model, NF4, rank=2, max_iter=1, embeddings=NF4)
    with pytest.raises(InvalidArgumentError, match=rf"modules_to_save .*{name}.*embeddings=None"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"], modules_to_save=[name]))
    assert isinstance(model[0], lq.nn.QuantizedEmbedding)


@pytest.mark.parametrize("rows", [[1], {"embed_tokens": [1]}])
def test_rows_of_quantized_embeddings_to_train_are_refused(rows):
    model = llama()
    lq.nn.quantize_model(model, NF4, embeddings=NF4)
    with pytest.raises(InvalidArgumentError, match=r"trainable_token_indices .*embed_tokens.*embeddings=None"):
        peft.get_peft_model(model, peft.LoraConfig(**LLAMA, trainable_token_indices=rows))


def test_quantized_layers_are_no_cause_for_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unsupported layer type")
        peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA))


def test_other_methods_of_peft_refuse_quantized_layers():
    with pytest.raises(TypeError, match=r"LQLinear.* not supported"):
        peft.get_peft_model(llama(), peft.LoHaConfig(**LLAMA))


PROMPTS = {
    "sampled": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
    "random": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "encoded": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_before_a_quantized_embedding(kind, tmp_path):
    # As many rows as a factor has, which PEFT would take for the embedding.
    make = functools.partial(llama, rank=4, embeddings=NF4, max_iter=1)
    below, dense = make(), make()
    lq.nn.dequantize_model(dense)
    torch.manual_seed(3)
    found = peft.get_peft_model(below, PROMPTS[kind]())
    torch.manual_seed(3)
    expected = peft.get_peft_model(dense, PROMPTS[kind]())
    assert found.word_embeddings is below.get_input_embeddings()
    assert not [name for name, _ in found.named_parameters() if name.endswith("embed_tokens.weight")]
    close(loss(found), loss(expected))
    close(gradients(found), gradients(expected))
    found.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again.eval()), logits(found.eval()))


def test_preparation_for_training_changes_no_code_and_no_scale():
    model = llama().to(torch.bfloat16)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, lq.nn.LQLinear)}
    before = {
        f"{name}.{key}": own for name, layer in layers.items() for key, own in dict(layer.named_buffers()).items()
    }
    kept = {name: buffer.clone() for name, buffer in before.items()}
    prepared = peft.prepare_model_for_kbit_training(model)
    assert kept
    assert all(torch.equal(before[name], kept[name]) and before[name].dtype == kept[name].dtype for name in kept)
    found = adapted("lora", model=prepared)
    assert gradients(found).keys() == {name for name, p in found.named_parameters() if p.requires_grad}


def test_models_without_quantized_layers_work_as_before():
    model = nn.Sequential(nn.Linear(4, 4))
    found = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert type(found.base_model.model[0]).__module__ == "peft.tuners.lora.layer"


# Adapter folders.


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("scalings", [(1.0, 1.0, 1.0), (0.3, 0.3, 7.0), (1 / 3, 2.5, 1e-3)])
def test_layers_of_peft_compute_what_ours_compute(scalings, dense, tmp_path):
    model = low_rank_model((3, 2, 5), scalings)
    save_adapter(tmp_path, model)
    base = without_factors(model)
    if dense:
        lq.nn.dequantize_model(base)
    found = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(7, 16)
    close(found(x), model(x))
    for name, own in lq.nn.factors(model).items():
        layer = found.base_model.model[int(name)]
        assert torch.equal(layer.lora_A["default"].weight, own.lora_A)
        assert torch.equal(layer.lora_B["default"].weight, own.lora_B)
        assert layer.scaling["default"] == pytest.approx(own.scaling, rel=1e-15)


def test_a_language_model_becomes_an_adapter_over_its_dense_quantized_part(tmp_path):
    model = llama(rank={"*.down_proj": 2, "*": 4}, scaling={"*.q_proj": 0.7}, max_iter=1)
    save_adapter(tmp_path, model, base_model="somewhere", task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == ("somewhere", "CAUSAL_LM", 4)
    base = without_factors(model)
    lq.nn.dequantize_model(base)
    close(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_trained_becomes_factors(rslora, tmp_path):
    targets = {"target_modules": ["0", "2"], "rank_pattern": {"2": 4}, "alpha_pattern": {"^0": 3}}
    model = peft.get_peft_model(
        without_factors(low_rank_model()), peft.LoraConfig(**LORA, **targets, use_rslora=rslora)
    )
    shake(model, "default")
    model.save_pretrained(tmp_path)
    found = low_rank_model()
    load_adapter(tmp_path, found)
    x = torch.randn(7, 16)
    close(found(x), model.eval()(x))
    assert [own.lora_A.shape[0] for own in lq.nn.factors(found).values()] == [3, 0, 4]


def test_a_name_that_ends_another_one_is_not_taken_for_it(tmp_path):
    save_adapter(tmp_path, nested_model())
    found = peft.PeftModel.from_pretrained(dense_nested_model(), tmp_path).base_model.model
    assert isinstance(found["b"]["q"], nn.Linear)
    assert found["q"].r == {"default": 3}


def test_models_that_peft_wraps_are_not_saved(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"PEFT.*base_layer"):
        save_adapter(tmp_path, adapted("lora"))
    assert list(tmp_path.iterdir()) == []
