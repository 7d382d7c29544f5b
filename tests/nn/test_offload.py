"""Offloaded layers: the results of layers in memory to the bit, and little memory."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import lqlora as lq
from lqlora.errors import CheckpointError, InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch.utils.checkpoint import checkpoint  # noqa: E402 - needs torch

from lqlora.nn import load_model, offload_model, onload_model, save_model  # noqa: E402
from lqlora.nn import offload as module  # noqa: E402
from lqlora.nn.offload import OffloadedTensor, OffloadedWeight  # noqa: E402
from lqlora.nn.operator_arguments import from_operands  # noqa: E402
from tests.nn.offloading import FORMATS, WIDTH, assert_same, dense, make_model, results  # noqa: E402


def _offloaded(tmp_path, *args):
    model = make_model(*args)
    offload_model(model, tmp_path / "codes.safetensors")
    return model


def _twice(model):
    """Twice, since the second time weights were prefetched."""
    return [lambda: results(model), lambda: results(model)]


class TestResults:
    @pytest.mark.parametrize("fmt", FORMATS)
    @pytest.mark.parametrize("kind", ["factors", "scales", "both"])
    def test_outputs_and_gradients_are_those_of_layers_in_memory(self, tmp_path, fmt, kind):
        expected = results(make_model(fmt, kind))
        model = _offloaded(tmp_path, fmt, kind)
        for run in _twice(model):
            assert_same(run(), expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, tmp_path, reentrant):
        def gradients(model):
            x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
            y = x
            for layer in model:
                y = checkpoint(layer, y, use_reentrant=reentrant)
            y.square().sum().backward()
            return x.grad, *(p.grad for p in model.parameters() if p.requires_grad)

        assert_same(gradients(_offloaded(tmp_path)), gradients(make_model()))

    @pytest.mark.parametrize(
        "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
    )
    def test_contexts(self, tmp_path, context):
        x = torch.randn(5, WIDTH)
        with context():
            expected = make_model()(x)
            found = _offloaded(tmp_path)(x)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype

    def test_the_weight_as_a_tensor(self, tmp_path):
        layer, own = make_model()[0], _offloaded(tmp_path)[0]
        x = torch.randn(5, WIDTH)
        for call in (
            lambda m: torch.nn.functional.linear(x, m.weight, m.bias),
            lambda m: x @ m.weight,
            lambda m: m.weight[3:9].dequantize(),
            lambda m: m.weight.clone().dequantize(),
            lambda m: lq.dequantize(m.quantized.array),
            lambda m: lq.dequantize(m.weight.array),
            lambda m: lq.dequantize(from_operands(*m.quantized.operands)),
            lambda m: lq.matmul(x, m.weight.array),
            lambda m: pickle.loads(pickle.dumps(m.weight.detach())).dequantize(),
            lambda m: m.quantized.dequantize(torch.bfloat16),
            lq.nn.merged_weight,
        ):
            assert torch.equal(call(own), call(layer))
        assert own.weight.device == layer.weight.device

    def test_derivatives_of_second_order(self, tmp_path):
        def call(model):
            x = torch.ones(1, WIDTH, requires_grad=True)
            (first,) = torch.autograd.grad(torch.tanh(model(x)).sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)

        assert_same(call(_offloaded(tmp_path)), call(make_model()))

    @pytest.mark.slow
    def test_compiled_models(self, tmp_path):
        model = _offloaded(tmp_path)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for found, expected in zip(results(model, compiled), results(make_model()), strict=True):
            torch.testing.assert_close(found, expected)

    def test_threads(self, tmp_path):
        model, found = _offloaded(tmp_path), []
        expected = results(make_model())
        threads = [threading.Thread(target=lambda: found.extend(results(model) for _ in range(5))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 20
        for own in found:
            assert_same(own, expected)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_workers_of_a_data_loader(self, tmp_path):
        model = _offloaded(tmp_path).requires_grad_(False)
        rows = torch.randn(4, WIDTH)
        expected = model(rows)

        class Outputs(torch.utils.data.Dataset):
            def __len__(self):
                return len(rows)

            def __getitem__(self, index):
                return model(rows[index])

        loader = torch.utils.data.DataLoader(Outputs(), batch_size=4, num_workers=1, multiprocessing_context="fork")
        torch.testing.assert_close(next(iter(loader)), expected)


class TestMemory:
    def test_autograd_keeps_no_copy(self, tmp_path):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda own: saved.append(own) or own, lambda own: own):
            results(_offloaded(tmp_path))
        codes = [own for own in saved if own.dtype == torch.uint8]
        assert codes
        assert all(isinstance(own, OffloadedTensor) for own in codes)

    def test_buffers_are_pages_of_the_file(self, tmp_path):
        model = _offloaded(tmp_path)
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("needs /proc")
        lines = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(tmp_path) in line]
        ranges = [range(int(first, 16), int(last, 16)) for first, last in lines]
        assert all(any(own.data_ptr() in pages for pages in ranges) for own in model.buffers())

    def test_the_next_weight_is_prefetched_in_both_directions(self, tmp_path, monkeypatch):
        model = _offloaded(tmp_path)
        names = {
            own.data_ptr(): int(name[0]) for name, own in model.named_buffers() if name.endswith("quantized.codes")
        }
        events = []
        fetch = module.Prefetcher.fetch

        def recorded(self, wanted):
            events.append(f"fetch {names[wanted.hosts[0].data_ptr()]}")
            return fetch(self, wanted)

        def read_ahead(own):
            if own.data_ptr() in names:
                events.append(f"read {names[own.data_ptr()]}")

        monkeypatch.setattr(module.Prefetcher, "fetch", recorded)
        monkeypatch.setattr(module, "_read_ahead", read_ahead)
        for _ in range(3):
            del events[:]
            results(model)
        # Each weight is read ahead when the one before it is fetched. The last one forward is the first one backward.
        forward = ["fetch 0", "read 1", "fetch 1", "read 2", "fetch 2", "read 3", "fetch 3"]
        backward = ["fetch 3", "read 2", "fetch 2", "read 1", "fetch 1", "read 0", "fetch 0"]
        assert events == forward + backward

    def test_reading_ahead_changes_nothing(self, tmp_path):
        model = _offloaded(tmp_path)
        before = [own.clone() for own in model.buffers()]
        for own in [*model.buffers(), torch.ones(3), torch.empty(0)]:
            module._read_ahead(own)
        assert_same([*model.buffers()], before)

    def test_the_order_of_many_experts_takes_bounded_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_PAIRS", 5)
        model = _offloaded(tmp_path)
        for order in [0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 3, 1]:
            for index in order:
                model[index](torch.ones(1, WIDTH))
        assert len(model[0].quantized.prefetcher._next) <= 5

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
    def test_a_model_of_hundreds_of_megabytes(self, tmp_path):
        code = Path(__file__).with_name("large_offload.py")
        subprocess.run([sys.executable, str(code), str(tmp_path)], check=True, timeout=300)
        numbers = json.loads((tmp_path / "memory.json").read_text())
        assert numbers["codes"] > 250
        # Anonymous memory: what the kernel cannot drop. A layer or two are copied while they are loaded.
        for name in ("loaded", "trained"):
            assert numbers[name] < numbers["codes"] / 2
        assert numbers["onloaded"] > numbers["codes"]
        # The dense model would take 2 GB. A skeleton takes the codes and factors of the file, once.
        assert numbers["codes"] * 0.9 < numbers["from meta"] < numbers["codes"] * 1.2


class TestFiles:
    def test_a_new_file_holds_codes_and_scales_alone(self, tmp_path):
        model = make_model()
        assert offload_model(model, tmp_path / "codes", include="1", exclude="0") == ["1"]
        content = lq.verify(tmp_path / "codes")
        assert list(content.matrices) == ["1"]
        assert content.matrices["1"].lora_A.shape[0] == 0
        assert not content.tensors
        kinds = [isinstance(layer.quantized, OffloadedWeight) for layer in model]
        assert kinds == [False, True, False, False]

    def test_a_file_of_the_model_is_used_as_it_is(self, tmp_path):
        model = make_model()
        save_model(tmp_path / "model", model)
        before, expected = (tmp_path / "model").read_bytes(), results(model)
        offload_model(model, tmp_path / "model")
        offload_model(model, tmp_path / "model")
        assert_same(results(model), expected)
        assert (tmp_path / "model").read_bytes() == before
        save_model(tmp_path / "model", model)  # replaces the file whose pages are in use
        assert (tmp_path / "model").read_bytes() == before
        assert_same(results(model), expected)

    @pytest.mark.parametrize("change", ["scales", "codes", "names", "no checkpoint"])
    def test_a_file_of_another_model_is_refused_and_kept(self, tmp_path, change):
        model, path = make_model(), tmp_path / "model"
        if change == "scales":
            model[1].quantized.scales.scales.mul_(2)
        elif change == "codes":
            model[1].quantized.codes.bitwise_not_()
        elif change == "names":
            model = torch.nn.Sequential(*list(model)[:1])
        save_model(path, model)
        if change == "no checkpoint":
            path.write_bytes(b"something else")
        before = path.read_bytes()
        error = CheckpointError if change == "no checkpoint" else InvalidArgumentError
        with pytest.raises(error, match=str(path)):
            offload_model(own := make_model(), path)
        assert path.read_bytes() == before
        assert_same(results(own), results(make_model()))

    def test_a_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(CheckpointError, match="none"):
            offload_model(make_model(), tmp_path / "none" / "codes")

    def test_host_memory_is_for_layers_on_a_device(self):
        with pytest.raises(InvalidArgumentError, match=r"^path must be given .*'0'"):
            offload_model(make_model())

    def test_layers_on_the_meta_device(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match="meta"):
            offload_model(make_model().to("meta"), tmp_path / "codes")
        assert not list(tmp_path.iterdir())

    def test_patterns_that_select_nothing(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match="include"):
            offload_model(make_model(), tmp_path / "codes", include="q_proj")

    @pytest.mark.parametrize("kind", ["factors", "both"])
    def test_a_file_is_loaded_without_being_read(self, tmp_path, kind):
        model = make_model(kind=kind)
        expected = results(model)
        save_model(tmp_path / "model", model)
        fresh = dense()
        content = load_model(tmp_path / "model", fresh, offload=["0", "2"])
        assert [isinstance(layer.quantized, OffloadedWeight) for layer in fresh] == [True, False, True, False]
        assert_same(results(fresh)[:2], expected[:2])
        assert set(content.matrices) == {"0", "1", "2", "3"}

    @pytest.mark.parametrize("offload", ["no_such", (), 5])
    def test_patterns_of_a_file_that_select_nothing(self, tmp_path, offload):
        save_model(tmp_path / "model", make_model())
        with pytest.raises(InvalidArgumentError, match=r"^offload must"):
            load_model(tmp_path / "model", dense(), offload=offload)

    def test_tables_of_embeddings_are_not_offloaded(self, tmp_path):
        def build():
            return torch.nn.Sequential(torch.nn.Embedding(8, WIDTH), torch.nn.Linear(WIDTH, 8))

        model, fmt = build(), lq.BlockFormat.parse(FORMATS[0])
        lq.nn.quantize_model(model, fmt, rank=1, embeddings=fmt)
        save_model(tmp_path / "model", model)
        fresh = build()
        load_model(tmp_path / "model", fresh, offload="*")
        assert isinstance(fresh[1].quantized, OffloadedWeight)
        assert not isinstance(fresh[0].quantized, OffloadedWeight)
        for patterns in ("0", ["1", "0"], ["*", "0"]):
            with pytest.raises(InvalidArgumentError, match=r"^offload must .*'0'.*embedding"):
                load_model(tmp_path / "model", build(), offload=patterns)
            with pytest.raises(InvalidArgumentError, match=r"^include must .*'0'.*embedding"):
                lq.nn.offload_model(model, tmp_path / "codes", include=patterns)
        assert not (tmp_path / "codes").exists()
        assert lq.nn.offload_model(model, tmp_path / "codes", include=re.compile(".")) == ["1"]


class TestModules:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
    def test_copies_have_memory_of_their_own(self, tmp_path, copied):
        model, expected = _offloaded(tmp_path), results(make_model())
        results(model)
        other = copied(model)
        other[0].quantized.codes.bitwise_not_()
        assert_same(results(model), expected)
        other[0].quantized.codes.bitwise_not_()
        assert_same(results(other), expected)
        assert other[0].quantized.prefetcher is other[1].quantized.prefetcher
        assert other[0].quantized.prefetcher is not model[0].quantized.prefetcher

    def test_states_are_those_of_layers_in_memory(self, tmp_path):
        model, other = _offloaded(tmp_path), make_model()
        state, expected = model.state_dict(), other.state_dict()
        assert list(state) == list(expected)
        assert all(type(own) is torch.Tensor and torch.equal(own, expected[name]) for name, own in state.items())
        save_model(tmp_path / "first", model)
        save_model(tmp_path / "second", other)
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_that_is_equal_leaves_the_pages(self, tmp_path, assign):
        model = _offloaded(tmp_path)
        before = [own.quantized.codes.data_ptr() for own in model]
        model.load_state_dict(make_model().state_dict(), assign=assign)
        assert [own.quantized.codes.data_ptr() for own in model] == before
        assert_same(results(model), results(make_model()))

    @pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
    def test_a_state_that_is_equal_dirties_no_page(self, tmp_path):
        model = _offloaded(tmp_path)
        model.load_state_dict(make_model().state_dict())
        text = Path("/proc/self/smaps").read_text()
        _, *parts = text.split(str(tmp_path))
        assert parts
        assert all(part.split("Private_Dirty:")[1].split()[0] == "0" for part in parts)

    @pytest.mark.parametrize("part", ["codes", "scales.scales"])
    def test_a_state_that_is_loaded_before_the_backward_pass_is_an_error(self, tmp_path, part):
        model = _offloaded(tmp_path)
        name = f"1.quantized.{part}"
        x = torch.ones(1, WIDTH, requires_grad=True)
        y = model(x).sum()
        model.load_state_dict({name: model.state_dict()[name] + 1}, strict=False)
        with pytest.raises(InvalidArgumentError, match="since the forward pass"):
            y.backward()
        model(x).sum().backward()

    def test_another_state_is_loaded_and_does_not_reach_the_file(self, tmp_path):
        model, other = _offloaded(tmp_path), make_model()
        before = (tmp_path / "codes.safetensors").read_bytes()
        for layer in other:
            layer.quantized.codes.bitwise_not_()
        model.load_state_dict(other.state_dict())
        assert_same(results(model), results(other))
        assert (tmp_path / "codes.safetensors").read_bytes() == before

    def test_casts_change_no_scale(self, tmp_path):
        model, other = _offloaded(tmp_path).to(torch.bfloat16), make_model().to(torch.bfloat16)
        x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
        assert torch.equal(model(x), other(x))
        assert model[0].weight.dtype == torch.bfloat16
        assert model.to("cpu")[0].quantized.device.type == "cpu"

    def test_other_conversions(self, tmp_path):
        for convert in (lq.nn.dequantize_model, lq.nn.train_scales):
            model, other = _offloaded(tmp_path), make_model()
            convert(model)
            convert(other)
            assert_same(results(model), results(other))

    def test_onload_brings_everything_back(self, tmp_path):
        for kind in ("factors", "scales"):
            model = make_model(kind=kind)
            offload_model(model, tmp_path / kind)
            onload_model(model)
            (tmp_path / kind).write_bytes(b"")
            expected = make_model(kind=kind)
            assert [type(own) for own in model.modules()] == [type(own) for own in expected.modules()]
            assert repr(model) == repr(expected)
            assert_same(results(model), results(expected))
            onload_model(model)

    def test_a_part_of_a_model_is_brought_back(self, tmp_path):
        model, expected = _offloaded(tmp_path), results(make_model())
        for run in _twice(model):
            assert_same(run(), expected)
        onload_model(model[2])
        onload_model(model[:1])
        assert [isinstance(layer.quantized, OffloadedWeight) for layer in model] == [False, True, False, True]
        for run in _twice(model):
            assert_same(run(), expected)

    def test_what_would_change_a_copy_is_refused(self, tmp_path):
        layer = _offloaded(tmp_path)[0]
        tensor = layer.quantized.operands.tensors[0]
        for change in (
            tensor.zero_,
            tensor.detach().zero_,
            lambda: torch._foreach_add_([tensor], 1),
            lambda: torch.add(torch.ones_like(tensor), 1, out=tensor),
            lambda: torch.aminmax(tensor.clone(), out=(tensor, tensor)),
        ):
            with pytest.raises(InvalidArgumentError, match="onload_model"):
                change()
        assert "OffloadedTensor" in repr(tensor)

    def test_what_is_derived_from_a_copy_shares_no_memory(self, tmp_path):
        layer = _offloaded(tmp_path)[0]
        tensor, before = layer.quantized.operands.tensors[0], layer.quantized.codes.clone()
        for derived in (tensor.view(-1), tensor.expand(2, -1)[0], *tensor.split(8)):
            derived.zero_()
        assert torch.equal(layer.quantized.codes, before)
        assert torch.equal(tensor.view(4, -1), before.view(4, -1))
        assert torch.equal(torch.add(tensor, 1, out=torch.empty_like(before)), before + 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_torch")
class TestDevices:
    @pytest.mark.parametrize("kind", ["factors", "scales", "both"])
    @pytest.mark.parametrize("to_file", [False, True])
    def test_outputs_and_gradients_are_those_of_layers_on_the_device(self, tmp_path, kind, to_file):
        model, other = make_model(kind=kind).to("cuda"), make_model(kind=kind).to("cuda")
        assert offload_model(model, tmp_path / "codes" if to_file else None) == ["0", "1", "2", "3"]
        assert all(own.device.type == "cpu" and own.is_pinned() != to_file for own in model.buffers())
        assert all(own.is_cuda for own in model.parameters())
        x = torch.randn(5, WIDTH, device="cuda")
        for _ in range(3):
            both = []
            for own in (model, other):
                rows = x.clone().requires_grad_()
                y = own(rows)
                trained = [p for p in own.parameters() if p.requires_grad]
                both.append([y, *torch.autograd.grad(y.square().sum(), [rows, *trained])])
            assert_same(*both)
        assert torch.equal(lq.nn.merged_weight(model[0]), lq.nn.merged_weight(other[0]))
        assert_same([*model.to("cpu").state_dict().values()], [*other.to("cpu").state_dict().values()])

    def test_codes_are_not_on_the_device_between_the_passes(self):
        model = torch.nn.Sequential(*[_large_layer() for _ in range(8)]).to("cuda")
        total = sum(own.nbytes for own in model.buffers())
        before = torch.cuda.memory_allocated()
        offload_model(model)
        for _ in range(2):
            y = model(torch.ones(1, 1024, device="cuda", requires_grad=True))
            torch.cuda.synchronize()
            # At most the weight that was prefetched is there.
            assert torch.cuda.memory_allocated() < before - total + total / 4
            y.sum().backward()
        onload_model(model)
        assert all(own.is_cuda for own in model.buffers())

    def test_host_memory_that_is_overwritten(self):
        model, other = make_model().to("cuda"), make_model()
        offload_model(model)
        x = torch.ones(3, WIDTH, device="cuda")
        model(x)
        model(x)
        for layer in other:
            layer.quantized.codes.bitwise_not_()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other.to("cuda")(x))


def _large_layer():
    w = torch.randn(1024, 1024)
    return lq.nn.LQLinear(
        lq.quantize(w, lq.BlockFormat.parse("nf4/64:float32")), torch.zeros(1, 1024), torch.zeros(1024, 1)
    )
