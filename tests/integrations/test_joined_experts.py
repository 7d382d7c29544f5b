"""Experts that files have one by one, and models of transformers 5 in one array."""

from __future__ import annotations

import copy
import pickle

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_module

torch, transformers, peft = (require_module(name) for name in ("torch", "transformers", "peft"))
if transformers.__version__.startswith("4."):
    pytest.skip("transformers 4 has a layer for each expert", allow_module_level=True)
from torch.nn import functional  # noqa: E402

from lqlora.integrations import transformers as ours  # noqa: E402 - needs torch
from lqlora.integrations.exporting import can_export  # noqa: E402
from lqlora.integrations.merging import merge_checkpoint  # noqa: E402
from lqlora.integrations.peft import register  # noqa: E402
from lqlora.nn.experts import JoinedExperts  # noqa: E402
from tests.integrations.tiny_models import VOCABULARY, tokens  # noqa: E402

# transformers warns of its own changes.
pytestmark = pytest.mark.filterwarnings("ignore")

SCALAR, TRELLIS = lq.BlockFormat.parse("nf3/8:float32"), lq.BlockFormat.parse("tcq2/8:u8/256:float32")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def mixtral():
    return transformers.MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=4)  # the joined matrix is square


def qwen2():
    few = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    }
    return transformers.Qwen2MoeConfig(**SIZES, intermediate_size=48, **few)


def deepseek():
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    few = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1}
    sizes = SIZES | {"num_key_value_heads": 4, "moe_intermediate_size": 24}
    return transformers.DeepseekV3Config(**sizes, intermediate_size=48, **few, **heads)


def jamba():
    sizes = SIZES | {"num_hidden_layers": 8}
    return transformers.JambaConfig(**sizes, intermediate_size=48, num_experts=4, use_mamba_kernels=False)


MODELS = {"mixtral": mixtral, "qwen2": qwen2, "deepseek": deepseek, "jamba": jamba}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    ours.register()
    register()
    transformers.utils.logging.disable_progress_bar()


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(tokens(2)).logits


def decomposed(folder, config, formats=SCALAR, **options):
    """A folder, and the dense model that it stands for."""
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    dense.save_pretrained(folder / "dense")
    given = {"rank": 2, "max_iter": 1, "progress": False, "factor_dtype": "float32"} | options
    lq.decompose_checkpoint(folder / "dense", folder / "small", formats, **given)
    merge_checkpoint(folder / "small", folder / "merged", dtype="float32", progress=False)
    return folder / "small", load(folder / "merged", dtype=torch.float32)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder, dense = decomposed(tmp_path_factory.mktemp("mixture"), mixtral())
    return folder, logits(dense)


def arrays(model):
    return [own for module in model.modules() for own in vars(module).values() if isinstance(own, JoinedExperts)]


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(own, marks=pytest.mark.slow) for own in list(MODELS)[1:])])
def test_the_model_computes_what_the_merged_one_computes(tmp_path, name):
    folder, dense = decomposed(tmp_path, MODELS[name]())
    model = load(folder)
    assert len(arrays(model)) == 2 * (8 // 2 if name == "jamba" else 1 if name == "deepseek" else 2)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    lq.nn.dequantize_model(model)
    assert model.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)
    assert not arrays(model)


def test_matrices_of_an_expert_may_differ_in_format_and_rank(tmp_path):
    names = [
        f"model.layers.0.block_sparse_moe.experts.{index}.{key}" for index in range(4) for key in ("w1", "w2", "w3")
    ]
    formats = {name: TRELLIS if index % 3 else SCALAR for index, name in enumerate(names)}
    folder, dense = decomposed(
        tmp_path, mixtral(), formats, rank={name: 1 + index % 3 for index, name in enumerate(names)}
    )
    model = load(folder)
    assert len(arrays(model)) == 2  # the other block is dense
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_layers_of_their_own(mixture, other):
    model = load(mixture[0])
    found, expected = other(model), logits(model)
    assert torch.equal(logits(found), expected)
    for layer in found.modules():
        if isinstance(layer, lq.nn.LQLinear):
            layer.lora_B.data.zero_()
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(found), expected)


def test_factors_of_all_experts_train(mixture):
    model = load(mixture[0]).train()
    model(tokens(8), labels=tokens(8)).loss.backward()
    of_experts = {name: own.grad for name, own in model.named_parameters() if ".experts." in name}
    assert len(of_experts) == 2 * 4 * 3 * 2
    assert all(own is not None and own.abs().sum() > 0 for own in of_experts.values())


def test_a_part_of_an_array_is_refused(tmp_path):
    folder, _ = decomposed(tmp_path, mixtral(), exclude=["lm_head", "embed_tokens", "*.gate", "*.experts.2.w3"])
    with pytest.raises(CheckpointError, match="Decompose all of them, or none"):
        load(folder)


def test_products_call_the_layers_and_other_functions_are_refused(mixture):
    model = load(mixture[0])
    experts = model.model.layers[0].mlp.experts
    weight, x = experts.gate_up_proj[torch.tensor(3)], torch.randn(5, 32)
    expected = torch.cat([own(x) for own in experts.gate_up_proj.layers(3)], 1)
    bias = torch.randn(32)
    assert weight.shape == (32, 32)
    assert weight.dtype == torch.float32
    assert torch.equal(functional.linear(x, weight), expected)
    assert torch.equal(functional.linear(x, weight.to(torch.float32), bias), expected + bias)
    assert torch.equal(x @ weight.mT, expected)
    assert torch.equal(x.matmul(weight.t()), expected)
    for wrong in (
        lambda: x @ weight,
        lambda: functional.linear(x, weight.mT),
        lambda: weight * 2,
        lambda: weight[0],
        weight.sum,
    ):
        with pytest.raises(InvalidArgumentError, match="quantized in parts"):
            wrong()
    with pytest.raises(IndexError):
        experts.gate_up_proj[4]


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_classes_with_another_prefix_open_the_folder_and_back(tmp_path, name):
    folder, dense = decomposed(tmp_path, MODELS[name]())
    body = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [own(tokens(2)).last_hidden_state for own in (body, dense.model)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    ours.mark_quantized(body)
    body.save_pretrained(tmp_path / "body")
    model = load(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(model.model(tokens(2)).last_hidden_state, states[0])


def test_files_of_this_library_do_not_hold_them(mixture, tmp_path):
    with pytest.raises(InvalidArgumentError, match="model must not have experts"):
        lq.nn.save_model(tmp_path / "m.safetensors", load(mixture[0]))
    assert not (tmp_path / "m.safetensors").exists()


class TestAdapters:
    def test_exports_of_factors_that_peft_would_lose_are_refused(self, tmp_path):
        folder, _ = decomposed(tmp_path, qwen2())
        faults = can_export(folder, "dense")
        lost = {name for name in lq.load(folder).matrices if name.endswith(("gate_proj", "up_proj", "down_proj"))}
        assert faults.keys() == lost
        assert all("PEFT joins adapters" in own for own in faults.values())
        ranks = {"*.mlp.*": 0, "*.self_attn.*": 2}
        lq.decompose_checkpoint(tmp_path / "dense", tmp_path / "other", SCALAR, rank=ranks, max_iter=1, progress=False)
        assert can_export(tmp_path / "other", "dense") == {}

    @pytest.mark.parametrize(
        "name", [*(pytest.param(own, marks=pytest.mark.slow) for own in ("qwen2", "jamba")), "mixtral"]
    )
    def test_adapters_of_experts_are_refused_before_the_model_changes(self, tmp_path, name):
        folder, _ = decomposed(tmp_path, MODELS[name]())
        model = load(folder)
        before = list(model.state_dict())
        experts = ["w1", "w2", "w3"] if name == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
        for targets in (experts, experts[:1], r".*\.experts\.1\..*"):
            with pytest.raises(InvalidArgumentError, match="config must not have adapters"):
                peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
        with pytest.raises(InvalidArgumentError, match="config must not have adapters"):
            peft.get_peft_model(model, peft.LoraConfig(target_parameters=["experts.gate_up_proj"]))
        assert list(model.state_dict()) == before

    def test_experts_are_left_out_of_all_linear(self, mixture):
        model = peft.get_peft_model(load(mixture[0]), peft.LoraConfig(target_modules="all-linear"))
        found = [name for name, _ in model.named_parameters() if "lora_A.default" in name]
        assert len(found) == 2 * 4
        assert not any("experts" in name for name in found)
