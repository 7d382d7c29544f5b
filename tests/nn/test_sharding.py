"""Models in several processes, as far as one process shows it."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest

import lqlora as lq
from tests.requirements import require_module

torch = require_module("torch")

FORMAT = lq.BlockFormat.parse("nf4/16:u8/16:float32")


def _model():
    torch.manual_seed(0)
    parts = torch.nn.Embedding(32, 32), torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 32)
    return torch.nn.Sequential(*parts)


def _not_sent(model):
    """Return the names of tensors of a model that ``DistributedDataParallel`` does not send when it wraps the model."""
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    return [name for name in [*dict(model.named_parameters()), *dict(model.named_buffers())] if name in names]


def _stored(model):
    """Return the names of all codes and scales that are buffers."""
    return [name for name, _ in model.named_buffers() if ".quantized." in name]


class _Forwarding(torch.nn.Module):
    """Wrapper that looks attributes up in the model inside, as those of PEFT and ``torch.compile`` do."""

    def __init__(self, key, model):
        super().__init__()
        self.key = key
        self.add_module(key, model)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(vars(self)["key"]), name)


class TestReplicas:
    def test_what_is_converted_is_not_sent(self, tmp_path):
        model = _model()
        assert _not_sent(model) == []
        lq.nn.quantize_model(model, FORMAT, rank=2, include="1")
        assert _not_sent(model) == _stored(model)
        assert len(_stored(model)) == 4
        lq.nn.quantize_model(model, FORMAT, rank=2, include="3", embeddings=FORMAT)
        assert _not_sent(model) == _stored(model)
        assert len(_stored(model)) == 12
        lq.nn.save_model(tmp_path / "model", model)
        loaded = _model()
        lq.nn.load_model(tmp_path / "model", loaded)
        assert _not_sent(loaded) == _stored(model)
        lq.nn.dequantize_model(model)
        assert _not_sent(model) == []

    def test_copies_know_their_own_layers(self):
        model = _model()
        lq.nn.quantize_model(model, FORMAT, rank=2)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        lq.nn.dequantize_model(model)
        for own in (*copies, *(_Forwarding("_orig_mod", own) for own in copies)):
            assert len(_not_sent(own)) == 8
        alone = weakref.ref(model)
        shallow = copy.copy(model)
        del model
        assert alone() is None  # without the collector of cycles
        assert _not_sent(shallow) == []

    def test_wrappers_that_forward_attributes(self):
        model = _model()
        lq.nn.quantize_model(model, FORMAT, rank=2)
        for wrapped in _Forwarding("_orig_mod", model), _Forwarding("base_model", _Forwarding("model", model)):
            assert _not_sent(wrapped) == _stored(wrapped)
            assert len(_stored(wrapped)) == 8

    def test_scales_that_train_are_sent(self):
        model = torch.nn.Sequential(_model())
        lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/16:float32"), rank=2)
        assert len(_not_sent(model)) == 4
        lq.nn.train_scales(model[0], "1")
        assert _not_sent(model) == ["0.1.quantized.codes", "0.3.quantized.codes", "0.3.quantized.scales"]

    @pytest.mark.parametrize("given", [["1.bias", "2.running_mean"], {"1.bias", "2.running_mean"}])
    def test_names_of_others_stay(self, given):
        model = _model()
        model._ddp_params_and_buffers_to_ignore = given
        lq.nn.quantize_model(model, FORMAT, rank=2)
        assert _not_sent(model) == ["1.bias", *_stored(model)[:4], "2.running_mean", *_stored(model)[4:]]
        lq.nn.dequantize_model(model)
        assert _not_sent(model) == ["1.bias", "2.running_mean"]
