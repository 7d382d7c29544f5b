"""Torch operators ``torch.ops.lqlora.scaled_matmul`` and ``.scale_gradient``: products that are differentiated by scales.

A weight is ``scale * unit``: the unit weight of a code is its level, or the difference of code and zero point. So a product
is linear in the scales, and the gradient of a scale is the sum over its block of the gradient of the weight times the unit.
Importing :mod:`lqlora.nn` registers the operators.
"""

from __future__ import annotations

from math import gcd, lcm
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional

from lqlora import ops
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from lqlora.nn.operator_arguments import check_tensors, from_operands, read_format, stored_tensors
from lqlora.nn.operators import as_given, below_autograd
from lqlora.nn.sharding import unlocked
from lqlora.quantized._decoding import host_levels, zero_point_codes
from lqlora.quantized._layout import layout_of
from lqlora.quantized._rotation import as_stored, product
from lqlora.quantized._trellis import decode_piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lqlora.quantized import QuantizedArray
    from lqlora.quantized._layout import Layout

    Tensor: TypeAlias = torch.Tensor

__all__: list[str] = []

#: Entries of the gradient of a weight that exist at a time: enough for fast products, few enough for caches of a host.
_CHUNK_ON_HOST, _CHUNK = 2**20, 2**24

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WIDE = (torch.float32, torch.float64)

# The frozen tensors are those of QuantizedArray.to_arrays without the scales. The format has float32 scales.
_library = torch.library.Library("lqlora", "FRAGMENT")
for _schema in (
    (
        "scaled_matmul(Tensor x, Tensor scales, Tensor[] frozen, str fmt, SymInt[] shape, str? codebook=None, *,"
        " bool adjoint=False) -> Tensor"
    ),
    "scale_gradient(Tensor rows, Tensor x, Tensor[] frozen, str fmt, SymInt[] shape, str? codebook=None) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _scaled_matmul(
    x: Tensor,
    scales: Tensor,
    frozen: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    adjoint: bool = False,
) -> Tensor:
    _check_product(x, scales, shape, adjoint=adjoint)
    if scales.dtype == torch.float32:
        weight = [*frozen[:1], unlocked(scales.detach()), *frozen[1:]]
        y: Tensor = torch.ops.lqlora.matmul(x, weight, fmt, shape, codebook, adjoint=adjoint)
        return y
    # No format stores float64 scales. They serve derivatives by differences, which float32 is too coarse for.
    q = _with_unit_scales(x, frozen, fmt, shape, codebook)
    if scales.shape != q.scales.shape:
        raise InvalidArgumentError(f"scales must have shape {tuple(q.scales.shape)}, got {tuple(scales.shape)}.")

    def multiply(x: Tensor, q: QuantizedArray) -> Tensor:
        dense = torch.empty(_lines(q), dtype=torch.float64, device=x.device)
        for part, blocks, units in _units(q):
            dense[part] = _unpadded(units.double() * scales.detach()[blocks, None], q, part)
        matrix = (dense.T if _is_down(q) else dense).to(x.dtype)
        return functional.linear(x, matrix.T if adjoint else matrix)

    with as_given(x):
        return product(x, q, multiply, adjoint=adjoint).contiguous()  # type: ignore[no-any-return]


def _scaled_matmul_fake(
    x: Tensor,
    scales: Tensor,
    frozen: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    adjoint: bool = False,
) -> Tensor:
    _check_product(x, scales, shape, adjoint=adjoint)
    _check_fake(frozen, scales.float(), fmt, shape, codebook)
    return x.new_empty((*x.shape[:-1], shape[1 if adjoint else 0]))


def _scale_gradient(
    rows: Tensor, x: Tensor, frozen: Sequence[Tensor], fmt: str, shape: Sequence[int], codebook: str | None = None
) -> Tensor:
    # With y = x W^T and W = s_b u in block b, dL/ds_b = sum over (i, j) in b of (dL/dW)_ij u_ij, and dL/dW = (dL/dy)^T x. Rows
    # of dL/dW are made a few at a time, so that it never exists as a whole.
    _check_pair(rows, x, shape)
    q = _with_unit_scales(x, frozen, fmt, shape, codebook)
    wide = _wide(rows, x)
    if q.format.rotation is not None:
        # W = R_m^T W' R_n, so that dL/dW' = R_m (dL/dW) R_n^T: the product of rotated rows.
        seeds, q = q.format.rotation.seeds, as_stored(q)
        rows = ops.rotate_rows(rows.to(wide), seeds[-2]) if -2 in seeds else rows
        x = ops.rotate_rows(x.to(wide), seeds[-1]) if -1 in seeds else x
    left, right = rows.reshape(-1, shape[0]).to(wide), x.reshape(-1, shape[1]).to(wide)
    if _is_down(q):
        left, right = right, left
    found = torch.zeros(q.scales.shape, dtype=wide, device=x.device)
    with as_given(x):
        for part, blocks, units in _units(q):
            products = _padded(left.T[part] @ right, q, part)
            found[blocks] += products.mul_(units).sum(1)
    return found


def _scale_gradient_fake(
    rows: Tensor, x: Tensor, frozen: Sequence[Tensor], fmt: str, shape: Sequence[int], codebook: str | None = None
) -> Tensor:
    _check_pair(rows, x, shape)
    blocks = read_format(fmt, codebook).blocks(shape)
    scales = x.new_empty((blocks,), dtype=torch.float32)
    _check_fake(frozen, scales, fmt, shape, codebook)
    return scales.to(_wide(rows, x))


def _wide(rows: Tensor, x: Tensor) -> torch.dtype:
    """Return the dtype that a gradient is summed in: half precisions have too few digits for sums of many terms."""
    return torch.float64 if torch.float64 in (rows.dtype, x.dtype) else torch.float32


def _with_unit_scales(
    like: Tensor, frozen: Sequence[Tensor], fmt: str, shape: Sequence[int], codebook: str | None
) -> QuantizedArray:
    """Return the checked quantized array of frozen tensors, with all scales 1."""
    blocks = read_format(fmt, codebook).blocks(shape)
    ones = torch.ones(blocks, dtype=torch.float32, device=like.device)
    return from_operands([*frozen[:1], ones, *frozen[1:]], fmt, shape, codebook)


def _is_down(q: QuantizedArray) -> bool:
    """Return whether blocks run down the columns of the matrix."""
    return q.format.axis in (0, -2)


def _lines(q: QuantizedArray) -> tuple[int, int]:
    """Return the shape of the matrix, transposed if blocks run down its columns. Its rows are in block order then."""
    rows, columns = q.shape
    return (columns, rows) if _is_down(q) else (rows, columns)


def _units(q: QuantizedArray) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield a few rows of :func:`_lines` at a time, the range of their blocks, and the unit weights of each block as a row.

    Blocks that begin before the rows, or end after them, are filled up with other values.
    """
    layout, (count, length) = layout_of(q.format, q.shape), _lines(q)
    table = host_levels(q.levels, layout.codebook)
    zeros = zero_point_codes(q)
    # Eight rows begin where a byte of the packed codes does, whatever the length of a row. Trellis codes are decoded block by
    # block, so that as many rows are taken as are whole blocks.
    unit = lcm(8, layout.block_size // gcd(layout.block_size, length)) if layout.is_trellis and layout.is_even else 8
    step = unit * max(1, (_CHUNK_ON_HOST if q.packed.is_cpu else _CHUNK) // unit // max(1, length))
    for first in range(0, count if length else 0, step):
        part = slice(first, min(first + step, count))
        flat = _unit_weights(q, layout, table, slice(first * length, part.stop * length))
        units, blocks = _padded(flat.view(-1, length), q, part), _blocks(q, part)
        if zeros is not None:
            units.sub_(zeros[blocks, None])  # they are a new array
        yield part, blocks, units


def _unit_weights(q: QuantizedArray, layout: Layout, table: Any, weights: slice) -> Tensor:
    """Return the levels of a range of codes in block order, which begins with a whole byte."""
    packed, count = q.packed[layout.bytes_of(weights)], weights.stop - weights.start
    if layout.is_trellis or table is not None:
        flat = torch.empty(count, dtype=torch.float32, device=packed.device)
    if layout.is_trellis:
        lines = count // layout.length
        blocks = -(-count // layout.block_size) if layout.is_even else lines * layout.blocks_per_line
        ones = torch.ones(blocks, dtype=torch.float32, device=packed.device)
        decode_piece(layout, q.packed, ones, (weights, slice(0, blocks)), flat)
        return flat
    if table is not None:
        one = torch.ones(1, dtype=torch.float32, device=packed.device)
        ops.decode(ops.PackedBlocks(packed, one, None, table, layout.bits, count), flat)
        return flat
    sets = layout.sets_of(weights, packed)
    codes = ops.unpack_codes(packed, layout.bits, count).view(len(sets), -1)
    found: Tensor = ops.values_by_row(codes, q.levels, sets)
    return found.view(-1)


def _blocks(q: QuantizedArray, part: slice) -> slice:
    """Return the range of blocks that rows of :func:`_lines` have a part of."""
    layout, (_, length) = layout_of(q.format, q.shape), _lines(q)
    if layout.is_even:
        return slice(part.start * length // layout.block_size, -(-part.stop * length // layout.block_size))
    return slice(part.start * layout.blocks_per_line, part.stop * layout.blocks_per_line)


def _padding(q: QuantizedArray, part: slice) -> tuple[int, int]:
    """Return the numbers of entries that blocks have before and after rows, or after each row if rows end in short blocks."""
    layout, (_, length) = layout_of(q.format, q.shape), _lines(q)
    if layout.is_even:
        return part.start * length % layout.block_size, -part.stop * length % layout.block_size
    return 0, -length % layout.block_size


def _padded(rows: Tensor, q: QuantizedArray, part: slice) -> Tensor:
    """Return rows of :func:`_lines` as rows of whole blocks, filled up with zeros."""
    layout, padding = layout_of(q.format, q.shape), _padding(q, part)
    flat = rows.reshape(-1) if layout.is_even else rows
    return (functional.pad(flat, padding) if any(padding) else flat).reshape(-1, layout.block_size)


def _unpadded(blocks: Tensor, q: QuantizedArray, part: slice) -> Tensor:
    """Return rows of whole blocks as rows of :func:`_lines`: the inverse of :func:`_padded`."""
    layout, (before, after), (_, length) = layout_of(q.format, q.shape), _padding(q, part), _lines(q)
    if layout.is_even:
        flat = blocks.reshape(-1)
        return flat[before : len(flat) - after].view(-1, length)
    return blocks.reshape(part.stop - part.start, -1)[:, :length]


def _check_product(x: Tensor, scales: Tensor, shape: Sequence[int], *, adjoint: bool) -> None:
    _check_floats(x=x)
    if scales.dtype not in _WIDE:
        raise UnsupportedArrayError(f"scales must be float32 or float64, got {scales.dtype}.")
    if len(shape) != 2 or not x.dim() or x.shape[-1] != shape[0 if adjoint else 1]:
        raise InvalidArgumentError(
            f"x must have as many entries on its last axis as the weight has {'rows' if adjoint else 'columns'}, and the weight "
            f"must be a matrix, got shapes {tuple(x.shape)} and {tuple(shape)}."
        )
    _check_devices(x=x, scales=scales)


def _check_pair(rows: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    _check_floats(rows=rows, x=x)
    lengths = len(shape) == 2 and rows.dim() and x.dim() and (rows.shape[-1], x.shape[-1]) == tuple(shape)
    if not lengths or rows.shape[:-1] != x.shape[:-1]:
        raise InvalidArgumentError(
            f"rows and x must have shapes (..., m) and (..., n) for a weight of shape (m, n), got {tuple(rows.shape)} and "
            f"{tuple(x.shape)} for {tuple(shape)}."
        )
    _check_devices(rows=rows, x=x)


def _check_floats(**given: Tensor) -> None:
    for name, tensor in given.items():
        if tensor.dtype not in _FLOATS:
            raise UnsupportedArrayError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")


def _check_devices(**given: Tensor) -> None:
    devices = dict.fromkeys(str(tensor.device) for tensor in given.values())
    if len(devices) > 1:
        raise MixedArraysError(f"{' and '.join(given)} must be on one device, got {' and '.join(devices)}. Move one.")


def _check_fake(frozen: Sequence[Tensor], scales: Tensor, fmt: str, shape: Sequence[int], codebook: str | None) -> None:
    weight = [*frozen[:1], scales, *frozen[1:]]
    check_tensors(weight, stored_tensors(read_format(fmt, codebook), shape), fmt)


class _ScaledMatmul(Function):
    """Product with a weight of trainable scales. Both derivatives are products of this kind, or their scale gradients."""

    # y = x W(s)^T is linear in x and in s, and W(s) is never saved: the packed codes, the scales and x are. backward() and
    # jvp() call the operators, not their kernels, so that they can be differentiated again.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor,
        description: tuple[Any, ...],
        adjoint: bool,  # noqa: FBT001 - apply() takes no keywords
        *frozen: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scales, *frozen)
        ctx.save_for_forward(x, scales, *frozen)
        ctx.description, ctx.adjoint = description, adjoint
        y: Tensor = below_autograd(
            torch.ops.lqlora.scaled_matmul, x, scales, list(frozen), *description, adjoint=adjoint
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, scales, *frozen) = grads, ctx.saved_tensors
        of_x, of_scales = None, None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.lqlora.scaled_matmul(grad, scales, frozen, *ctx.description, adjoint=not ctx.adjoint)
        if ctx.needs_input_grad[1]:
            rows, inputs = (x, grad) if ctx.adjoint else (grad, x)
            of_scales = torch.ops.lqlora.scale_gradient(rows, inputs, frozen, *ctx.description).to(scales.dtype)
        return of_x, of_scales, None, None, *[None] * len(frozen)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, scales, *frozen = ctx.saved_tensors
        parts = [(tangents[0], scales), (x, tangents[1])]
        found = [
            torch.ops.lqlora.scaled_matmul(inputs, own, frozen, *ctx.description, adjoint=ctx.adjoint)
            for inputs, own in parts
            if inputs is not None and own is not None
        ]
        total: Tensor = found[0] if len(found) == 1 else found[0] + found[1]
        return total


class _ScaleGradient(Function):
    """Gradient of scales, which is linear in both of its arguments."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, x: Tensor, description: tuple[Any, ...], *frozen: Tensor) -> Tensor:
        ctx.save_for_backward(rows, x, *frozen)
        ctx.save_for_forward(rows, x, *frozen)
        ctx.description = description
        found: Tensor = below_autograd(torch.ops.lqlora.scale_gradient, rows, x, list(frozen), *description)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, x, *frozen) = grads, ctx.saved_tensors
        of_rows, of_x = None, None
        if ctx.needs_input_grad[0]:
            of_rows = torch.ops.lqlora.scaled_matmul(x, grad, frozen, *ctx.description).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            of_x = torch.ops.lqlora.scaled_matmul(rows, grad, frozen, *ctx.description, adjoint=True).to(x.dtype)
        return of_rows, of_x, None, *[None] * len(frozen)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        rows, x, *frozen = ctx.saved_tensors
        found = [
            torch.ops.lqlora.scale_gradient(*pair, frozen, *ctx.description)
            for pair in ((tangents[0], x), (rows, tangents[1]))
            if pair[0] is not None and pair[1] is not None
        ]
        total: Tensor = found[0] if len(found) == 1 else found[0] + found[1]
        return total


def _scaled_matmul_autograd(
    x: Tensor,
    scales: Tensor,
    frozen: Sequence[Tensor],
    fmt: str,
    shape: Sequence[int],
    codebook: str | None = None,
    *,
    adjoint: bool = False,
) -> Tensor:
    if _is_followed(x, scales):
        y: Tensor = _ScaledMatmul.apply(x, scales, (fmt, shape, codebook), adjoint, *frozen)  # type: ignore[no-untyped-call]
    else:
        y = below_autograd(torch.ops.lqlora.scaled_matmul, x, scales, frozen, fmt, shape, codebook, adjoint=adjoint)
    return y


def _scale_gradient_autograd(
    rows: Tensor, x: Tensor, frozen: Sequence[Tensor], fmt: str, shape: Sequence[int], codebook: str | None = None
) -> Tensor:
    if _is_followed(rows, x):
        found: Tensor = _ScaleGradient.apply(rows, x, (fmt, shape, codebook), *frozen)  # type: ignore[no-untyped-call]
    else:
        found = below_autograd(torch.ops.lqlora.scale_gradient, rows, x, frozen, fmt, shape, codebook)
    return found


def _is_followed(*tensors: Tensor) -> bool:
    """Return whether a gradient or a tangent of tensors is needed."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return any(unpack_dual(tensor).tangent is not None for tensor in tensors)


def _register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]) -> None:
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"lqlora::{name}", fake, lib=_library)


_register("scaled_matmul", _scaled_matmul, _scaled_matmul_fake, _scaled_matmul_autograd)
_register("scale_gradient", _scale_gradient, _scale_gradient_fake, _scale_gradient_autograd)
