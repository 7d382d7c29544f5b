"""The operator of a layer, a product with a packed weight plus a low-rank part: against arithmetic in double precision, opcheck, autograd and the layer."""

from __future__ import annotations

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from tests.requirements import require_module

torch = require_module("torch")
from torch.autograd import forward_ad  # noqa: E402 - needs torch

from lqlora.nn import LQLinear, operands  # noqa: E402

OUT, IN, RANK = 12, 20, 3
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 1e-6, torch.float64: 1e-14}

forwards = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


WEIGHT = operands(
    lq.quantize(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)), lq.BlockFormat.parse("nf4/8:float32"))
)


def given(*lead, dtype=torch.float32, factors=None):
    """Rows and both factors."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, IN), (RANK, IN), (OUT, RANK))
    dtypes = (dtype, factors or dtype, factors or dtype)
    return [torch.randn(*shape, generator=generator).to(own) for shape, own in zip(shapes, dtypes, strict=True)]


def linear(x, lora_A, lora_B, scaling=0.5):
    return torch.ops.lqlora.linear(x, *WEIGHT, lora_A, lora_B, scaling)


def checked(x, lora_A, lora_B):
    torch.library.opcheck(torch.ops.lqlora.linear.default, (x, *WEIGHT, lora_A, lora_B, 0.5))


def exact(x, lora_A, lora_B, scaling=0.5):
    x, lora_A, lora_B = (tensor.double() for tensor in (x, lora_A, lora_B))
    return x @ torch.ops.lqlora.dequantize(*WEIGHT, dtype=torch.float64).T + scaling * (x @ lora_A.T) @ lora_B.T


@pytest.mark.parametrize("factors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_it_is_the_product_plus_the_low_rank_part(lead, dtype, factors):
    tensors = given(*lead, dtype=dtype, factors=factors)
    before = [tensor.clone() for tensor in tensors]
    found = linear(*tensors)
    assert (found.dtype, found.shape) == (dtype, (*lead, OUT))
    # Two roundings to the dtype, of the product and of the sum, of numbers up to about 16.
    torch.testing.assert_close(found.double(), exact(*tensors), rtol=EPS[dtype], atol=16 * EPS[dtype])
    assert all(map(torch.equal, tensors, before))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dtype", "factors"), [(torch.float32, None), (torch.float16, torch.float32)], ids=str)
def test_opcheck(grad, dtype, factors):
    tensors = [tensor.requires_grad_(grad) for tensor in given(2, 3, dtype=dtype, factors=factors)]
    checked(*tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_of_rows_in_any_layout(dtype):
    x, *factors = given(4, dtype=dtype)
    checked(x.T.contiguous().T, *factors)


def test_rows_in_any_layout():
    x, lora_A, lora_B = given(4)
    found = linear(x.T.contiguous().T, lora_A.T.contiguous().T, lora_B[:, [0, 0, 1, 1, 2, 2]][:, ::2], 2.0)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact(x, lora_A, lora_B, 2.0), rtol=1e-5, atol=1e-5)


def test_gradients_once_and_twice():
    tensors = [tensor.requires_grad_() for tensor in given(2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(linear, tensors)
    assert torch.autograd.gradgradcheck(linear, tensors)


@forwards
@pytest.mark.parametrize("position", range(3))
def test_gradients_forwards(position):
    tensors = given(2, dtype=torch.float64)
    tangent = torch.ones_like(tensors[position])
    with forward_ad.dual_level(), torch.no_grad():
        dual = [forward_ad.make_dual(t, tangent) if i == position else t for i, t in enumerate(tensors)]
        found = forward_ad.unpack_dual(linear(*dual)).tangent
    step = [t + 1e-6 * tangent if i == position else t for i, t in enumerate(tensors)]
    torch.testing.assert_close(found, (exact(*step) - exact(*tensors)) / 1e-6, rtol=1e-4, atol=1e-6)


def test_nothing_is_saved_where_no_gradient_is_asked_for():
    saved = []
    tensors = [tensor.requires_grad_() for tensor in given(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not linear(*tensors).requires_grad
        assert not saved
        assert linear(*tensors).requires_grad
        assert saved


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(grad, dtype):
    tensors = [tensor.requires_grad_(grad) for tensor in given(3, dtype=dtype, factors=torch.float32)]
    expected = linear(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(*tensors), expected)


def test_factors_may_be_of_two_dtypes():
    x, lora_A, lora_B = given(3)
    for one, other in ((lora_A.half(), lora_B), (lora_A, lora_B.double())):
        found = linear(x, one, other)
        torch.testing.assert_close(found.double(), exact(x, one, other), rtol=1e-5, atol=1e-5)


def test_factors_of_rank_zero_add_nothing_and_are_trained_all_the_same():
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    layer = LQLinear(lq.quantize(w, lq.BlockFormat.parse("nf4/8:float32")), torch.zeros(0, IN), torch.zeros(OUT, 0))
    x = given(3)[0]
    y = layer(x)
    torch.testing.assert_close(y.detach(), lq.matmul(x, layer.quantized.array))
    y.sum().backward()
    assert layer.lora_A.grad.shape == (0, IN)
    assert layer.lora_B.grad.shape == (OUT, 0)


WRONG = {
    "columns": (lambda x, a, b: (x[:, 1:], a, b), InvalidArgumentError, r"x must .*\(4, 19\) and \(12, 20\)"),
    "columns of a factor": (lambda x, a, b: (x, a[:, 1:], b), InvalidArgumentError, r"lora_A must .*\(3, 19\)"),
    "rows of a factor": (lambda x, a, b: (x, a, b[1:]), InvalidArgumentError, r"lora_B and .*\(11, 3\)"),
    "ranks": (lambda x, a, b: (x, a[1:], b), InvalidArgumentError, r"\(12, 3\) and \(2, 20\)"),
    "a vector": (lambda x, a, b: (x, a[0], b), InvalidArgumentError, r"lora_A must .*\(20,\)"),
    "a number": (lambda x, a, b: (x[0, 0], a, b), InvalidArgumentError, r"x must .*\(\)"),
    "integers": (lambda x, a, b: (x.int(), a, b), UnsupportedArrayError, "x must be .* torch.int32"),
    "whole factors": (lambda x, a, b: (x, a.int(), b), UnsupportedArrayError, "lora_A must be .* torch.int32"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_by_a_sentence(device, case, grad):
    wrong, error, sentence = WRONG[case]
    weight = [tensor.to(device) for tensor in WEIGHT.tensors]
    x, lora_A, lora_B = wrong(*(t.to(device).requires_grad_(grad) for t in given(4)))
    with pytest.raises(error, match=sentence):
        torch.ops.lqlora.linear(x, weight, *WEIGHT[1:], lora_A, lora_B, 1.0)


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_of_two_devices_are_refused(grad):
    x, lora_A, lora_B = (tensor.requires_grad_(grad) for tensor in given(4))
    with pytest.raises(MixedArraysError, match="cpu and meta"):
        linear(x, lora_A.to("meta"), lora_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_the_same_with_gradients_and_without(dtype):
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    x, lora_A, lora_B = given(5, dtype=dtype, factors=torch.float32)
    layer = LQLinear(lq.quantize(w, lq.BlockFormat.parse("nf4/8:float32")), lora_A, lora_B, 0.5)
    trained = layer(x)
    with torch.inference_mode():
        found = layer(x)
    assert trained.requires_grad
    torch.testing.assert_close(found, trained.detach(), rtol=4 * EPS[dtype], atol=8 * EPS[dtype])
