"""PEQA: trainable scales beside frozen codes, their gradients, conversion, task sets, and files of scales."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError, NonFiniteError, UnsupportedArrayError
from lqlora.testing.strategies import ALL_CODEBOOKS, formats
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.nn.utils.parametrize import register_parametrization  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from lqlora.nn import (  # noqa: E402
    Factors,
    LQLinear,
    PEQALinear,
    Scales,
    combine_scales,
    dequantize_model,
    freeze_scales,
    load_factors,
    load_model,
    load_scales,
    peqa_model,
    quantize_model,
    requantize_model,
    save_factors,
    save_model,
    save_scales,
    scales,
    set_scales,
    train_scales,
    using_scales,
)
from lqlora.nn.peqa import operators  # noqa: E402

CHANNEL = lq.BlockFormat.parse("affine4/1000000@-1:float32")
NF3 = lq.BlockFormat.parse("nf3/8:u8/16:bfloat16")
X = torch.linspace(-1, 1, 24).view(3, 8)


@st.composite
def _arrays(draw):
    """Draw quantized matrices in all formats, with ragged lines, blocks that span rows, and fitted levels."""
    fmt = draw(formats(axes=(None, -1, 0), fitted=draw(st.booleans()), rotated=True))
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    return lq.quantize(w, fmt, fit="absmax" if fmt.levels == "codebook" else "levels+scale")


def _dense_parts(layer: PEQALinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unit weight of each entry, and the block that it belongs to, both decoded by the library itself."""
    own = dataclasses.replace(layer.quantized.array, format=layer.quantized.format.unrotated)
    ones = dataclasses.replace(own, scales=torch.ones_like(own.scales))
    # Zero points and codes do not matter for the number of a block, so a format of one level tells it.
    number = lq.BlockFormat(lq.Codebook([0, 1], "own"), own.format.block_size, "float32", own.format.axis)
    count = torch.arange(len(own.scales), dtype=torch.float32)
    codes = torch.full(((own.shape[0] * own.shape[1] + 7) // 8,), 255, dtype=torch.uint8)
    blocks = lq.dequantize(lq.quantized.QuantizedArray(codes, count, number, own.shape))
    return lq.dequantize(ones).double(), blocks.long()


def _scale_gradient(layer, x, grad):
    units, blocks = _dense_parts(layer)
    of_weight = grad.double().reshape(-1, grad.shape[-1]).T @ x.detach().double().reshape(-1, x.shape[-1])
    rotation = layer.quantized.format.rotation
    for axis, seed in ({} if rotation is None else rotation.seeds).items():
        of_weight = lq.ops.rotate(of_weight, seed, axis=axis)
    found = torch.zeros(len(layer.quantized.scales), dtype=torch.float64)
    return found.index_add_(0, blocks.reshape(-1), (of_weight * units).reshape(-1))


@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
class TestExactness:
    @given(q=_arrays())
    def test_a_layer_computes_what_its_quantized_array_decodes_to(self, q):
        layer = PEQALinear(q)
        assert torch.equal(layer.quantized.dequantize(), torch.from_numpy(lq.dequantize(q)))
        assert (layer.quantized.format.scales, layer.quantized.scales.dtype) == ("float32", torch.float32)
        x = torch.linspace(-1, 1, 2 * q.shape[1]).view(2, -1)
        frozen = LQLinear(layer.quantized.array, torch.zeros(0, q.shape[1]), torch.zeros(q.shape[0], 0))
        assert torch.equal(layer(x), frozen(x))

    @given(q=_arrays(), data=st.data(), chunk=st.sampled_from([1, 64, 2**20]))
    def test_gradients_are_those_of_the_dense_weight(self, q, data, chunk):
        """The gradient of a scale is the sum over its block of the gradient of the weight times the unit weight."""
        layer = PEQALinear(q)
        dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
        generator = torch.Generator().manual_seed(0)
        lead = data.draw(st.sampled_from([(), (3,), (2, 2), (0,)]))
        x = torch.randn(*lead, q.shape[1], generator=generator).to(dtype).requires_grad_()
        grad = torch.randn(*lead, q.shape[0], generator=generator).to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "_CHUNK_ON_HOST", chunk)
            layer(x).backward(grad)
        expected = _scale_gradient(layer, x, grad)
        tolerance = 1e-5 * float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(layer.quantized.scales.grad.double(), expected, rtol=1e-5, atol=tolerance)
        dense = layer.quantized.dequantize().to(dtype)
        torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-5, atol=1e-5 * (1 + float(dense.abs().max())))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch's forward mode
    @pytest.mark.parametrize("text", ["nf3/5", "affine3/4@-1", "affine2/3@0", "nf3+fit2/3@-1", "int4/1000@-1"])
    @pytest.mark.parametrize("adjoint", [False, True])
    def test_derivatives_agree_with_differences(self, text, adjoint):
        """First derivatives in both modes, and second ones, in float64."""
        fit = "levels+scale" if "fit" in text else "scale"
        w = torch.linspace(-1, 2, 15).view(3, 5).sin()
        own = PEQALinear(lq.quantize(w, lq.BlockFormat.parse(text), fit=fit)).quantized.scaled_operands
        first = own[0].detach().double().requires_grad_()
        x = torch.linspace(-1, 1, 6 if adjoint else 10, dtype=torch.float64).view(2, -1).requires_grad_()

        def product(x, s):
            return torch.ops.lqlora.scaled_matmul(x, s, *own[1:], adjoint=adjoint)

        assert torch.autograd.gradcheck(product, (x, first), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(product, (x, first))

    @pytest.mark.slow
    def test_operators_pass_the_checks_of_torch(self):
        q = lq.quantize(torch.linspace(-1, 1, 15).view(3, 5), lq.BlockFormat.parse("affine3/4@-1"))
        own = PEQALinear(q).quantized.scaled_operands
        x, rows = torch.ones(2, 5, requires_grad=True), torch.ones(2, 3, requires_grad=True)
        torch.library.opcheck(torch.ops.lqlora.scaled_matmul.default, (x, *own), rtol=1e-5, atol=1e-5)
        torch.library.opcheck(torch.ops.lqlora.scale_gradient.default, (rows, x, *own[1:]), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_and_autocast(self, dtype):
        q = lq.quantize(torch.linspace(-1, 2, 64).view(8, 8).sin(), lq.BlockFormat.parse("nf4/4"))
        layer, exact = PEQALinear(q), PEQALinear(q)
        exact(X).square().sum().backward()
        layer(X.to(dtype)).square().sum().backward()
        grad = layer.quantized.scales.grad
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, exact.quantized.scales.grad, rtol=0.05, atol=0.05)
        if dtype == torch.bfloat16:
            again = PEQALinear(q)
            with torch.autocast("cpu", dtype):
                y = again(X)
                assert y.dtype == dtype
                y.square().sum().backward()
            torch.testing.assert_close(again.quantized.scales.grad, grad)

    def test_gradients_of_half_precision_are_summed_in_float32(self):
        """A sum in bfloat16 would end at 256."""
        layer = PEQALinear(lq.quantize(torch.ones(1, 1), lq.BlockFormat.parse("nf4/1")))
        layer(torch.ones(1000, 1, dtype=torch.bfloat16)).sum().backward()
        assert float(layer.quantized.scales.grad) == 1000

    def test_no_dense_weight_is_kept_for_the_backward_pass(self):
        layer = PEQALinear(lq.quantize(torch.randn(64, 32), lq.BlockFormat.parse("nf4/16")))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            layer(torch.ones(2, 32, requires_grad=True))
        assert max(kept) == 64 * 32 // 2

    @pytest.mark.parametrize("book", [book for book in ALL_CODEBOOKS if 0 in book.levels], ids=lambda book: book.name)
    def test_blocks_of_zeros_stay_zero(self, book):
        w = torch.ones(2, 8)
        w[0] = 0
        layer = PEQALinear(lq.quantize(w, lq.BlockFormat(book, 8)))
        optimizer = torch.optim.AdamW([layer.quantized.scales], lr=0.1)
        for _ in range(3):
            layer(X).square().sum().backward()
            optimizer.step()
        assert not layer.quantized.dequantize()[0].any()

    def test_negative_scales_negate_their_blocks(self):
        layer = PEQALinear(lq.quantize(torch.randn(4, 8), lq.BlockFormat.parse("nf4/8")))
        before = layer(X)
        with torch.no_grad():
            layer.quantized.scales.neg_()
        assert torch.equal(layer(X), -before)


class TestLayer:
    def test_low_rank_factors_are_added(self):
        d = lq.decompose(np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32), NF3, rank=2, scaling=0.5)
        layer = PEQALinear.from_decomposition(d, torch.ones(6))
        expected = LQLinear.from_decomposition(d, torch.ones(6))(X)
        assert torch.equal(layer(X), expected)
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["quantized.scales"]
        both = PEQALinear(d.quantized, d.lora_A, d.lora_B, 0.5, train_factors=True)
        both(X).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in (both.quantized.scales, both.lora_A, both.lora_B))

    @pytest.mark.parametrize("rank", [0, 2])
    def test_models_that_read_the_weight_train_the_scales(self, rank):
        w = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
        layer = PEQALinear.from_decomposition(lq.decompose(w, NF3, rank=rank))
        units, blocks = _dense_parts(layer)
        for product in (
            lambda weight: nn.functional.linear(X, weight),
            lambda weight: X @ weight,
            lambda weight: weight @ X.T,
            lambda weight: torch.cat([X @ part.T for part in weight.chunk(2)], -1),
        ):
            layer.quantized.scales.grad = None
            y = product(layer.weight)
            y.square().sum().backward()
            scales = layer.quantized.scales.detach().clone().requires_grad_()
            dense = units.float() * scales[blocks] + layer.lora_B.detach() @ layer.lora_A.detach()
            expected = product(dense)
            torch.testing.assert_close(y, expected)
            expected.square().sum().backward()
            torch.testing.assert_close(layer.quantized.scales.grad, scales.grad)
        with pytest.raises(InvalidArgumentError, match="weight must not be made dense"):
            layer.weight.dequantize()
        with torch.no_grad():
            torch.testing.assert_close(layer.weight.dequantize(), dense.detach())

    def test_dropout_acts_on_the_low_rank_part_in_training(self):
        d = lq.decompose(np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32), NF3, rank=2)
        layer = PEQALinear.from_decomposition(d, dropout=0.5)
        torch.manual_seed(0)
        assert not torch.equal(layer(X), layer.eval()(X))
        assert torch.equal(layer(X), layer(X))

    def test_copies_dtypes_and_state(self):
        layer = PEQALinear(lq.quantize(torch.randn(4, 8), NF3))
        with torch.no_grad():
            layer.quantized.scales.mul_(1.1)
        y = layer(X)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half()):
            assert torch.equal(other(X), y)
            assert other.quantized.scales.dtype == torch.float32
            assert other.quantized.scales.requires_grad
        fresh = PEQALinear(lq.quantize(torch.randn(4, 8), NF3))
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(X), y)
        assert layer.state_dict().keys() == {"lora_A", "lora_B", "quantized.codes", "quantized.scales"}

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        layer = PEQALinear(lq.quantize(torch.randn(4, 8), NF3))
        layer(X).square().sum().backward()
        expected, layer.quantized.scales.grad = layer.quantized.scales.grad, None
        checkpoint(layer, X.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(layer.quantized.scales.grad, expected)

    def test_a_changed_scale_between_the_passes_is_an_error_of_autograd(self):
        layer = PEQALinear(lq.quantize(torch.randn(4, 8), NF3))
        y = layer(X.clone().requires_grad_()).sum()
        with torch.no_grad():
            layer.quantized.scales.mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.backward()

    def test_compiled_in_training(self):
        layer = PEQALinear(lq.quantize(torch.randn(4, 8), NF3))
        layer(X).square().sum().backward()
        expected, layer.quantized.scales.grad = layer.quantized.scales.grad, None
        torch.compile(layer, backend="aot_eager", fullgraph=True)(X).square().sum().backward()
        torch.testing.assert_close(layer.quantized.scales.grad, expected)

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda _: PEQALinear(np.ones((2, 2))), "quantized must be a QuantizedArray"),
            (
                lambda _: PEQALinear(lq.quantize(np.ones((2, 2, 2)), NF3, batch_dims=1)),
                r"quantized must be a matrix.*\(2, 2, 2\)",
            ),
            (lambda _: PEQALinear(lq.quantize(np.ones(4), NF3)), r"quantized must be a matrix.*\(4,\)"),
            (lambda q: PEQALinear(q, lora_A=np.ones((1, 8))), "lora_B must be given"),
            (lambda q: PEQALinear(q, np.ones((1, 7)), np.ones((4, 1))), "lora_B and lora_A must have shapes"),
        ],
        ids=["type", "stack", "vector", "one", "shapes"],
    )
    def test_wrong_arguments(self, make, says):
        with pytest.raises(InvalidArgumentError, match=says):
            make(lq.quantize(np.ones((4, 8), dtype=np.float32), NF3))

    @pytest.mark.parametrize(
        ("change", "error", "says"),
        [
            (lambda a: {**a, "x": X[:, :7]}, InvalidArgumentError, r"x must have.*\(3, 7\)"),
            (lambda a: {**a, "x": X.long()}, UnsupportedArrayError, "x must be float16"),
            (lambda a: {**a, "scales": a["scales"].half()}, UnsupportedArrayError, "scales must be float32"),
            (lambda a: {**a, "scales": a["scales"][1:]}, FormatError, "'scales'"),
            (lambda a: {**a, "scales": a["scales"][1:].double()}, InvalidArgumentError, "scales must have shape"),
            (lambda a: {**a, "frozen": []}, FormatError, "weight must be"),
            (lambda a: {**a, "shape": (4, 8, 1)}, InvalidArgumentError, "matrix"),
        ],
        ids=["columns", "dtype", "half", "short", "short64", "missing", "shape"],
    )
    def test_wrong_arguments_of_the_operators(self, change, error, says):
        names = "scales", "frozen", "fmt", "shape", "codebook"
        own = PEQALinear(lq.quantize(torch.ones(4, 8), NF3)).quantized.scaled_operands
        arguments = change({"x": X, **dict(zip(names, own, strict=True))})
        with pytest.raises(error, match=says):
            torch.ops.lqlora.scaled_matmul(**arguments)

    @pytest.mark.parametrize(
        "rows", [torch.ones(2, 4), torch.ones(3, 5), torch.ones(())], ids=["count", "length", "none"]
    )
    def test_rows_of_a_gradient_that_do_not_fit(self, rows):
        own = PEQALinear(lq.quantize(torch.ones(4, 8), NF3)).quantized.scaled_operands
        with pytest.raises(InvalidArgumentError, match="rows and x must have shapes"):
            torch.ops.lqlora.scale_gradient(rows, X, *own[1:])


def _plain(seed: int = 0, width: int = 12) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4, bias=False))


def _model(seed: int = 0, fmt=CHANNEL, width: int = 12) -> nn.Sequential:
    model = _plain(seed, width)
    peqa_model(model, fmt)
    return model


def _both(seed: int = 0, *, train_factors: bool = True) -> nn.Sequential:
    """Return a model with low-rank factors that train with the scales, or are frozen."""
    model = _plain(seed)
    quantize_model(model, NF3, rank=2)
    train_scales(model, train_factors=train_factors)
    return model


def _trained(model: nn.Module, target: float = 1.0, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - target).square().mean().backward()
        optimizer.step()
    return model


def _state(model) -> dict:
    return {name: (t.tolist(), t.dtype, t.requires_grad, id(t)) for name, t in model.state_dict(keep_vars=True).items()}


class TestConversion:
    def test_only_scales_train_and_the_report_counts_them(self):
        model = _plain()
        report = peqa_model(model, lq.BlockFormat.parse("affine4/4@-1:u8/8:float32"))
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {"0.quantized.scales": 24, "2.quantized.scales": 12}
        assert report.trainable == 36
        assert {str(own.format) for own in report.layers.values()} == {"affine4/4@-1:float32"}
        for name in ("0", "2"):
            assert report.layers[name].nbytes == model[int(name)].quantized.array.nbytes

    @pytest.mark.parametrize("fmt", [CHANNEL, NF3, lq.BlockFormat.parse("nf2/4@0:float16")], ids=str)
    def test_training_lowers_the_loss_and_leaves_the_codes(self, fmt):
        model = _model(fmt=fmt)
        codes = {name: t.clone() for name, t in model.state_dict().items() if t.dtype == torch.uint8}
        before = float((model(X) - 1).square().mean().detach())
        _trained(model, steps=20)
        assert float((model(X) - 1).square().mean().detach()) < 0.98 * before
        assert all(torch.equal(model.state_dict()[name], own) for name, own in codes.items())

    def test_first_scales_have_the_least_error_of_the_fit(self):
        model, plain = _model(), _plain()
        q = lq.quantize(plain[0].weight.detach().numpy(), CHANNEL, fit="scale")
        assert torch.equal(model[0].quantized.dequantize(), torch.from_numpy(lq.dequantize(q)))

    @pytest.mark.parametrize("train_factors", [False, True])
    def test_scales_of_a_quantized_model_train_and_freeze_again(self, train_factors):
        model = _plain()
        quantize_model(model, NF3, rank=2)
        calls = []
        handle = model[0].register_forward_hook(lambda *_: calls.append(1))
        model[0].note, model[2].training = "mine", False
        before, inner, bias = model(X), model[0].lora_A, model[0].bias
        assert train_scales(model, train_factors=train_factors) == ["0", "2"]
        assert torch.equal(model(X), before)
        assert (model[0].lora_A is inner, model[0].bias is bias, inner.requires_grad) == (True, True, train_factors)
        assert (model[0].note, model[0].training, model[2].training, len(calls)) == ("mine", True, False, 2)
        after = _trained(model)(X)
        assert not torch.equal(after, before)
        freeze_scales(model)
        assert [type(layer) for layer in model] == [LQLinear, nn.ReLU, LQLinear]
        assert torch.equal(model(X), after)
        assert not any("scales" in name for name, _ in model.named_parameters())
        assert not hasattr(model[0], "train_factors")
        handle.remove()
        train_scales(model)
        assert torch.equal(model(X), after)

    def test_layers_show_the_dtype_of_those_that_they_replace(self):
        model = _plain().to(torch.bfloat16)
        peqa_model(model, CHANNEL)
        assert (model[0].weight.dtype, model[0].quantized.scales.dtype) == (torch.bfloat16, torch.float32)
        assert model(X.bfloat16()).dtype == torch.bfloat16
        freeze_scales(model)
        assert model[0].weight.dtype == torch.bfloat16

    def test_patterns_select_layers(self):
        model = _plain()
        quantize_model(model, NF3, rank=2)
        assert train_scales(model, exclude="2") == ["0"]
        assert [type(layer) for layer in model] == [PEQALinear, nn.ReLU, LQLinear]
        with pytest.raises(InvalidArgumentError, match="include"):
            train_scales(model, "up")

    def test_layers_that_were_quantized_before_are_left(self):
        model = _plain()
        quantize_model(model, NF3, rank=2, include="0")
        report = peqa_model(model, CHANNEL)
        assert list(report.layers) == ["2"]
        assert [type(layer) for layer in model] == [LQLinear, nn.ReLU, PEQALinear]
        assert model[0].lora_A.requires_grad

    def test_a_second_conversion_keeps_scales_trainable(self):
        model = _plain()
        peqa_model(model, CHANNEL, include="0")
        quantize_model(model, NF3, rank=1)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {"0.quantized.scales", "2.lora_A", "2.lora_B"}

    def test_dense_layers_again(self):
        model = _trained(_both())
        y = model(X)
        requantized = copy.deepcopy(model)
        dequantize_model(model)
        torch.testing.assert_close(model(X), y)
        assert vars(model[0]).keys() == vars(nn.Linear(1, 1)).keys()
        requantize_model(requantized)
        assert [type(layer) for layer in requantized] == [LQLinear, nn.ReLU, LQLinear]

    def test_negative_scales_are_not_frozen(self, tmp_path):
        model = _model()
        with torch.no_grad():
            model[2].quantized.scales[:2] = -0.5
        before = _state(model)
        with pytest.raises(InvalidArgumentError, match=r"'2' has 2 of 4, the least -0.5"):
            freeze_scales(model)
        with pytest.raises(InvalidArgumentError, match=r"2.*'scales'.*negative"):
            save_model(tmp_path / "m", model)
        assert _state(model) == before
        y = model(X)
        dequantize_model(model)
        torch.testing.assert_close(model(X), y)

    @pytest.mark.parametrize("text", ["float16", "bfloat16", "u8/16:float32", "u8+none/4:float16"])
    def test_scales_are_frozen_in_another_storage(self, text):
        model = _trained(_model())
        before = {name: model.get_submodule(name).quantized.array for name in ("0", "2")}
        storage = lq.BlockFormat.parse(f"nf4/4:{text}").scales
        freeze_scales(model, storage)
        for name, old in before.items():
            layer = model.get_submodule(name)
            own = layer.quantized.array
            assert type(layer) is LQLinear
            assert own.format == dataclasses.replace(old.format, scales=storage)
            assert torch.equal(own.codes, old.codes)
            unit = dataclasses.replace(own.format, scales="float32")
            scales = lq.dequantize(own.scales) if isinstance(own.scales, lq.QuantizedArray) else own.scales.float()
            assert torch.equal(lq.dequantize(own), lq.dequantize(dataclasses.replace(own, scales=scales, format=unit)))
            step = 2.0**-7 if isinstance(storage, str) else 1 / 254
            assert (scales - old.scales).abs().max() <= step * old.scales.max()

    def test_a_storage_that_does_not_suit_changes_nothing(self):
        signed = next(book for book in ALL_CODEBOOKS if book.normalization == "signed")
        model = _model(fmt=lq.BlockFormat(signed, 4))
        with pytest.raises(FormatError, match="both signs"):
            freeze_scales(model, lq.ScaleFormat(8, 16))
        model = _model()
        with torch.no_grad():
            model[2].quantized.scales[0] = 1e6
        with pytest.raises(NonFiniteError, match="float16"):
            freeze_scales(model, "float16")
        assert [type(layer) for layer in model] == [PEQALinear, nn.ReLU, PEQALinear]
        with pytest.raises(FormatError, match="scales must be"):
            freeze_scales(model, "int8")

    def test_signed_formats_freeze_with_negative_scales(self):
        book = next(book for book in ALL_CODEBOOKS if book.normalization == "signed")
        model = _model(fmt=lq.BlockFormat(book, 4))
        with torch.no_grad():
            model[2].quantized.scales[0] = -0.5
        y = model(X)
        freeze_scales(model)
        assert torch.equal(model(X), y)

    def test_a_checkpoint_of_the_whole_model(self, tmp_path):
        model = _trained(_both())
        save_model(tmp_path / "m", model)
        fresh = _plain(1)
        load_model(tmp_path / "m", fresh)
        assert torch.equal(fresh(X), model(X))
        train_scales(fresh)
        assert torch.equal(scales(fresh)["0"].values, scales(model)["0"].values)

    def test_factors_belong_to_the_scales_that_they_trained_with(self, tmp_path):
        model, start = _both(), _both()
        save_factors(tmp_path / "f", _trained(model))
        with pytest.raises(CheckpointError, match="another quantized model"):
            load_factors(tmp_path / "f", start)
        set_scales(start, scales(model))
        load_factors(tmp_path / "f", start)
        assert torch.equal(start(X), model(X))

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (_plain, "must have a quantized layer"),
            (lambda: quantize_model(m := _plain(), NF3, rank=1) and m, "Call train_scales"),
        ],
        ids=["dense", "frozen"],
    )
    def test_models_without_trainable_scales(self, make, says):
        for call in (scales, freeze_scales, lambda m: set_scales(m, {}), lambda m: save_scales("unused", m)):
            with pytest.raises(InvalidArgumentError, match=says):
                call(make())


class TestTasks:
    @pytest.mark.parametrize(
        "make", [_model, _both, lambda: _both(train_factors=False)], ids=["scales", "both", "frozen"]
    )
    def test_switching_restores_outputs_bit_for_bit(self, make):
        model = make()
        start, first = scales(model), model(X)
        second = _trained(model)(X)
        task = scales(model)
        assert not torch.equal(first, second)
        parameters = [id(p) for p in model.parameters()]
        for _ in range(2):
            set_scales(model, start)
            assert torch.equal(model(X), first)
            set_scales(model, task)
            assert torch.equal(model(X), second)
        with using_scales(model, start):
            assert torch.equal(model(X), first)
            assert not any(p.requires_grad for p in model.parameters())
            assert model[0].quantized.scales.data_ptr() == start["0"].values.data_ptr()
        assert torch.equal(model(X), second)
        assert [id(p) for p in model.parameters()] == parameters

    def test_everything_is_restored_after_an_error(self):
        model = _both()
        task = scales(_trained(copy.deepcopy(model)))
        before = _state(model)
        with pytest.raises(ZeroDivisionError), using_scales(model, task):
            raise ZeroDivisionError
        assert _state(model) == before

    def test_factors_of_a_task_may_have_another_rank_and_scaling(self):
        model, other = _both(), _plain()
        quantize_model(other, NF3, rank=1, scaling=2.0)
        train_scales(other, train_factors=True)
        task = {name: Scales(own.values, scales(other)[name].factors) for name, own in scales(model).items()}
        set_scales(model, task)
        assert (model[0].rank, model[0].scaling, model[0].lora_A.requires_grad) == (1, 2.0, True)

    def test_a_sum_of_tasks(self):
        model = _model()
        start = scales(model)
        tasks = {name: scales(_trained(copy.deepcopy(model), target)) for name, target in (("up", 1.0), ("down", -1.0))}
        one = combine_scales(start, tasks, {"up": 1, "down": 0})
        assert all(torch.equal(one[name].values, tasks["up"][name].values) for name in start)
        both = combine_scales(start, tasks, {"up": 0.5, "down": -0.25})
        for name, own in both.items():
            s, up, down = (task[name].values.double() for task in (start, tasks["up"], tasks["down"]))
            torch.testing.assert_close(own.values, (s + 0.5 * (up - s) - 0.25 * (down - s)).float())
        assert all(torch.equal(own.values, start[name].values) for name, own in combine_scales(start, {}, {}).items())

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (lambda s: (s, {"a": s}, {"b": 1}), "weights must have one number for each task"),
            (lambda s: (s, {"a": s}, {"a": float("nan")}), "weights must be finite numbers, got nan"),
            (lambda s: (s, {"a": s}, {"a": "1"}), "weights must be finite numbers, got '1'"),
            (lambda s: (s, {"a": {"0": s["0"]}}, {"a": 1}), "scales of task 'a' must have the layers.*lack 2"),
            (lambda s: (s, {"a": {**s, "3": s["0"]}}, {"a": 1}), "scales of task 'a' must have the layers.*have 3"),
            (lambda s: (s, {"a": {**s, "2": s["0"]}}, {"a": 1}), r"'2' must have shape \(4,\), got \(12,\)"),
            (lambda s: (s, {"a": {**s, "2": None}}, {"a": 1}), "'2' must be Scales, got None"),
            (
                lambda s: (s, {"a": {**s, "2": Scales(s["2"].values, Factors(X, X, 1.0))}}, {"a": 1}),
                "'2' must have no factors",
            ),
        ],
        ids=["names", "nan", "text", "fewer", "more", "shape", "kind", "factors"],
    )
    def test_tasks_that_do_not_add_up(self, arguments, says):
        with pytest.raises(InvalidArgumentError, match=says):
            combine_scales(*arguments(scales(_model())))

    @pytest.mark.parametrize("call", [set_scales, lambda *args: using_scales(*args).__enter__()], ids=["set", "using"])
    @pytest.mark.parametrize(
        ("change", "error", "says"),
        [
            (lambda s: s.pop("2"), InvalidArgumentError, "scales must have the layers.*lack"),
            (lambda s: s.update(up=s["0"]), InvalidArgumentError, "scales must have the layers.*have.*up"),
            (lambda s: s.update({"2": s["0"]}), InvalidArgumentError, r"'2' must have shape \(4,\), got \(12,\)"),
            (lambda s: s.update({"2": s["0"].values}), InvalidArgumentError, "'2' must be Scales"),
            (lambda s: s.update({"2": Scales(torch.empty(4, device="meta"))}), InvalidArgumentError, "'2'.*meta"),
            (
                lambda s: s.update({"2": Scales(torch.full((4,), 1e300, dtype=torch.float64))}),
                NonFiniteError,
                "'2'.*float32",
            ),
            (
                lambda s: s.update({"2": Scales(s["2"].values, Factors(X, X, 1.0))}),
                InvalidArgumentError,
                "'2'.*no factors",
            ),
        ],
        ids=["fewer", "more", "shape", "kind", "meta", "overflow", "factors"],
    )
    def test_scales_that_do_not_fit(self, call, change, error, says):
        model = _model()
        given = scales(model)
        change(given)
        before = _state(model)
        with pytest.raises(error, match=says):
            call(model, given)
        assert _state(model) == before

    def test_parametrized_scales_are_refused(self):
        model = _model()
        given = scales(model)
        register_parametrization(model[0].quantized, "scales", nn.Identity())
        with pytest.raises(InvalidArgumentError, match=r"plain parameters as scales.*'0'"):
            set_scales(model, given)

    def test_layers_with_trained_factors_need_factors(self):
        model = _both()
        given = {name: Scales(own.values) for name, own in scales(model).items()}
        with pytest.raises(InvalidArgumentError, match="'0' must have factors"):
            set_scales(model, given)


class TestFiles:
    @pytest.mark.parametrize(
        "make", [_model, _both, lambda: _both(train_factors=False)], ids=["scales", "both", "frozen"]
    )
    def test_a_fresh_model_with_the_same_codes_gets_equal_outputs(self, tmp_path, make):
        trained = _trained(make())
        save_scales(tmp_path / "s", trained, {"task": "sums", 3: (1, 2)})
        fresh = make()
        assert load_scales(tmp_path / "s", fresh) == {"task": "sums", "3": [1, 2]}
        assert torch.equal(fresh(X), trained(X))
        again = _trained(make(), -1.0)  # other scales are no other base
        load_scales(tmp_path / "s", again.requires_grad_(requires_grad=False))
        assert torch.equal(again(X), trained(X))
        save_scales(tmp_path / "t", again, {"task": "sums", 3: (1, 2)})
        assert (tmp_path / "s").read_bytes() == (tmp_path / "t").read_bytes()

    def test_the_file_holds_the_scales_alone(self, tmp_path):
        model = _model(width=256)
        save_scales(tmp_path / "s", model)
        assert (tmp_path / "s").stat().st_size < 4 * (256 + 4) + 1000

    def test_negative_scales_are_stored(self, tmp_path):
        model = _model()
        with torch.no_grad():
            model[0].quantized.scales.neg_()
        save_scales(tmp_path / "s", model)
        fresh = _model()
        load_scales(tmp_path / "s", fresh)
        assert torch.equal(fresh(X), model(X))

    def test_how_the_first_scales_were_stored_does_not_matter(self, tmp_path):
        plain = _plain()
        quantize_model(plain, lq.BlockFormat.parse("nf3/8:float16"), rank=0)
        train_scales(plain)
        save_scales(tmp_path / "s", plain)
        frozen = copy.deepcopy(plain)
        freeze_scales(frozen)
        train_scales(frozen)
        load_scales(tmp_path / "s", frozen)

    @pytest.mark.parametrize(
        ("other", "says"),
        [
            (lambda: _model(seed=5), "belongs to another quantized model.* in 0, 2"),
            (lambda: _model(fmt=lq.BlockFormat.parse("affine4/4@-1")), "another quantized model"),
            (lambda: _model(width=13), "another quantized model"),
            (lambda: nn.Sequential(*_model(), nn.Linear(4, 8), *_model()), "'4' is not in the file"),
            (lambda: nn.Sequential(_model()[0], nn.ReLU()), "'2' is not a layer of the model"),
            (_both, "another quantized model"),
        ],
        ids=["seed", "format", "width", "more", "fewer", "factors"],
    )
    def test_another_base_is_refused(self, tmp_path, other, says):
        save_scales(tmp_path / "s", _trained(_model()))
        model = other()
        before = _state(model)
        with pytest.raises(CheckpointError, match=f"s .*{says}"):
            load_scales(tmp_path / "s", model)
        assert _state(model) == before

    def test_one_changed_code_is_another_base(self, tmp_path):
        model = _model()
        save_scales(tmp_path / "s", model)
        model[2].quantized.codes[0] ^= 1
        with pytest.raises(CheckpointError, match=r"another quantized model.* in 2"):
            load_scales(tmp_path / "s", model)
        model[2].quantized.codes[0] ^= 1
        load_scales(tmp_path / "s", model)

    def test_frozen_factors_belong_to_the_base(self, tmp_path):
        model = _both(train_factors=False)
        save_scales(tmp_path / "s", _trained(model))
        with torch.no_grad():
            model[2].lora_B += 1
        with pytest.raises(CheckpointError, match=r"another quantized model.* in 2"):
            load_scales(tmp_path / "s", model)

    def test_scales_with_factors_do_not_load_beside_frozen_ones(self, tmp_path):
        save_scales(tmp_path / "s", _trained(_both()))
        with pytest.raises(CheckpointError, match=r"does not fit.*'0' must have no factors"):
            load_scales(tmp_path / "s", _both(train_factors=False))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scales_that_are_not_finite_are_not_saved(self, tmp_path, value):
        model = _model()
        with torch.no_grad():
            model[2].quantized.scales[1] = value
        with pytest.raises(InvalidArgumentError, match=r"scales\['2'\].*non-finite"):
            save_scales(tmp_path / "s", model)
        assert not (tmp_path / "s").exists()
