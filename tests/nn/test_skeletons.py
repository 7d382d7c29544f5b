"""Models on the meta device: loaded with the results of others, or refused by name and left as they were."""

from __future__ import annotations

import copy
import pickle

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import LQLinear, load_model, quantize_model, save_model  # noqa: E402

FORMAT = lq.BlockFormat.parse("nf3/8:u8/16:bfloat16")
IDS = torch.arange(10).view(2, 5)


class Derived(nn.Linear):
    """Class of others, which is tried out before it is replaced."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Changed(nn.Linear):
    """The same, with another result."""

    def forward(self, x):
        return 2 * (x @ self.weight.T) + self.bias


class Embedding(nn.Embedding):
    """Embedding that multiplies its rows by a buffer, as that of Gemma."""

    def __init__(self, *size):
        super().__init__(*size)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Model(nn.Module):
    """Ties, buffers of both kinds, classes of others, and a head that trains."""

    def __init__(self, hidden=Derived):
        super().__init__()
        self.embed, self.up, self.down = Embedding(11, 8), hidden(8, 16), nn.Linear(16, 8)
        self.norm, self.again, self.head = nn.BatchNorm1d(5), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.again.bias = self.down.bias
        self.classifier = nn.Linear(11, 3)
        self.register_buffer("angles", torch.arange(5.0)[:, None] / 7, persistent=False)
        self.register_buffer("mask", torch.arange(5)[:, None] != 3, persistent=False)

    def forward(self, ids):
        x = self.down(torch.relu(self.up(self.embed(ids))))
        x = self.norm(self.again(x) + self.angles.to(x.dtype)) * self.mask
        return self.classifier(self.head(x))

    def get_input_embeddings(self):
        return self.embed

    def _init_weights(self, module):
        """Draw weights and compute buffers, as models of transformers do."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
        elif isinstance(module, Embedding):
            module.scale.fill_(3)
            nn.init.normal_(module.weight)
        elif isinstance(module, Model):
            module.angles.copy_(torch.arange(5.0)[:, None] / 7)
            module.mask.copy_(torch.arange(5)[:, None] != 3)


def _quantized(embeddings=None, dtype=torch.float32):
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    quantize_model(model, FORMAT, rank=2, embeddings=embeddings, max_iter=1)
    with torch.no_grad():
        model.norm.running_mean.add_(0.1)
    return model


def _skeleton(*args):
    with torch.device("meta"):
        return Model(*args).eval()


def _tensors(model):
    """Return all tensors of a model by each of their names."""
    return {
        f"{name}.{key}": own
        for name, module in model.named_modules(remove_duplicate=False)
        for held in (module._parameters, module._buffers)
        for key, own in held.items()
        if own is not None
    }


def _assert_refused(path, model, message):
    before = _tensors(model)
    with pytest.raises(CheckpointError, match=message):
        load_model(path, model)
    after = _tensors(model)
    assert after.keys() == before.keys()
    assert all(after[name] is own for name, own in before.items())
    assert not any(isinstance(module, LQLinear) for module in model.modules())


@pytest.mark.parametrize("embeddings", [None, FORMAT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [None, "up"])
def test_a_skeleton_becomes_the_model_that_was_saved(tmp_path, embeddings, dtype, offload):
    model = _quantized(embeddings, dtype)
    save_model(tmp_path / "model", model)
    skeleton = _skeleton().to(dtype)
    state = torch.get_rng_state()
    load_model(tmp_path / "model", skeleton, offload=offload)
    assert torch.equal(torch.get_rng_state(), state)
    found, expected = _tensors(skeleton), _tensors(model)
    assert found.keys() == expected.keys()
    for name, own in expected.items():
        assert torch.equal(found[name], own), name
        assert (found[name].dtype, found[name].requires_grad) == (own.dtype, own.requires_grad)
        assert type(found[name]) is type(own)
    assert skeleton.again.bias is skeleton.down.bias
    if embeddings is None:
        assert skeleton.head.weight is skeleton.embed.weight
    assert torch.equal(skeleton(IDS), model(IDS))
    skeleton(IDS).square().sum().backward()
    assert pickle.dumps(copy.deepcopy(skeleton))
    save_model(tmp_path / "again", skeleton)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


def test_tensors_in_memory_keep_their_memory(tmp_path):
    save_model(tmp_path / "model", _quantized())
    model = Model().eval()
    model.up.to("meta")
    before = _tensors(model)
    load_model(tmp_path / "model", model)
    assert all(own is before[name] for name, own in _tensors(model).items() if name in before and "up" not in name)
    assert torch.equal(model(IDS), _quantized()(IDS))


def test_what_is_loaded_is_not_the_file(tmp_path):
    save_model(tmp_path / "model", _quantized())
    skeleton = _skeleton()
    content = load_model(tmp_path / "model", skeleton)
    before = content.tensors["embed.weight"].copy()
    with torch.no_grad():
        for own in _tensors(skeleton).values():
            own.zero_()
    assert (content.tensors["embed.weight"] == before).all()
    lq.verify(tmp_path / "model")


def _without_initializer(model):
    model._init_weights = None


def _computes_nothing(model):
    model._init_weights = lambda _: None


def _raises(model):
    def fails(module):
        module.angles.fill_(2)
        raise KeyError(module)

    model._init_weights = fails


def _has_real_parameters(model):
    model.classifier.to_empty(device="cpu")


@pytest.mark.parametrize("change", [_without_initializer, _computes_nothing, _raises, _has_real_parameters])
def test_buffers_that_nobody_computes_are_named(tmp_path, change):
    save_model(tmp_path / "model", _quantized())
    skeleton = _skeleton()
    change(skeleton)
    _assert_refused(tmp_path / "model", skeleton, r"'\w+' is on the meta device, and files do not store it")
    for name, own in {"angles": torch.arange(5.0)[:, None] / 7, "mask": torch.arange(5)[:, None] != 3}.items():
        setattr(skeleton, name, own)
    skeleton.embed.scale = torch.tensor(3.0)
    load_model(tmp_path / "model", skeleton)
    assert torch.equal(skeleton(IDS), _quantized()(IDS))


def test_buffers_that_have_values_keep_them(tmp_path):
    save_model(tmp_path / "model", _quantized())
    skeleton = _skeleton()
    skeleton.mask = given = torch.zeros(5, 1, dtype=torch.bool)
    load_model(tmp_path / "model", skeleton)
    assert skeleton.mask is given
    assert not given.any()
    assert torch.equal(skeleton.angles, Model().angles)


def test_other_tensors_on_the_meta_device_are_named(tmp_path):
    save_model(tmp_path / "model", _quantized())
    skeleton = _skeleton()
    skeleton.norm.factor = torch.ones(3, device="meta")
    _assert_refused(tmp_path / "model", skeleton, r"'norm\.factor' is on the meta device")
    skeleton.norm.factor = skeleton.norm.running_mean  # held twice
    load_model(tmp_path / "model", skeleton)
    assert skeleton.norm.factor is skeleton.norm.running_mean


def test_a_file_that_does_not_fit_leaves_the_skeleton_as_it_was(tmp_path):
    save_model(tmp_path / "model", _quantized())
    skeleton = _skeleton()
    skeleton.more = nn.Linear(2, 2, device="meta")
    _assert_refused(tmp_path / "model", skeleton, r"'more\.weight' is not in the file \(2 differences")
    _assert_refused(tmp_path / "model", _skeleton(Changed), r"'up' is of a class")


def test_conversion_goes_on_to_refuse_the_meta_device():
    with pytest.raises(InvalidArgumentError, match="meta device"):
        quantize_model(_skeleton(), FORMAT, rank=2)
