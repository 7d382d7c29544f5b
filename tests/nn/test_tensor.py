"""Quantized tensors against dense ones: results, gradients, views, copies, and operations that they do not have."""

from __future__ import annotations

import copy

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.nn import functional  # noqa: E402

from lqlora.nn import LQLinear, QuantizedTensor, operands  # noqa: E402

ROWS, COLUMNS, RANK, EXPERTS = 16, 8, 2, 3
FORMATS = {
    "plain": "nf4/8:float32",
    "nested": "nf3/8:u8/4:float32",
    "affine": "int4/16:float16",
    "columns": "nf4/4@0:float32",
}


def _quantized(w):
    return isinstance(w, QuantizedTensor)


def _random(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _tensor(fmt="plain", *, has_factors=True, dtype=torch.float64, stack=()):
    q = lq.quantize(_random(*stack, ROWS, COLUMNS).float(), lq.BlockFormat.parse(FORMATS[fmt]), batch_dims=len(stack))
    factors = [_random(*stack, RANK, COLUMNS).requires_grad_(), _random(*stack, ROWS, RANK).requires_grad_()]
    return QuantizedTensor(operands(q), *(factors if has_factors else ()), scaling=0.5, dtype=dtype)


X, OUTER, ADDED = _random(3, COLUMNS), _random(3, ROWS), _random(3, ROWS)
OPERATIONS = {
    "linear": lambda w, x: functional.linear(x, w),
    "linear with bias": lambda w, x: functional.linear(x, w, ADDED[0]),
    "linear of three axes": lambda w, x: functional.linear(x[None], w),
    "linear of a vector": lambda w, x: functional.linear(x[0], w),
    "T": lambda w, x: x @ w.T,
    "mT": lambda w, x: torch.matmul(x, w.mT),
    "t": lambda w, x: torch.mm(x, w.t()),
    "transpose": lambda w, x: x.mm(w.transpose(-1, 0)),
    "permute": lambda w, x: x.matmul(w.permute(1, 0)),
    "not transposed": lambda w, x: OUTER @ w + x,
    "from the left": lambda w, x: w @ x.T,
    "from the left, three axes": lambda w, x: w @ x.T[None],
    "from the left, a vector": lambda w, x: torch.matmul(w, x[0]),
    "transposed from the left": lambda w, x: w.T @ OUTER.T + x.T,
    "addmm": lambda w, x: torch.addmm(ADDED, x, w.t()),
    "addmm, scaled": lambda w, x: ADDED.addmm(x, w.t(), beta=0.5, alpha=2.0),
    "rows": lambda w, x: functional.linear(x, w[8:]),
    "no rows": lambda w, x: functional.linear(x, w[4:2]),
    "rows from the end": lambda w, x: functional.linear(x, w.narrow(0, -8, 8)),
    "rows within a byte": lambda w, x: functional.linear(x, w[1:4]),
    "columns": lambda w, x: functional.linear(x[:, 2:5], w[:, 2:5]),
    "narrow columns": lambda w, x: functional.linear(x[:, 2:5], w.narrow(1, 2, 3)),
    "rows of the transpose": lambda w, x: x[:, :4] @ w.t()[:4],
    "columns of the transpose": lambda w, x: x @ w.t().narrow(1, 0, 8),
    "steps": lambda w, x: functional.linear(x, w[::2]),
    "a row": lambda w, x: x @ w[3],
    "select": lambda w, x: x @ w.select(0, 3),
    "chunk": lambda w, x: torch.cat([functional.linear(x, part) for part in w.chunk(2)], dim=1),
    "chunk columns": lambda w, x: sum(x[:, i * 4 : i * 4 + 4] @ part.t() for i, part in enumerate(w.chunk(2, dim=1))),
    "split": lambda w, x: torch.cat([functional.linear(x, part) for part in torch.split(w, 8)], dim=1),
    "split by sizes": lambda w, x: torch.cat([functional.linear(x, part) for part in w.split([8, 5, 3])], dim=1),
    "cat": lambda w, x: functional.linear(x, torch.cat([w, w])),
    "detached": lambda w, x: functional.linear(x, w.detach()),
    "linear by names": lambda w, x: functional.linear(input=x, weight=w, bias=ADDED[0]),
    "matmul by names": lambda w, x: torch.matmul(input=x, other=w.t()),
    "mm by names": lambda w, x: x.mm(mat2=w.t()),
    "addmm by names": lambda w, x: torch.addmm(input=ADDED, mat1=x, mat2=w.t(), beta=2.0),
    "addmm without its summand": lambda w, x: torch.addmm(ADDED * torch.nan, x, w.t(), beta=0),
    "rows by names": lambda w, x: functional.linear(x, torch.narrow(input=w, dim=0, start=8, length=8)),
    "permute, mixed signs": lambda w, x: x @ w.permute(-1, 0),
    "to a dtype": lambda w, x: functional.linear(x, w.to(torch.float32)).double() if _quantized(w) else x @ w.t(),
    "to a copy": lambda w, x: functional.linear(x, w.to(torch.float64, copy=True)),
    "a clone": lambda w, x: x @ w.clone().t(),
    "a dense clone": lambda w, x: functional.linear(x, w.clone().dequantize() if _quantized(w) else w),
    "a row of a clone": lambda w, x: x @ w.clone()[3],
}
#: Operations of which the dense tensor is not made.
QUANTIZED = [
    name
    for name in OPERATIONS
    if name.startswith(("linear", "T", "mT", "t", "mm", "matmul", "add", "not", "from", "perm", "a clone"))
]


def _gradients(result, inputs):
    grads = torch.autograd.grad(result.square().sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


CASES = [(name, True) for name in OPERATIONS]
CASES += [(name, False) for name in QUANTIZED if name != "from the left, three axes"]  # which expands the tensor


@pytest.mark.sampled(60)
@pytest.mark.parametrize("has_factors", [True, False], ids=["factors", "no factors"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("name", "is_above"), CASES)
def test_results_and_gradients_are_those_of_the_dense_tensor(name, is_above, fmt, has_factors):
    weight, x = _tensor(fmt, has_factors=has_factors), X.clone().requires_grad_()
    inputs = [x, *(weight.factors or ())]
    if is_above:
        found = OPERATIONS[name](weight, x)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            found = OPERATIONS[name](weight, x)
    expected = OPERATIONS[name](weight.dequantize(), x)
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float64
    # Below autograd the gradient of a tensor in float32 has that dtype.
    bounds = {"rtol": 1e-4, "atol": 1e-4} if name == "to a dtype" else {}
    torch.testing.assert_close(found, expected, **bounds)
    torch.testing.assert_close(_gradients(found, inputs), _gradients(expected, inputs), **bounds)


@pytest.mark.parametrize("name", QUANTIZED)
def test_products_never_hold_a_dense_tensor(name, monkeypatch):
    weight, x = _tensor(), X.clone().requires_grad_()

    def refuse(*_):
        raise AssertionError("a dense tensor was made")

    monkeypatch.setattr(QuantizedTensor, "dequantize", refuse)
    monkeypatch.setattr("lqlora.nn.tensor._Sum.backward", staticmethod(refuse))
    OPERATIONS[name](weight, x).sum().backward()
    assert weight.factors[0].grad is not None


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_that_begin_blocks_and_bytes_share_the_codes(fmt):
    weight = _tensor(fmt)
    parts = [weight[8:], weight.narrow(0, 8, 8), weight.chunk(2)[1], weight.split(8)[1]]
    kept = all(isinstance(part, QuantizedTensor) for part in parts)
    assert kept == (fmt != "columns")
    for part in parts:
        torch.testing.assert_close(part.dequantize() if kept else part, weight.dequantize()[8:])
        assert not kept or part.operands.tensors[0].untyped_storage().data_ptr() == (
            weight.operands.tensors[0].untyped_storage().data_ptr()
        )


STACK_OPERATIONS = {
    "index": lambda w, x: torch.stack([functional.linear(x, w[i]) for i in (2, 0, -1)]),
    "index by a tensor": lambda w, x: functional.linear(x, w[torch.tensor(1)]),
    "select": lambda w, x: functional.linear(x, w.select(0, 1)),
    "unbind": lambda w, x: torch.stack([functional.linear(x, own) for own in w.unbind()]),
    "bmm": lambda w, x: torch.bmm(x.expand(EXPERTS, -1, -1), w.transpose(1, 2)),
    "bmm, not transposed": lambda w, x: torch.bmm(OUTER.expand(EXPERTS, -1, -1), w) + x,
    "bmm from the left": lambda w, x: torch.bmm(w, x.T.expand(EXPERTS, -1, -1)),
    "bmm by names": lambda w, x: torch.bmm(input=x.expand(EXPERTS, -1, -1), mat2=w.mT),
    "permute": lambda w, x: torch.bmm(x.expand(EXPERTS, -1, -1), w.permute(0, 2, 1)),
    "matrix of a clone": lambda w, x: functional.linear(x, w.clone()[1]),
    "mask": lambda w, x: functional.linear(x, w[torch.tensor(1, dtype=torch.bool)][0, 2]),
    "several": lambda w, x: functional.linear(x, w[[0, 2]].flatten(0, 1)),
    "by token": lambda w, x: torch.bmm(w[torch.tensor([0, 2, 2])], x[:, :, None]),
}


@pytest.mark.parametrize("has_factors", [True, False], ids=["factors", "no factors"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", STACK_OPERATIONS)
def test_matrices_of_a_stack_are_those_of_the_dense_stack(name, fmt, has_factors):
    weight, x = _tensor(fmt, has_factors=has_factors, stack=(EXPERTS,)), X.clone().requires_grad_()
    inputs = [x, *(weight.factors or ())]
    found, expected = (STACK_OPERATIONS[name](own, x) for own in (weight, weight.dequantize()))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(_gradients(found, inputs), _gradients(expected, inputs))


class TestTensor:
    def test_attributes_are_those_of_a_dense_tensor(self):
        weight = _tensor(dtype=torch.bfloat16)
        assert (weight.shape, weight.dtype, weight.device.type) == ((ROWS, COLUMNS), torch.bfloat16, "cpu")
        assert (weight.ndim, weight.numel(), len(weight)) == (2, ROWS * COLUMNS, ROWS)
        assert weight.t().shape == (COLUMNS, ROWS)
        assert weight.requires_grad
        assert not weight.detach().requires_grad
        assert not _tensor(has_factors=False).requires_grad
        with torch.no_grad():
            assert not _tensor().requires_grad

    @pytest.mark.parametrize("has_factors", [True, False])
    @pytest.mark.parametrize(
        "multiply", [functional.linear, lambda x, w: x @ w.dequantize().t()], ids=["packed", "dense"]
    )
    def test_a_leaf_gets_a_dense_gradient(self, multiply, has_factors):
        leaf = nn.Parameter(_tensor(has_factors=has_factors))
        multiply(X, leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, torch.ones(3, ROWS).double().T @ X)

    def test_copies_never_lose_the_gradient_of_scales(self):
        weight = _tensor(has_factors=False)
        weight.operands.tensors[1].requires_grad_()
        for copied in (torch.clone, torch.Tensor.half):
            with pytest.raises(InvalidArgumentError, match=r"aten\.\w+\.default must not"):
                copied(weight)
        assert not functional.linear(X, weight.detach()).requires_grad
        assert not functional.linear(X, copy.deepcopy(weight)).requires_grad

    def test_its_text_has_shape_format_and_rank(self):
        assert repr(_tensor()) == "QuantizedTensor((16, 8), nf4/8:float32, rank=2, dtype=torch.float64)"

    def test_a_copy_has_memory_of_its_own(self):
        weight = _tensor()
        for other in (weight.clone(), copy.deepcopy(weight), weight.to(torch.float32, copy=True)):
            assert isinstance(other, QuantizedTensor)
            assert not set(map(torch.Tensor.data_ptr, other.operands.tensors)) & set(
                map(torch.Tensor.data_ptr, weight.operands.tensors)
            )
            torch.testing.assert_close(other.dequantize(), weight.dequantize().to(other.dtype))

    def test_to_another_dtype_changes_the_dtype_alone(self):
        found = _tensor().half()
        assert (found.dtype, found.dequantize().dtype) == (torch.float16, torch.float16)
        assert found.array.scales.dtype == torch.float32

    def test_to_the_meta_device_keeps_the_shape(self):
        assert (_tensor().to("meta").device.type, _tensor().to("meta").shape) == ("meta", (ROWS, COLUMNS))

    def test_values_are_copied_from_a_tensor_of_the_same_format(self):
        weight, other = _tensor().detach(), _tensor().detach().clone()
        other.operands.tensors[0].zero_()
        other.factors[0].fill_(3.0)
        weight.copy_(other)
        assert torch.equal(weight.dequantize(), other.dequantize())
        for wrong in (_tensor("nested").detach(), other.dequantize(), _tensor(has_factors=False)):
            with pytest.raises(InvalidArgumentError, match=r"aten\.copy_\.default.*dequantize"):
                weight.copy_(wrong)

    def test_autocast_chooses_the_dtype_of_products(self):
        weight = _tensor(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert functional.linear(X.float(), weight).dtype == (X.float() @ weight.t()).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("operate", "name"),
        [
            (torch.neg, "neg"),
            (torch.norm, "norm"),
            (lambda w: torch.mul(w, 2), "mul"),
            (torch.flatten, "view"),
            (lambda w: w.to(torch.int64), "_to_copy"),
            (lambda w: torch.mm(w, w.t()), "mm"),
            (lambda w: w.copy_(torch.zeros(ROWS, COLUMNS)), "copy_"),
            (lambda w: torch.addmm(ADDED, X, w.t(), out=torch.empty_like(ADDED)), "addmm"),
            (lambda w: w.split([3, 4]), "split_with_sizes"),
        ],
        ids=lambda own: own if isinstance(own, str) else "",
    )
    def test_other_operations_are_refused_by_name(self, operate, name):
        with pytest.raises(InvalidArgumentError, match=rf"aten\.\w*{name}\w*\.\w+ must not.*dequantize"):
            operate(_tensor().detach())

    def test_memory_of_its_own_is_not_shared(self):
        with pytest.raises(InvalidArgumentError, match="share_memory_ must not"):
            _tensor().share_memory_()

    def test_factors_of_other_shapes_are_refused(self):
        own = _tensor()
        lora_A, lora_B = own.factors
        with pytest.raises(InvalidArgumentError, match="both or not at all"):
            QuantizedTensor(own.operands, lora_A)
        for wrong in ((lora_B, lora_A), (lora_A[0], lora_B), (lora_A, lora_B[:, :1])):
            with pytest.raises(InvalidArgumentError, match=r"lora_B.*\(16, rank\)"):
                QuantizedTensor(own.operands, *wrong)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch reads it of its inputs
    @pytest.mark.parametrize("name", ["linear", "T"])
    def test_compiled_functions_take_it_and_train_its_factors(self, name):
        weight, x = _tensor(), X.clone().requires_grad_()
        found = torch.compile(OPERATIONS[name], fullgraph=True, backend="aot_eager")(weight, x)
        expected = OPERATIONS[name](weight, x)
        torch.testing.assert_close(found, expected)
        inputs = [x, *weight.factors]
        torch.testing.assert_close(_gradients(found, inputs), _gradients(expected, inputs))


class TestLayer:
    @pytest.fixture
    def layer(self):
        return LQLinear.from_decomposition(
            lq.decompose(_random(ROWS, COLUMNS).float(), lq.BlockFormat.parse(FORMATS["plain"]), RANK, scaling=0.5),
            torch.ones(ROWS),
        )

    def test_its_weight_computes_what_the_layer_does(self, layer):
        x = X.float()
        assert torch.equal(functional.linear(x, layer.weight, layer.bias), layer(x))
        with torch.no_grad():
            assert torch.equal(functional.linear(x, layer.weight, layer.bias), layer(x))

    def test_its_dtype_follows_the_module(self, layer):
        assert layer.weight.dtype == torch.float32
        assert layer.bfloat16().weight.dtype == torch.bfloat16
        assert layer.to(torch.float64).weight.dtype == torch.float64
        assert layer.to("cpu").weight.dtype == torch.float64
        assert copy.deepcopy(layer).weight.dtype == torch.float64

    def test_a_converted_model_keeps_the_dtype_of_its_weights(self):
        model = nn.Sequential(nn.Linear(COLUMNS, ROWS)).bfloat16()
        lq.nn.quantize_model(model, lq.BlockFormat.parse(FORMATS["plain"]), rank=1)
        assert model[0].weight.dtype == torch.bfloat16
        assert model[0].quantized.scales.dtype == torch.float32

    def test_a_model_that_reads_it_compiles(self, layer):
        def apply(x):
            return functional.linear(x, layer.weight)

        x = X.float()
        torch.testing.assert_close(torch.compile(apply, backend="aot_eager")(x), apply(x))

    def test_it_is_not_replaced_or_tied(self, layer):
        for value in (nn.Parameter(torch.zeros(ROWS, COLUMNS)), torch.zeros(ROWS, COLUMNS), nn.Linear(2, 2), None):
            with pytest.raises(InvalidArgumentError, match="must not be replaced or tied"):
                layer.weight = value
        assert layer.quantized.codes.any()

    def test_it_is_read_in_inference_mode(self, layer):
        x = X.float()
        with torch.inference_mode():
            found = functional.linear(x, layer.weight.detach()[8:], layer.bias[8:])
        torch.testing.assert_close(found, layer(x)[:, 8:].detach())

    @pytest.mark.parametrize("name", QUANTIZED)
    def test_products_in_inference_mode_are_those_outside(self, name):
        expected = OPERATIONS[name](_tensor(), X).detach()
        with torch.inference_mode():
            torch.testing.assert_close(OPERATIONS[name](_tensor().detach(), X), expected)
            assert _tensor().to(torch.bfloat16).dtype == torch.bfloat16

    @pytest.mark.parametrize("training", [True, False])
    def test_layers_of_torch_that_read_it_train_and_evaluate(self, training):
        torch.manual_seed(0)
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(COLUMNS, 2, ROWS, 0.0, batch_first=True), 2, enable_nested_tensor=False
        ).train(training)
        x = X.float()[None]
        expected = model(x).detach()
        lq.nn.quantize_model(model, lq.BlockFormat.parse("nf8/8:float32"), rank=4)
        found = model(x)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        found.square().sum().backward()
        assert model.layers[0].self_attn.out_proj.lora_A.grad.any()
        with torch.no_grad():
            torch.testing.assert_close(model(x), found)
