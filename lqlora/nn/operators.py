"""Torch operators ``torch.ops.lqlora.quantize``, ``.dequantize``, ``.matmul``, ``.linear`` and ``.embedding``.

Each operator is one node of a graph, so a compiler does not trace its inside. Importing :mod:`lqlora.nn` registers them.
They run :func:`lqlora.quantize` and the functions like it, which choose the fastest implementation for their arrays.

They are registered below ``torch.library.custom_op`` and ``register_autograd``. Those check more in every call, and where
there is a gradient they take lists of tensors apart and join them again; ``benchmarks/operators.py`` measures the cost.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.autograd import Function, forward_ad
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional

from lqlora import ops
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from lqlora.nn.operator_arguments import check_tensors, described, from_operands, read_format, stored_tensors
from lqlora.quantized import dequantize, quantize
from lqlora.quantized._rotation import product
from lqlora.quantized._rows import decode_rows
from lqlora.quantized.quantization import multiply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from lqlora.formats import BlockFormat
    from lqlora.nn.operator_arguments import Operands
    from lqlora.quantized import Fit, QuantizedArray

    Tensor: TypeAlias = torch.Tensor

__all__ = [
    "as_given",
    "below_autograd",
    "in_autocast_dtype",
    "is_autocast",
    "linear_with_dropout",
    "require_one_process",
]

#: Kinds of devices that have autocast; asking about others is an error.
_HAVE_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "ipu", "xla") if torch.amp.is_autocast_available(kind)
)

_FLOATS = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}
_WIDE = (torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_NO_CONTEXT = nullcontext()

#: The transposed product decodes a weight of more entries a few rows at a time, this many entries in one step.
_LARGE, _STEP = 2**24, 2**20

# Lengths are SymInt, because a compiler may trace a model for shapes that it does not know yet. Format and codebook are
# strings, which a graph holds as constants.
_library = torch.library.Library("lqlora", "DEF")
for _schema in (
    "quantize(Tensor w, str fmt, str? codebook=None, *, str fit='absmax', int batch_dims=0) -> Tensor[]",
    "dequantize(Tensor[] weight, str fmt, SymInt[] shape, str? codebook=None, *, ScalarType dtype=float) -> Tensor",
    "matmul(Tensor x, Tensor[] weight, str fmt, SymInt[] shape, str? codebook=None, *, bool adjoint=False) -> Tensor",
    (
        "linear(Tensor x, Tensor[] weight, str fmt, SymInt[] shape, str? codebook, Tensor lora_A, Tensor lora_B, float scaling)"
        " -> Tensor"
    ),
    "embedding(Tensor ids, Tensor[] weight, str fmt, SymInt[] shape, str? codebook=None, *, ScalarType dtype=float) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def is_autocast(kind: str) -> bool:
    """Return whether autocast is on. Compilers can trace this function, unlike some of torch's own.

    Parameters
    ----------
    kind : str
        Type of a device, such as ``"cuda"``.

    Returns
    -------
    bool
        False for kinds of devices without autocast.
    """
    return kind in _HAVE_AUTOCAST and torch.is_autocast_enabled(kind)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Return the input of a layer in the dtype of autocast, if autocast is on.

    Parameters
    ----------
    x : Tensor
        Input.

    Returns
    -------
    Tensor
        The input, or a cast one with its graph.

    Raises
    ------
    InvalidArgumentError
        If the input is spread over several processes.
    """
    if type(x) is not torch.Tensor:
        require_one_process(x, "x")
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if is_autocast(kind) else x


def require_one_process(tensor: Tensor, name: str) -> None:
    """Raise if a tensor is spread over several processes, as a DTensor of torch: operators of quantized weights do not take it.

    Parameters
    ----------
    tensor : Tensor
        Input of a layer.
    name : str
        Name of the argument.

    Raises
    ------
    InvalidArgumentError
        If it is.
    """
    if hasattr(tensor, "full_tensor"):
        raise InvalidArgumentError(
            f"{name} of a quantized layer must be a tensor of one process, got a DTensor of shape {tuple(tensor.shape)}. Quantized layers have no "
            "tensor parallelism. Pass its to_local() or full_tensor(), or leave the layer dense."
        )


def linear_with_dropout(
    x: Tensor, weight: Operands, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Return the product with a quantized weight, plus that of its low-rank part with a part of the input.

    Parameters
    ----------
    x : Tensor, shape (..., n)
        Floating-point rows.
    weight : Operands
        Quantized weight of shape (m, n).
    lora_A, lora_B : Tensor, shape (rank, n) and (m, rank)
        Low-rank factors.
    scaling : float
        Factor of the low-rank part.
    dropout : float
        Probability with which an entry of ``x`` is set to zero for the low-rank part. The others are divided by
        ``1 - dropout``.

    Returns
    -------
    Tensor, shape (..., m)
        Sum of both products in the dtype of ``x``.
    """
    # The operator `linear` has one input for both parts, so the parts are computed one by one, as in its gradient.
    y = torch.ops.lqlora.matmul(x, *weight)
    with as_given(x):
        return _added(y, functional.dropout(x, dropout), lora_A.to(x.dtype), lora_B.to(x.dtype), scaling)


def as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, which would change the dtypes of the factors of a product.

    Parameters
    ----------
    x : Tensor
        Factor whose device counts.

    Returns
    -------
    context manager
        One that does nothing if autocast is off.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if is_autocast(kind) else _NO_CONTEXT


def _quantize(
    w: Tensor, fmt: str, codebook: str | None = None, *, fit: Fit = "absmax", batch_dims: int = 0
) -> list[Tensor]:
    own = _storing(fmt, codebook, fit)
    return list(quantize(w, own, fit=fit, batch_dims=batch_dims).to_arrays().values())


def _quantize_fake(
    w: Tensor, fmt: str, codebook: str | None = None, *, fit: Fit = "absmax", batch_dims: int = 0
) -> list[Tensor]:
    stored = stored_tensors(_storing(fmt, codebook, fit), w.shape, batch_dims)
    _name_of(w.dtype, "w")
    return [w.new_empty(shape, dtype=dtype) for dtype, shape in stored.values()]


def _storing(fmt: str, codebook: str | None, fit: Fit) -> BlockFormat:
    """Parse a format; raise unless it says ``+fit`` where levels are fitted.

    The operator returns tensors only, so the caller knows the format from this text alone.
    """
    own = read_format(fmt, codebook)
    if fit == "levels+scale" and own.levels == "codebook":
        raise InvalidArgumentError(
            f"fmt must contain '+fit' for fit='levels+scale', such as 'nf4+fit/64:float32', got {fmt}."
        )
    return own


def _dequantize(
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    dense: Tensor = dequantize(from_operands(weight, fmt, shape, codebook), dtype=_name_of(dtype, "dtype"))
    return dense


def _dequantize_fake(
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    _check_fake(weight, fmt, shape, codebook)
    _name_of(dtype, "dtype")
    return weight[0].new_empty(shape, dtype=dtype)


def _matmul(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    adjoint: bool = False,
) -> Tensor:
    q = from_operands(weight, fmt, shape, codebook)
    _check_rows(x, weight, shape, adjoint=adjoint)
    with as_given(x):
        y: Tensor = product(x, q, _adjoint_product, adjoint=True) if adjoint else multiply(x, q)
    # The fake implementation promises a contiguous result, and compiled code reads the result by those strides.
    return y.contiguous()


def _adjoint_product(x: Tensor, q: QuantizedArray) -> Tensor:
    """Return ``x @ dequantize(q)``. The dense matrix of a large weight, such as an output embedding, never exists."""
    rows, columns = q.shape
    if rows * columns <= _LARGE or q.format.couples_rows:
        dtype = getattr(torch, ops.factor_dtype(x))
        # Blocks down the columns are written where they are in a matrix that lies column by column.
        memory = torch.empty((columns, rows), dtype=dtype, device=x.device).T if q.format.axis in (0, -2) else None
        dense: Tensor = ops.matmul_dense(x, dequantize(q, out=memory, dtype=ops.factor_dtype(x)).T)
        return dense
    flat, step, dtype = x.reshape(-1, rows), max(1, _STEP // columns), ops.factor_dtype(x)
    # Partial products are summed in at least float32. In host memory they are not rounded before.
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros((len(flat), columns), dtype=wide, device=x.device)
    for start in range(0, rows, step):
        index = torch.arange(start, min(start + step, rows), device=x.device)
        part = flat[:, start : start + step].to(wide if x.is_cpu else x.dtype)
        total += ops.matmul_dense(part, decode_rows(q, index, dtype).T)
    return total.to(x.dtype).reshape(*x.shape[:-1], columns)


def _embedding(
    ids: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    q = from_operands(weight, fmt, shape, codebook)
    _check_ids(ids, weight, shape)
    rows: Tensor = decode_rows(q, ids.reshape(-1).to(torch.int64), _name_of(dtype, "dtype"))
    return rows.reshape(*ids.shape, shape[1])


def _embedding_fake(
    ids: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    _check_fake(weight, fmt, shape, codebook)
    _check_ids(ids, weight, shape)
    _name_of(dtype, "dtype")
    return weight[0].new_empty((*ids.shape, shape[1]), dtype=dtype)


def _check_ids(ids: Tensor, weight: Sequence[Tensor], shape: Sequence[int]) -> None:
    if ids.dtype not in _INTEGERS:
        raise UnsupportedArrayError(f"ids must be int32 or int64, got {ids.dtype}.")
    if len(shape) != 2 or weight[0].dim() != 1:
        raise InvalidArgumentError(f"weight must be a matrix, got shape {tuple(shape)}.")
    if ids.device != weight[0].device:
        raise MixedArraysError(
            f"ids and weight must be on one device, got {ids.device} and {weight[0].device}. Move one."
        )


def _matmul_fake(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    adjoint: bool = False,
) -> Tensor:
    _check_fake(weight, fmt, shape, codebook)
    _check_rows(x, weight, shape, adjoint=adjoint)
    return x.new_empty((*x.shape[:-1], shape[1 if adjoint else 0]))


def _check_fake(weight: Sequence[Tensor], fmt: str, shape: Sequence[int], codebook: str | None) -> None:
    batch_dims = weight[0].dim() - 1 if weight else 0
    check_tensors(weight, stored_tensors(read_format(fmt, codebook), shape, batch_dims), fmt)


def _check_rows(x: Tensor, weight: Sequence[Tensor], shape: Sequence[int], *, adjoint: bool) -> None:
    _name_of(x.dtype, "x")
    if len(shape) != 2 or weight[0].dim() != 1 or not x.dim() or x.shape[-1] != shape[0 if adjoint else 1]:
        side = "rows" if adjoint else "columns"
        raise InvalidArgumentError(
            f"x must have as many entries on its last axis as the weight has {side}, and the weight must be a matrix, "
            f"got shapes {tuple(x.shape)} and {tuple(shape)}."
        )
    if x.device != weight[0].device:
        raise MixedArraysError(f"x and weight must be on one device, got {x.device} and {weight[0].device}. Move one.")


def _name_of(dtype: torch.dtype, what: str) -> str:
    if dtype not in _FLOATS:
        raise UnsupportedArrayError(f"{what} must be float16, bfloat16, float32 or float64, got {dtype}.")
    return _FLOATS[dtype]


class _Matmul(Function):
    """Product with a packed weight. Gradients are multiplied by its transpose, tangents by the weight itself."""

    # y = x W^T is linear in x, so dL/dx = dL/dy W, and the tangent of y is that of x times W^T. Neither needs x. Only a
    # gradient of the weight would, and the weight is frozen. So the packed tensors alone are saved, which exist anyway.
    # They are arguments one by one, because autograd does not look into lists. backward() and jvp() call the operator,
    # not its kernel, so that they can be differentiated again.

    @staticmethod
    def forward(ctx: Any, x: Tensor, description: tuple[Any, ...], adjoint: bool, *weight: Tensor) -> Tensor:  # noqa: FBT001 - apply() takes no keywords
        ctx.save_for_backward(*weight)
        ctx.save_for_forward(*weight)
        ctx.description, ctx.adjoint = description, adjoint
        y: Tensor = below_autograd(torch.ops.lqlora.matmul, x, list(weight), *description, adjoint=adjoint)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight = list(ctx.saved_tensors)
        grad = torch.ops.lqlora.matmul(*grads, weight, *ctx.description, adjoint=not ctx.adjoint)
        return grad, None, None, *[None] * len(weight)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        weight = list(ctx.saved_tensors)
        y: Tensor = torch.ops.lqlora.matmul(tangents[0], weight, *ctx.description, adjoint=ctx.adjoint)
        return y


def _matmul_autograd(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    adjoint: bool = False,
) -> Tensor:
    if (x.requires_grad and torch.is_grad_enabled()) or _have_tangents(x):
        y: Tensor = _Matmul.apply(x, (fmt, shape, codebook), adjoint, *weight)  # type: ignore[no-untyped-call]
    else:
        y = below_autograd(torch.ops.lqlora.matmul, x, weight, fmt, shape, codebook, adjoint=adjoint)
    return y


def _have_tangents(*tensors: Tensor) -> bool:
    """Return whether one of the tensors has a tangent of forward-mode differentiation."""
    # Outside of dual_level() the level is -1, and no tensor has a tangent.
    return forward_ad._current_level >= 0 and any(unpack_dual(t).tangent is not None for t in tensors)  # noqa: SLF001 - unpack_dual() reads it too


def _linear(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    own = described(weight, fmt, shape, codebook)
    _check_rows(x, weight, shape, adjoint=False)
    _check_factors(x, shape, lora_A, lora_B)
    planned = None if own.linear is None else own.linear(x, weight, lora_A, lora_B, scaling)
    if planned is not None:
        return planned
    q = own.array(weight)
    with as_given(x):
        y = multiply(x, q)
        if x.dtype == lora_A.dtype == lora_B.dtype and x.dtype in _WIDE and x.is_cpu:
            return _added(y, x, lora_A, lora_B, scaling)  # the same as the operation, without a dispatch
        total: Tensor = ops.add_low_rank(y, x.contiguous(), lora_A, lora_B, scaling)
    return total


def _added(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor, scaling: float) -> Tensor:
    # Not torch.add with alpha=scaling: the compiler Inductor of torch 2.13 fused that into a product with wrong numbers.
    low_rank = functional.linear(functional.linear(x, inner), outer)
    return y + (low_rank if scaling == 1 else low_rank * scaling)


def _linear_fake(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,  # noqa: ARG001 - changes no shape
) -> Tensor:
    y = _matmul_fake(x, weight, fmt, shape, codebook)
    _check_factors(x, shape, lora_A, lora_B)
    return y


def _check_factors(x: Tensor, shape: Sequence[int], lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise unless the factors fit the weight. Every call compares shapes; a message is built only if one differs."""
    of_a, of_b = lora_A.shape, lora_B.shape
    if len(of_a) != 2 or of_a[1] != shape[1] or of_b != (shape[0], of_a[0]):
        expected, found = f"({shape[0]}, rank) and (rank, {shape[1]})", f"{tuple(of_b)} and {tuple(of_a)}"
        raise InvalidArgumentError(f"lora_B and lora_A must have shapes {expected}, got {found}.")
    if lora_A.dtype not in _FLOATS or lora_B.dtype not in _FLOATS:
        _name_of(lora_A.dtype, "lora_A")
        _name_of(lora_B.dtype, "lora_B")
    if not x.device == lora_A.device == lora_B.device:
        devices = dict.fromkeys(str(tensor.device) for tensor in (x, lora_A, lora_B))
        raise MixedArraysError(f"x, lora_A and lora_B must be on one device, got {' and '.join(devices)}. Move some.")


def _linear_autograd(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """Use torch's products if a gradient is needed: they save fewer tensors than a custom autograd function."""
    given = x, lora_A, lora_B
    if (torch.is_grad_enabled() and any(t.requires_grad for t in given)) or _have_tangents(*given):
        y = _matmul_autograd(x, weight, fmt, shape, codebook)
        _check_factors(x, shape, lora_A, lora_B)
        inner, outer = lora_A.to(x.dtype), lora_B.to(x.dtype)
        with as_given(x):
            return _added(y, x, inner, outer, scaling)
    total: Tensor = below_autograd(torch.ops.lqlora.linear, x, weight, fmt, shape, codebook, lora_A, lora_B, scaling)
    return total


def below_autograd(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator below autograd, from its autograd kernel.

    Parameters
    ----------
    operator : callable
        Operator of ``torch.ops``.
    *args, **kwargs
        Its arguments.

    Returns
    -------
    object
        Its result, which has no history.
    """
    # Without this guard the call would come back to the autograd kernel it was made from, without end.
    with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001 - what torch.library.register_autograd does
        return operator(*args, **kwargs)


def _without_gradient(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: below_autograd(operator, *args, **kwargs)


# "CompositeExplicitAutograd" stands for every device, below autograd; "Autograd" stands for the autograd key of every device.
# A single kernel under "CompositeImplicitAutograd" would serve both, but compilers would then trace through it.
for _name, _kernel, _fake, _autograd in (
    ("quantize", _quantize, _quantize_fake, _without_gradient(torch.ops.lqlora.quantize)),
    ("dequantize", _dequantize, _dequantize_fake, _without_gradient(torch.ops.lqlora.dequantize)),
    ("matmul", _matmul, _matmul_fake, _matmul_autograd),
    ("linear", _linear, _linear_fake, _linear_autograd),
    ("embedding", _embedding, _embedding_fake, _without_gradient(torch.ops.lqlora.embedding)),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"lqlora::{_name}", _fake, lib=_library)
