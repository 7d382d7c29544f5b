"""LQLinear against a dense layer: values, gradients, memory, dtypes, state."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import lqlora as lq
from lqlora.checkpoint import StoredMatrix
from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch.nn.utils.parametrize import register_parametrization  # noqa: E402 - needs torch

from lqlora.nn import LQLinear  # noqa: E402 - needs torch

OUT, IN, RANK = 12, 20, 3
FORMATS = {
    "plain": lq.BlockFormat.parse("nf4/16:float32"),
    "half scales": lq.BlockFormat.parse("nf3/7:bfloat16"),
    "nested": lq.BlockFormat.parse("nf3/8:u8/16:float16"),
    "twice nested": lq.BlockFormat.parse("nf2/4:u4/4:u8/256:float32"),
}


def _layer(fmt=FORMATS["nested"], *, bias=True, rank=RANK, scaling=0.5) -> LQLinear:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(OUT, IN, generator=generator)
    d = lq.decompose(w, fmt, rank, scaling=scaling, max_iter=1)
    return LQLinear.from_decomposition(d, torch.randn(OUT, generator=generator) if bias else None)


def _dense_weight(layer: LQLinear):
    return layer.quantized.dequantize() + layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()


def _input(*shape, dtype=torch.float32):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=list(FORMATS))
def layer(request) -> LQLinear:
    return _layer(FORMATS[request.param])


class TestForward:
    @pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 0), (1, 2, 3)], ids=str)
    def test_it_is_the_dense_layer(self, layer, shape):
        x = _input(*shape)
        expected = torch.nn.functional.linear(x, _dense_weight(layer), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_it_is_the_function_on_arrays(self, layer):
        x = _input(4)
        parts = (layer.quantized.array, layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
        torch.testing.assert_close(layer(x), lq.matmul(x, *parts) + layer.bias)

    def test_without_bias(self):
        layer = _layer(bias=False)
        assert layer.bias is None
        torch.testing.assert_close(layer(_input(4)), _input(4) @ _dense_weight(layer).T, rtol=1e-5, atol=1e-5)

    def test_rank_zero_is_plain_quantization(self):
        layer = _layer(rank=0)
        assert layer.rank == 0
        expected = torch.nn.functional.linear(_input(4), layer.quantized.dequantize(), layer.bias)
        torch.testing.assert_close(layer(_input(4)), expected)

    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2), (torch.float64, 1e-5)])
    def test_other_dtypes_come_out_as_they_went_in(self, layer, dtype, rtol):
        x = _input(6, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        expected = torch.nn.functional.linear(x.float(), _dense_weight(layer), layer.bias)
        torch.testing.assert_close(y.float(), expected, rtol=rtol, atol=10 * rtol)

    def test_autocast_decides_the_dtype(self, layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(_input(6))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(_input(6)), rtol=5e-2, atol=0.5)

    def test_gradients_flow_under_autocast(self, layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(_input(6)).float().square().sum().backward()
        assert layer.lora_A.grad.dtype == torch.float32
        assert torch.isfinite(layer.lora_A.grad).all()
        assert layer.lora_A.grad.abs().sum() > 0

    def test_a_layer_made_from_numpy_arrays(self):
        w = np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)
        d = lq.decompose(w, FORMATS["nested"], RANK, max_iter=1)
        layer = LQLinear.from_decomposition(d)
        torch.testing.assert_close(_dense_weight(layer), torch.from_numpy(d.reconstruct()))

    @pytest.mark.parametrize("text", [*FORMATS, "zero points", "fitted"])
    def test_a_layer_made_from_tensors_is_where_they_are(self, text):
        others = {"zero points": "affine4/8:float32", "fitted": "nf3+fit/8:bfloat16"}
        fmt = FORMATS.get(text) or lq.BlockFormat.parse(others[text])
        q = lq.quantize(torch.ones(OUT, IN), fmt).to(torch, "meta")
        d = StoredMatrix(q, torch.ones(RANK, IN, device="meta"), torch.ones(OUT, RANK, device="meta"), 1.0)
        layer = LQLinear.from_decomposition(d)
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
        assert layer.quantized.device.type == layer.quantized.array.packed.device.type == "meta"

    def test_factors_that_do_not_fit_are_refused(self):
        d = lq.decompose(torch.ones(4, 6), FORMATS["plain"], 2)
        with pytest.raises(InvalidArgumentError, match=r"lora_B and lora_A .* shapes"):
            LQLinear(d.quantized, d.lora_A[:1], d.lora_B)


class TestBackward:
    def test_gradients_are_those_of_the_dense_layer(self, layer):
        x = _input(2, 5).requires_grad_()
        frozen = layer.quantized.dequantize()
        lora_A = layer.lora_A.detach().clone().requires_grad_()
        lora_B = layer.lora_B.detach().clone().requires_grad_()
        dense_x = x.detach().clone().requires_grad_()
        dense = torch.nn.functional.linear(dense_x, frozen + layer.scaling * lora_B @ lora_A, layer.bias)
        dense.sin().sum().backward()
        layer(x).sin().sum().backward()
        for found, expected in [(x, dense_x), (layer.lora_A, lora_A), (layer.lora_B, lora_B)]:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)

    def test_gradients_in_double_precision(self):
        layer = _layer().double()
        x = _input(3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(layer, (x,))

    def test_nothing_of_the_weights_size_is_saved_for_the_backward_pass(self, layer):
        saved = []

        def pack(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(_input(2).requires_grad_())
        assert saved
        assert max(tensor.numel() for tensor in saved) < OUT * IN
        assert max(tensor.untyped_storage().nbytes() for tensor in saved) < 4 * OUT * IN
        y.sum().backward()

    def test_only_the_factors_are_trained(self, layer):
        layer(_input(3)).sum().backward()
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        assert layer.bias.grad is None
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32

    def test_a_training_step_leaves_the_quantized_part_and_the_decomposition_alone(self):
        d = lq.decompose(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)), FORMATS["plain"], 2)
        before = {key: array.clone() for key, array in d.quantized.to_arrays().items()}, d.lora_A.clone()
        layer = LQLinear.from_decomposition(d)
        layer(torch.ones(1, 8)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
        assert not torch.equal(layer.lora_B.detach(), d.lora_B)
        assert torch.equal(d.lora_A, before[1])
        assert all(torch.equal(layer.quantized.array.to_arrays()[key], array) for key, array in before[0].items())


class TestDtypesAndCopies:
    @pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
    def test_casting_a_module_does_not_touch_what_is_stored(self, layer, cast):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        assert getattr(layer, cast)() is layer
        after = dict(layer.named_buffers())
        assert before.keys() == after.keys()
        for name, buffer in before.items():
            assert after[name].dtype == buffer.dtype, name
            assert torch.equal(after[name], buffer), name

    def test_to_a_dtype_inside_a_model_does_not_touch_the_scales(self, layer):
        model = torch.nn.Sequential(layer, torch.nn.ReLU()).to(torch.bfloat16)
        assert model[0].quantized.array.codes.dtype == torch.uint8
        assert model(_input(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert torch.equal(model[0].quantized.dequantize(), layer.quantized.dequantize())

    def test_a_copy_shares_nothing_and_computes_the_same(self, layer):
        other = copy.deepcopy(layer)
        assert torch.equal(other(_input(3)), layer(_input(3)))
        with torch.no_grad():
            other.lora_A.zero_()
            other.quantized.codes.zero_()
        assert layer.lora_A.abs().sum() > 0
        assert layer.quantized.codes.any()

    def test_the_printed_form_names_shape_and_format(self, layer):
        text = repr(layer)
        assert "in_features=20, out_features=12, rank=3" in text
        assert str(layer.quantized.format) in text


class TestState:
    @pytest.mark.parametrize("name", ["codes", "scales"])
    def test_what_is_parametrized_is_what_multiplies(self, name):
        class Zeros(torch.nn.Module):
            def forward(self, buffer):
                return torch.zeros_like(buffer)

        q = lq.quantize(torch.randn(8, 64), lq.BlockFormat(lq.NF4, 64))
        layer = LQLinear(q, torch.zeros(2, 64), torch.zeros(8, 2))
        register_parametrization(layer.quantized, name, Zeros(), unsafe=True)
        expected = lq.dequantize(layer.quantized.array) @ torch.ones(64)
        torch.testing.assert_close(layer(torch.ones(64)), expected)

    @pytest.mark.parametrize(
        ("name", "keys"),
        [
            ("plain", {"codes", "scales"}),
            ("nested", {"codes", "scales.codes", "scales.scales", "scales.offset"}),
            (
                "twice nested",
                {
                    "codes",
                    "scales.codes",
                    "scales.offset",
                    "scales.scales.codes",
                    "scales.scales.scales",
                    "scales.scales.offset",
                },
            ),
        ],
    )
    def test_names_are_those_of_a_checkpoint(self, name, keys):
        layer = _layer(FORMATS[name])
        assert set(layer.state_dict()) == {f"quantized.{key}" for key in keys} | {"lora_A", "lora_B", "bias"}
        assert {f"quantized.{key}" for key in layer.quantized.array.to_arrays()} == {f"quantized.{key}" for key in keys}

    def test_a_state_dict_restores_the_layer(self, layer):
        fmt = layer.quantized.format
        other = LQLinear.from_decomposition(
            lq.decompose(torch.ones(OUT, IN), fmt, RANK, scaling=0.5, max_iter=1), torch.zeros(OUT)
        )
        assert not torch.equal(other(_input(3)), layer(_input(3)))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(_input(3)), layer(_input(3)))

    def test_a_state_dict_of_another_format_is_refused(self):
        with pytest.raises(RuntimeError, match=r"quantized\.codes"):
            _layer(FORMATS["plain"]).load_state_dict(_layer(FORMATS["nested"]).state_dict())


class TestDropout:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scaling", [1.0, 0.5])
    def test_it_acts_on_the_low_rank_part_alone(self, dtype, scaling):
        layer, x = _layer(scaling=scaling), _input(2, 5, dtype=dtype).requires_grad_()
        layer.dropout = 0.4
        torch.manual_seed(3)
        found = layer(x)
        torch.manual_seed(3)
        dropped = torch.nn.functional.dropout(x, 0.4)
        frozen = torch.nn.functional.linear(x, layer.quantized.dequantize(dtype), layer.bias.to(dtype))
        expected = frozen + scaling * dropped @ layer.lora_A.to(dtype).T @ layer.lora_B.to(dtype).T
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.2}
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, **close)
        inputs = x, layer.lora_A, layer.lora_B
        for pair in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (found, expected)), strict=True):
            torch.testing.assert_close(*pair, **close)

    def test_evaluation_has_none(self):
        layer, x = _layer(), _input(4)
        expected = layer(x)
        layer.dropout = 0.5
        assert not torch.equal(layer(x), expected)
        assert torch.equal(layer.eval()(x), expected)
        assert "dropout=0.5" in repr(layer)

    def test_under_autocast_and_a_compiler(self):
        layer, x = _layer(), _input(4)
        layer.dropout = 0.5
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for call in (layer, compiled):
                torch.manual_seed(0)
                y = call(x)
                assert y.dtype == torch.bfloat16
                torch.manual_seed(0)
                torch.testing.assert_close(y, layer(x))

    def test_the_mean_is_that_without_dropout(self):
        layer, x = _layer(), _input(1)
        expected = layer(x)
        layer.dropout = 0.25
        mean = layer(x.expand(20_000, -1)).mean(0, keepdim=True)
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.05)

    @pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), "half", None])
    def test_other_values_are_refused(self, dropout):
        with pytest.raises(InvalidArgumentError, match="dropout"):
            LQLinear(
                lq.quantize(torch.ones(4, 8), FORMATS["plain"]), torch.ones(1, 8), torch.ones(4, 1), dropout=dropout
            )
