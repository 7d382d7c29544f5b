"""The operator that adds a low-rank part: against arithmetic in double precision, opcheck, autograd and the layer."""

from __future__ import annotations

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from tests.requirements import require_module

torch = require_module("torch")
from torch.autograd import forward_ad  # noqa: E402 - needs torch

from lqlora.nn import LQLinear  # noqa: E402

OUT, IN, RANK = 12, 20, 3
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 1e-6, torch.float64: 1e-14}

forwards = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def given(*lead, dtype=torch.float32, factors=None):
    """A result so far, rows and both factors."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, OUT), (*lead, IN), (RANK, IN), (OUT, RANK))
    dtypes = (dtype, dtype, factors or dtype, factors or dtype)
    return [torch.randn(*shape, generator=generator).to(own) for shape, own in zip(shapes, dtypes, strict=True)]


def exact(y, x, lora_A, lora_B, scaling):
    y, x, lora_A, lora_B = (tensor.double() for tensor in (y, x, lora_A, lora_B))
    return y + scaling * (x @ lora_A.T) @ lora_B.T


@pytest.mark.parametrize("factors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_it_is_rounded_once(lead, dtype, factors):
    tensors = given(*lead, dtype=dtype, factors=factors)
    before = [tensor.clone() for tensor in tensors]
    found = torch.ops.lqlora.add_low_rank(*tensors, 0.5)
    assert (found.dtype, found.shape) == (dtype, (*lead, OUT))
    torch.testing.assert_close(found.double(), exact(*tensors, 0.5), rtol=EPS[dtype], atol=EPS[dtype])
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dtype", "factors"), [(torch.float32, None), (torch.float16, torch.float32)], ids=str)
def test_opcheck(grad, dtype, factors):
    tensors = [tensor.requires_grad_(grad) for tensor in given(2, 3, dtype=dtype, factors=factors)]
    torch.library.opcheck(torch.ops.lqlora.add_low_rank.default, (*tensors, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_of_sums_in_any_layout(dtype):
    y, *others = given(4, dtype=dtype)
    torch.library.opcheck(torch.ops.lqlora.add_low_rank.default, (y.T.contiguous().T, *others, 0.5))


def test_rows_in_any_layout():
    y, x, lora_A, lora_B = given(4)
    found = torch.ops.lqlora.add_low_rank(y.T.contiguous().T, x[:, ::2], lora_A[:, ::2], lora_B, 2.0)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact(y, x[:, ::2], lora_A[:, ::2], lora_B, 2.0), rtol=1e-5, atol=1e-5)


def test_gradients_once_and_twice():
    tensors = [tensor.requires_grad_() for tensor in given(2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.lqlora.add_low_rank(*t, 0.5), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: torch.ops.lqlora.add_low_rank(*t, 0.5), tensors)


@forwards
@pytest.mark.parametrize("position", range(4))
def test_gradients_forwards(position):
    tensors = given(2, dtype=torch.float64)
    tangent = torch.ones_like(tensors[position])
    with forward_ad.dual_level(), torch.no_grad():
        dual = [forward_ad.make_dual(t, tangent) if i == position else t for i, t in enumerate(tensors)]
        found = forward_ad.unpack_dual(torch.ops.lqlora.add_low_rank(*dual, 0.5)).tangent
    step = [t + 1e-6 * tangent if i == position else t for i, t in enumerate(tensors)]
    torch.testing.assert_close(found, (exact(*step, 0.5) - exact(*tensors, 0.5)) / 1e-6, rtol=1e-4, atol=1e-6)


def test_nothing_is_saved_where_no_gradient_is_asked_for():
    saved = []
    tensors = [tensor.requires_grad_() for tensor in given(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not torch.ops.lqlora.add_low_rank(*tensors, 0.5).requires_grad
        assert not saved
        assert torch.ops.lqlora.add_low_rank(*tensors, 0.5).requires_grad
        assert saved


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(grad, dtype):
    tensors = [tensor.requires_grad_(grad) for tensor in given(3, dtype=dtype, factors=torch.float32)]
    expected = torch.ops.lqlora.add_low_rank(*tensors, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.ops.lqlora.add_low_rank(*tensors, 0.5), expected)


def test_factors_may_be_of_two_dtypes():
    y, x, lora_A, lora_B = given(3)
    for one, other in ((lora_A.half(), lora_B), (lora_A, lora_B.double())):
        found = torch.ops.lqlora.add_low_rank(y, x, one, other, 0.5)
        torch.testing.assert_close(found.double(), exact(y, x, one, other, 0.5), rtol=1e-5, atol=1e-5)


def test_factors_of_rank_zero_add_nothing_and_are_trained_all_the_same():
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    layer = LQLinear(lq.quantize(w, lq.BlockFormat.parse("nf4/8:float32")), torch.zeros(0, IN), torch.zeros(OUT, 0))
    x = given(3)[1]
    y = layer(x)
    torch.testing.assert_close(y.detach(), lq.matmul(x, layer.weight.array))
    y.sum().backward()
    assert layer.lora_A.grad.shape == (0, IN)
    assert layer.lora_B.grad.shape == (OUT, 0)


WRONG = {
    "columns": (lambda y, x, a, b: (y, x[:, 1:], a, b), InvalidArgumentError, "y, x, .* must have shapes"),
    "rows": (lambda y, x, a, b: (y[1:], x, a, b), InvalidArgumentError, "y, x, .* must have shapes"),
    "ranks": (lambda y, x, a, b: (y, x, a[1:], b), InvalidArgumentError, r"\(4, 12\), \(4, 20\), \(2, 20\), \(12, 3\)"),
    "a vector": (lambda y, x, a, b: (y, x, a[0], b), InvalidArgumentError, "y, x, .* must have shapes"),
    "a number": (lambda y, x, a, b: (y[0, 0], x, a, b), InvalidArgumentError, "y, x, .* must have shapes"),
    "two dtypes": (
        lambda y, x, a, b: (y.half(), x, a, b),
        InvalidArgumentError,
        "one dtype, .*float16 and .*float32",
    ),
    "integers": (lambda y, x, a, b: (y.int(), x.int(), a, b), UnsupportedArrayError, "y must be .* torch.int32"),
    "whole factors": (lambda y, x, a, b: (y, x, a.int(), b), UnsupportedArrayError, "lora_A must be .* torch.int32"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_by_a_sentence(device, case, grad):
    wrong, error, sentence = WRONG[case]
    with pytest.raises(error, match=sentence):
        torch.ops.lqlora.add_low_rank(*wrong(*(t.to(device).requires_grad_(grad) for t in given(4))), 1.0)


def test_tensors_of_two_devices_are_refused():
    y, x, lora_A, lora_B = given(4)
    with pytest.raises(MixedArraysError, match="cpu and meta"):
        torch.ops.lqlora.add_low_rank(y, x, lora_A.to("meta"), lora_B, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_the_same_with_gradients_and_without(dtype):
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    _, x, lora_A, lora_B = given(5, dtype=dtype, factors=torch.float32)
    layer = LQLinear(lq.quantize(w, lq.BlockFormat.parse("nf4/8:float32")), lora_A, lora_B, 0.5)
    trained = layer(x)
    with torch.inference_mode():
        found = layer(x)
    assert trained.requires_grad
    torch.testing.assert_close(found, trained.detach(), rtol=4 * EPS[dtype], atol=8 * EPS[dtype])
