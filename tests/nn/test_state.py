"""Saving and loading of models: bit-equal outputs, or an error and an unchanged model."""

from __future__ import annotations

import copy

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import LQLinear, load_model, quantize_model, save_model  # noqa: E402

FORMAT = lq.BlockFormat.parse("nf3/8:u8/16:bfloat16")
IDS = torch.arange(10).view(2, 5)


class Model(nn.Module):
    def __init__(self, *, seed: int = 0, width: int = 8, tied: bool = True):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.up = nn.Linear(width, 12)
        self.down = nn.Linear(12, width, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.lm_head = nn.Linear(width, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.norm(self.down(torch.relu(self.up(self.embed(ids))))))


@pytest.fixture
def quantized() -> Model:
    model = Model().eval()
    quantize_model(model, FORMAT, rank=2, scaling=0.5)
    with torch.no_grad():  # as after training
        model.up.lora_A.add_(0.01)
        model.norm.running_mean.add_(0.1)
    return model


@pytest.fixture
def path(tmp_path, quantized):
    save_model(tmp_path / "m.safetensors", quantized, {"note": "mine"})
    return tmp_path / "m.safetensors"


def _state(model) -> dict:
    return {name: (t.tolist(), t.dtype, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}


def _assert_refused(path, model, message="does not fit") -> None:
    before = _state(model)
    with pytest.raises(CheckpointError, match=message):
        load_model(path, model)
    assert _state(model) == before
    assert not any(isinstance(module, LQLinear) for module in model.modules())


class TestRoundTrip:
    def test_outputs_are_bit_equal(self, path, quantized):
        fresh = Model(seed=1).eval()
        assert not torch.equal(fresh(IDS), quantized(IDS))
        content = load_model(path, fresh)
        assert torch.equal(fresh(IDS), quantized(IDS))
        assert content.metadata["note"] == "mine"

    def test_the_state_is_the_same(self, path, quantized):
        fresh = Model(seed=1).eval()
        load_model(path, fresh)
        assert _state(fresh) == _state(quantized)
        assert (fresh.up.rank, fresh.up.scaling) == (2, 0.5)

    def test_tied_weights_stay_tied_and_are_stored_once(self, path):
        fresh = Model(seed=1)
        load_model(path, fresh)
        assert fresh.lm_head.weight is fresh.embed.weight
        assert set(lq.load(path).tensors) & {"embed.weight", "lm_head.weight"} == {"embed.weight"}

    def test_a_file_of_tied_weights_fits_a_model_without_ties(self, path, quantized):
        fresh = Model(seed=1, tied=False).eval()
        load_model(path, fresh)
        assert torch.equal(fresh(IDS), quantized(IDS))

    def test_only_the_factors_are_trainable_afterwards(self, path):
        fresh = Model(seed=1)
        load_model(path, fresh)
        trainable = {name for name, p in fresh.named_parameters() if p.requires_grad}
        assert trainable == {f"{layer}.lora_{x}" for layer in ("up", "down") for x in "AB"}

    def test_the_mode_of_the_model_is_kept(self, path):
        fresh = Model(seed=1).eval()
        load_model(path, fresh)
        assert not any(module.training for module in fresh.modules())

    def test_the_file_passes_verification(self, path):
        assert set(lq.verify(path).matrices) == {"up", "down"}

    def test_a_loaded_model_trains_and_is_saved_again(self, path, tmp_path):
        model = Model(seed=1)
        load_model(path, model)
        model(IDS).square().sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
        save_model(tmp_path / "again", model)
        other = Model(seed=2)
        load_model(tmp_path / "again", other)
        assert torch.equal(other.eval()(IDS), model.eval()(IDS))

    def test_saving_leaves_the_model_alone(self, tmp_path, quantized):
        before = _state(quantized)
        save_model(tmp_path / "t", quantized)
        assert _state(quantized) == before


class TestMismatch:
    def test_another_width(self, path):
        _assert_refused(path, Model(width=9))

    def test_a_layer_the_model_does_not_have(self, path):
        model = Model()
        model.down = nn.Identity()
        _assert_refused(path, model)

    def test_a_model_without_linear_layers(self, path):
        _assert_refused(path, nn.Sequential(nn.ReLU()))

    def test_a_tensor_the_file_does_not_have(self, path):
        model = Model()
        model.more = nn.LayerNorm(3)
        _assert_refused(path, model, r"more\.weight")

    def test_a_tensor_the_model_does_not_have(self, path):
        model = Model()
        model.norm = nn.Identity()
        _assert_refused(path, model, r"norm\.")

    def test_a_bias_the_model_does_not_have(self, path):
        model = Model()
        model.up = nn.Linear(8, 12, bias=False)
        _assert_refused(path, model, r"up\.bias")

    def test_a_model_that_ties_what_the_file_has_apart(self, tmp_path):
        # Two stored tensors cannot be loaded into one: the second would silently overwrite the first.
        apart = Model(tied=False)
        quantize_model(apart, FORMAT, rank=1)
        save_model(tmp_path / "t", apart)
        _assert_refused(tmp_path / "t", Model(seed=1, tied=True))

    def test_a_model_that_is_quantized_already(self, path, quantized):
        before = _state(quantized)
        with pytest.raises(InvalidArgumentError, match="is quantized already"):
            load_model(path, quantized)
        assert _state(quantized) == before

    @pytest.mark.parametrize(
        "tied", [["lm_head.weight"], {"lm_head.weight": "nowhere"}, {"lm_head.weight": 3}, "x", None]
    )
    def test_ties_that_make_no_sense(self, path, tied):
        content = lq.load(path)
        lq.save(path, content.matrices, content.tensors, {"tied": tied})
        _assert_refused(path, Model(seed=1), r"m\.safetensors.*metadata\.tied")

    def test_a_truncated_file(self, path):
        path.write_bytes(path.read_bytes()[:-10])
        _assert_refused(path, Model(), "truncated")

    def test_a_missing_file(self, tmp_path):
        _assert_refused(tmp_path / "nowhere", Model(), "nowhere")


class TestSaving:
    def test_a_model_without_quantized_layers_is_refused(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match="model"):
            save_model(tmp_path / "t", Model())
        assert list(tmp_path.iterdir()) == []

    def test_reserved_metadata_is_refused(self, tmp_path, quantized):
        with pytest.raises(InvalidArgumentError, match=r"metadata.*tied"):
            save_model(tmp_path / "t", quantized, {"tied": {}})

    def test_a_folder_that_does_not_exist(self, tmp_path, quantized):
        with pytest.raises(CheckpointError, match="nowhere"):
            save_model(tmp_path / "nowhere" / "t", quantized)
        assert list(tmp_path.iterdir()) == []

    def test_a_copy_of_a_model_is_saved_the_same(self, path, tmp_path, quantized):
        save_model(tmp_path / "copy", copy.deepcopy(quantized), {"note": "mine"})
        first, second = lq.verify(path), lq.verify(tmp_path / "copy")
        assert first.metadata == second.metadata
        for name, matrix in first.matrices.items():
            other = second.matrices[name]
            assert (matrix.quantized.packed == other.quantized.packed).all()
            assert (matrix.lora_B == other.lora_B).all()


def test_a_layer_by_itself_is_refused(tmp_path):
    d = lq.decompose(torch.eye(8).numpy(), FORMAT, 1)
    with pytest.raises(InvalidArgumentError, match=r"model.*Sequential"):
        save_model(tmp_path / "t", LQLinear.from_decomposition(d))


def test_walks_through_a_model_do_not_grow_in_number_with_its_layers(tmp_path, monkeypatch):
    """A walk for each layer would take a time that grows with the square of their number."""
    visits, walk = [], nn.Module.named_modules

    def counted(self, *args, **kwargs):
        for pair in walk(self, *args, **kwargs):
            visits.append(pair[0])
            yield pair

    def visited(count):
        model, fresh = (nn.ModuleList(nn.Linear(8, 8) for _ in range(count)) for _ in range(2))
        visits.clear()
        quantize_model(model, lq.BlockFormat(lq.NF4, 8), rank=0)
        save_model(tmp_path / "model.safetensors", model)
        load_model(tmp_path / "model.safetensors", fresh)
        return len(visits)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    assert visited(20) < 4 * visited(5) * 1.05
