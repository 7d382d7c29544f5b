"""Models in several processes, as far as one process shows it."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError
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
        adapted = _Forwarding("base_model", model), _Forwarding("base_model", _Forwarding("model", model))
        for wrapped in (*adapted, *(_Forwarding("_orig_mod", own) for own in (model, *adapted))):
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


class TestShardable:
    def test_results_files_and_copies_stay_the_same(self, tmp_path):
        model = _model().eval()
        lq.nn.quantize_model(model, FORMAT, rank=2, embeddings=FORMAT)
        other = copy.deepcopy(model)
        lq.nn.make_shardable(other)
        lq.nn.make_shardable(other)
        assert _stored(other) == []
        assert all(
            own.dtype == torch.uint8 and own.ndim == 1
            for name, own in other.named_parameters()
            if ".quantized." in name
        )
        ids = torch.arange(5)
        for own in (other, pickle.loads(pickle.dumps(other)), copy.deepcopy(other).to(torch.float32)):
            assert _gradients(own, ids) == _gradients(model, ids)
            assert torch.equal(own[1].weight.dequantize(), model[1].weight.dequantize())
            assert torch.equal(lq.nn.merged_weight(own[1]), lq.nn.merged_weight(model[1]))
        for name, own in (("one", model), ("two", other)):
            lq.nn.save_model(tmp_path / name, own)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        assert other.state_dict().keys() == model.state_dict().keys()
        lq.nn.dequantize_model(other)
        assert torch.equal(other[0].weight, model[0].weight.dequantize())

    @pytest.mark.parametrize("fmt", ["nf4/16:float32", "affine4/16@-1:float16", "nf3/16:u8/16:bfloat16"])
    def test_scales_that_train(self, fmt):
        model = _model()
        lq.nn.quantize_model(model, lq.BlockFormat.parse(fmt), rank=2)
        lq.nn.train_scales(model, "1", train_factors=True)
        other = copy.deepcopy(model)
        lq.nn.make_shardable(other)
        assert _gradients(other, torch.arange(5)) == _gradients(model, torch.arange(5))
        lq.nn.freeze_scales(other)
        assert torch.equal(lq.dequantize(other[1].quantized.array), lq.dequantize(model[1].quantized.array))

    def test_offloaded_layers_are_refused_and_shardable_ones_not_offloaded(self, tmp_path):
        model = _model()
        with pytest.raises(InvalidArgumentError, match="quantized layer"):
            lq.nn.make_shardable(model)
        lq.nn.quantize_model(model, FORMAT, rank=2)
        lq.nn.offload_model(model, tmp_path / "codes", "3")
        with pytest.raises(InvalidArgumentError, match=r"'3.quantized'.*onload_model"):
            lq.nn.make_shardable(model)
        lq.nn.onload_model(model)
        lq.nn.make_shardable(model)
        with pytest.raises(InvalidArgumentError, match=r"make_shardable.*'1'"):
            lq.nn.offload_model(model, tmp_path / "codes")


def _gradients(model, ids):
    y = model(ids)
    trained = [own for own in model.parameters() if own.requires_grad]
    return [own.tolist() for own in (y, *torch.autograd.grad(y.square().sum(), trained))]


def test_entries_of_another_dtype_are_not_rounded_to_codes():
    model = _model()
    lq.nn.quantize_model(model, FORMAT, rank=2)
    lq.nn.make_shardable(model)
    state = model.state_dict()
    state["1.quantized.codes"] = state["1.quantized.codes"] + 0.4
    with pytest.raises(RuntimeError, match=r"1\.quantized\.codes must be torch\.uint8"):
        model.load_state_dict(state)


@pytest.fixture
def one_process():
    """Group of one process, in which ``fully_shard`` works as in several."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("convert", [lq.nn.train_scales, lq.nn.dequantize_model, lq.nn.requantize_model])
@pytest.mark.usefixtures("one_process")
def test_layers_that_are_shared_out_are_not_converted(convert):
    model = _model()
    lq.nn.quantize_model(model, FORMAT, rank=2)
    lq.nn.make_shardable(model)
    torch.distributed.fsdp.fully_shard(model)
    with pytest.raises(InvalidArgumentError, match=r"'1' .*shared out to several"):
        convert(model)
