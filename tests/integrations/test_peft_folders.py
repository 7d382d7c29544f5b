"""Low-rank factors as adapter folders of PEFT: written, read back, and refused if they are not what factors can hold."""

from __future__ import annotations

import json
import math

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 - needs torch

from lqlora.integrations.peft import load_adapter, save_adapter  # noqa: E402
from tests.integrations.tiny_models import low_rank_model, nested_model, without_factors  # noqa: E402


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_comes_back_as_factors(tmp_path):
    model = low_rank_model()
    save_adapter(tmp_path, model)
    other = without_factors(model)
    load_adapter(tmp_path, other)
    x = torch.randn(7, 16)
    assert torch.equal(other(x), model(x))
    for name, own in lq.nn.factors(other).items():
        expected = lq.nn.factors(model)[name]
        assert torch.equal(own.lora_A, expected.lora_A)
        assert torch.equal(own.lora_B, expected.lora_B)
        assert own.scaling == pytest.approx(expected.scaling, rel=1e-15)


def test_a_name_that_ends_another_one_is_not_taken_for_it(tmp_path):
    model = nested_model()
    expected = bits(model)
    save_adapter(tmp_path, model)
    load_adapter(tmp_path, model)
    assert same(bits(model), expected)
    assert {name: (len(f.lora_A), f.scaling) for name, f in lq.nn.factors(model).items()} == {
        "q": (3, 0.5),
        "b.q": (0, 1.0),
    }


@pytest.mark.parametrize("pattern", ["^0", "0", r"^0$", "a|b"])
def test_patterns_are_names_or_refused(pattern, tmp_path):
    model = low_rank_model()
    save_adapter(tmp_path, model)
    edit(tmp_path, alpha_pattern={pattern: 6})
    if "$" in pattern or "|" in pattern:
        with pytest.raises(CheckpointError, match="alpha_pattern"):
            load_adapter(tmp_path, model)
    else:
        load_adapter(tmp_path, model)
        assert lq.nn.factors(model)["0"].scaling == 2


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "target_parameters": {"target_parameters": ["experts"]},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "trainable_token_indices": {"trainable_token_indices": [3]},
    "an_option_of_the_future": {"an_option_of_the_future": 1},
    "peft_type": {"peft_type": "IA3"},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_16"},
    "lora_alpha": {"lora_alpha": "16"},
    "alpha_pattern": {"alpha_pattern": {"(a+)+b": 3}},
    "rank": {"r": 5},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_factors_cannot_stand_for_is_refused_by_name(field, tmp_path):
    model = low_rank_model()
    save_adapter(tmp_path, model)
    edit(tmp_path, **REFUSED[field])
    before = bits(model)
    with pytest.raises(CheckpointError, match=field) as caught:
        load_adapter(tmp_path, model)
    assert str(tmp_path) in str(caught.value)
    assert same(bits(model), before)


A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
DAMAGES = {
    "lora_magnitude_vector": lambda t: t | {"base_model.model.0.lora_magnitude_vector": torch.ones(12)},
    "lora_B.bias": lambda t: t | {"base_model.model.0.lora_B.bias": torch.ones(12)},
    "missing": lambda t: t | {"base_model.model.missing.lora_A.weight": torch.ones(3, 4)},
    "of rank 3": lambda t: {key: own for key, own in t.items() if key != B},
    "shapes": lambda t: t | {A: torch.ones(3, 4)},
    "non-finite": lambda t: t | {A: t[A] * math.nan},
    "int64": lambda t: t | {A: t[A].long()},
    "no tensor": lambda _: {},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(damage, tmp_path):
    model = low_rank_model()
    save_adapter(tmp_path, model)
    path = tmp_path / "adapter_model.safetensors"
    save_file(DAMAGES[damage](load_file(path)), path)
    before = bits(model)
    with pytest.raises(CheckpointError, match=damage):
        load_adapter(tmp_path, model)
    assert same(bits(model), before)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config"):
        load_adapter(tmp_path, low_rank_model())
    save_adapter(tmp_path, low_rank_model())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match="adapter_model"):
        load_adapter(tmp_path, low_rank_model())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        save_adapter(tmp_path / "file", low_rank_model())


def test_models_without_factors_are_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="rank"):
        save_adapter(tmp_path, low_rank_model((0, 0, 0)))
    assert list(tmp_path.iterdir()) == []
