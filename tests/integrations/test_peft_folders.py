"""Low-rank factors as adapter folders of PEFT: written, read back, and refused if they are not what factors can hold."""

from __future__ import annotations

import copy
import json
import math

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 - needs torch

from lqlora.integrations._adapter_files import read_adapter  # noqa: E402
from lqlora.integrations.exporting import can_export  # noqa: E402
from lqlora.integrations.peft import convert_adapter, load_adapter, save_adapter  # noqa: E402
from tests.integrations.tiny_models import FORMAT, low_rank_model, nested_model, without_factors  # noqa: E402


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


def test_an_adapter_of_another_quantized_part_is_refused_unless_it_is_wanted(tmp_path):
    model, other = low_rank_model(), low_rank_model()
    save_adapter(tmp_path, model)
    layer = next(own for own in other.modules() if isinstance(own, lq.nn.LQLinear))
    layer.quantized.codes[0] ^= 1
    before = bits(other)
    with pytest.raises(CheckpointError, match="another quantized part"):
        load_adapter(tmp_path, other)
    assert same(bits(other), before)
    load_adapter(tmp_path, other, other_base=True)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})  # as PEFT writes it
    load_adapter(tmp_path, other)
    for text in ("[", '{"0": 5}', "[]"):
        save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt", "lqlora_bases": text})
        with pytest.raises(CheckpointError, match="damaged metadata"):
            load_adapter(tmp_path, other)


class TestOriginal:
    """A trained adapter becomes one for the original weights."""

    @pytest.fixture
    def start(self, tmp_path):
        """A dense model, and one that was decomposed, saved and trained."""
        torch.manual_seed(0)
        dense = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 16))
        model = copy.deepcopy(dense)
        lq.nn.quantize_model(model, FORMAT, rank={"0": 3, "1": 2}, scaling=2.0, progress=False)
        lq.nn.save_model(tmp_path / "start.safetensors", model)
        return dense, model

    def converted(self, folder):
        """The factors of the converted adapter."""
        convert_adapter(folder / "start.safetensors", folder / "trained", folder / "original")
        return read_adapter(folder / "original")

    @pytest.mark.parametrize("scaling", [2.0, 0.5, 3.0])
    def test_the_change_of_the_weights_is_that_of_training(self, start, tmp_path, scaling):
        _, model = start
        before = {name: own.scaling * own.lora_B @ own.lora_A for name, own in lq.nn.factors(model).items()}
        trained = {
            name: lq.nn.Factors(own.lora_A + torch.randn_like(own.lora_A), torch.randn_like(own.lora_B), scaling)
            for name, own in lq.nn.factors(model).items()
        }
        lq.nn.set_factors(model, trained)
        save_adapter(tmp_path / "trained", model)
        for name, own in self.converted(tmp_path).items():
            assert len(own.lora_A) == 2 * len(trained[name].lora_A)
            change = own.scaling * own.lora_B.double() @ own.lora_A.double()
            expected = scaling * trained[name].lora_B.double() @ trained[name].lora_A.double() - before[name].double()
            torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)
            if scaling == 2.0:  # nothing is rounded
                rank = len(trained[name].lora_A)
                assert torch.equal(own.lora_B[:, :rank], trained[name].lora_B)
                assert torch.equal(own.lora_A[:rank], trained[name].lora_A)

    def test_layers_without_an_adapter_lose_their_low_rank_part(self, start, tmp_path):
        _, model = start
        first = lq.nn.factors(model)
        lq.nn.set_factors(model, {**first, "1": lq.nn.Factors(first["1"].lora_A[:0], first["1"].lora_B[:, :0], 1.0)})
        save_adapter(tmp_path / "trained", model)
        found = self.converted(tmp_path)
        assert torch.equal(found["0"].lora_B[:, :3], -found["0"].lora_B[:, 3:])
        own = found["1"]
        torch.testing.assert_close(own.scaling * own.lora_B @ own.lora_A, -2.0 * first["1"].lora_B @ first["1"].lora_A)

    def test_peft_adds_it_to_the_original_weights(self, start, tmp_path):
        peft = require_module("peft")
        dense, model = start
        with torch.no_grad():
            model[0].lora_B += 0.1
        save_adapter(tmp_path / "trained", model)
        change = self.converted(tmp_path)
        found = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "original").merge_and_unload()
        for name, own in change.items():
            expected = dense[int(name)].weight + own.scaling * own.lora_B @ own.lora_A
            torch.testing.assert_close(found[int(name)].weight, expected)

    @pytest.mark.parametrize("changes", [{"lora_alpha": 0}, {"lora_alpha": 5e-324}])
    def test_a_scaling_of_zero_is_no_low_rank_part(self, start, tmp_path, changes):
        _, model = start
        first = lq.nn.factors(model)
        save_adapter(tmp_path / "trained", model)
        edit(tmp_path / "trained", **changes, alpha_pattern={})
        for name, own in self.converted(tmp_path).items():
            torch.testing.assert_close(
                own.scaling * own.lora_B @ own.lora_A, -2.0 * first[name].lora_B @ first[name].lora_A
            )

    @pytest.mark.parametrize("alpha", [1e-300, 1e308])
    def test_numbers_that_no_file_can_hold_are_refused(self, start, tmp_path, alpha):
        _, model = start
        save_adapter(tmp_path / "trained", model)
        edit(tmp_path / "trained", lora_alpha=alpha, alpha_pattern={})
        with pytest.raises(CheckpointError, match="no number for the sum"):
            self.converted(tmp_path)
        assert not (tmp_path / "original").exists()

    @pytest.mark.parametrize("shape", [(16, 5), (16,), (16, 3, 1)])
    def test_a_factor_of_another_shape_is_refused(self, start, tmp_path, shape):
        _, model = start
        save_adapter(tmp_path / "trained", model)
        weights = load_file(tmp_path / "trained" / "adapter_model.safetensors")
        weights["base_model.model.0.lora_B.weight"] = torch.ones(shape)
        save_file(weights, tmp_path / "trained" / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="lora_A and lora_B of rank"):
            self.converted(tmp_path)

    def test_folders_that_are_in_use_are_left_alone(self, start, tmp_path):
        _, model = start
        save_adapter(tmp_path / "trained", model)
        before = {path.name: path.read_bytes() for path in (tmp_path / "trained").iterdir()}
        with pytest.raises(CheckpointError, match="is not an empty folder"):
            convert_adapter(tmp_path / "start.safetensors", tmp_path / "trained", tmp_path / "trained")
        assert {path.name: path.read_bytes() for path in (tmp_path / "trained").iterdir()} == before

    def test_embeddings_and_experts_are_refused(self, tmp_path):
        weights = {
            "embed_tokens.weight": torch.randn(16, 32), "up.weight": torch.randn(16, 32), "mlp.experts.down": torch.randn(2, 16, 32),
        }  # fmt: skip
        (tmp_path / "dense").mkdir()
        save_file(weights, tmp_path / "dense" / "model.safetensors")
        adapter = {
            "base_model.model.up.lora_A.weight": torch.ones(1, 32),
            "base_model.model.up.lora_B.weight": torch.ones(16, 1),
        }
        (tmp_path / "adapter").mkdir()
        save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
        for name, message in (("embed_tokens", "embedding"), ("*experts*", "array of experts")):
            options = {"include": ["up", name], "exclude": [], "rank": 1, "max_iter": 1, "progress": False}
            lq.decompose_checkpoint(tmp_path / "dense", tmp_path / message, FORMAT, **options)
            with pytest.raises(FormatError, match=message):
                convert_adapter(tmp_path / message, tmp_path / "adapter", tmp_path / "original")
            assert any(message in own for own in can_export(tmp_path / message, "dense").values())

    def test_what_does_not_fit_is_refused(self, start, tmp_path):
        _, model = start
        other = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
        lq.nn.quantize_model(other, FORMAT, rank=1, progress=False)
        save_adapter(tmp_path / "three", other)
        save_adapter(tmp_path / "two", torch.nn.Sequential(*other[:2]))
        save_adapter(tmp_path / "trained", model)
        start = tmp_path / "start.safetensors"
        for adapter, message in (
            ("three", "has no matrix"),
            ("two", "Name the checkpoint that"),
            ("no", "does not exist"),
        ):
            with pytest.raises(CheckpointError, match=message):
                convert_adapter(start, tmp_path / adapter, tmp_path / "original")
        weights = load_file(tmp_path / "two" / "adapter_model.safetensors")
        weights = {name: own[:, :8].contiguous() if "lora_A" in name else own for name, own in weights.items()}
        save_file(weights, tmp_path / "two" / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="has other shapes there"):
            convert_adapter(start, tmp_path / "two", tmp_path / "original")
        assert not (tmp_path / "original").exists()


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
