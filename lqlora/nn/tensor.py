"""``QuantizedTensor``: a quantized matrix with its low-rank part, as a tensor that torch dispatches on."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.nn import functional

from lqlora._annotations import annotated
from lqlora.errors import InvalidArgumentError
from lqlora.nn.operator_arguments import Operands, from_operands, operands
from lqlora.nn.operators import as_given, in_autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn

    from lqlora.quantized import QuantizedArray

__all__ = ["QuantizedTensor"]


class QuantizedTensor(torch.Tensor):
    """Frozen quantized matrix plus ``scaling * lora_B @ lora_A``, as a tensor that is never dense.

    :attr:`LQLinear.weight` is one, so that models which pass the weight of a layer to a function work, and train its factors.
    Products with it use the packed codes. Rows of it, its transpose, and single matrices of a stack are quantized tensors that
    share its memory. Other operations raise an error with their name; :meth:`dequantize` gives a dense tensor for them.

    Parameters
    ----------
    weight : Operands
        Quantized array of shape (m, n), or a stack of shape (experts, m, n), of torch tensors.
    lora_A, lora_B : Tensor, shape (rank, n) and (m, rank), optional
        Low-rank factors, with a first axis more for a stack. Gradients reach them, if they require gradients.
    scaling : float, default 1.0
        Factor of the low-rank part.
    dtype : torch.dtype, default torch.float32
        Dtype that the tensor shows. Nothing is stored in it.
    is_transposed : bool, default False
        Whether the tensor is the transpose of the matrix.

    Attributes
    ----------
    operands : Operands
        Quantized part, not transposed.
    factors : tuple of Tensor, or None
        ``lora_A`` and ``lora_B``, not transposed.
    scaling : float
        Factor of the low-rank part.
    is_transposed : bool
        Whether the tensor is the transpose of the matrix.

    Raises
    ------
    InvalidArgumentError
        If only one factor is given, or shapes do not fit.

    Notes
    -----
    A product has the dtype of its dense factor, whatever dtype the tensor shows, and under autocast that of autocast. The
    dispatch of torch on subclasses of tensors is what the authors of LQ-LoRA use, arXiv 2311.12023, section 3.4.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> layer = lq.nn.LQLinear(lq.quantize(torch.eye(4), lq.BlockFormat.parse("nf4/4:float32")), torch.ones(1, 4), torch.ones(4, 1))
    >>> torch.nn.functional.linear(torch.ones(1, 4), layer.weight).tolist()
    [[5.0, 5.0, 5.0, 5.0]]
    >>> layer.weight.t()[:, 0].tolist()
    [2.0, 1.0, 1.0, 1.0]
    """

    operands: Operands
    factors: tuple[torch.Tensor, torch.Tensor] | None
    scaling: float
    is_transposed: bool

    #: transformers leaves tensors with this mark as they are when it draws the parameters that no file has.
    _is_hf_initialized = True

    @staticmethod
    @annotated
    def __new__(  # noqa: PYI034 - torch makes the instance
        cls,
        weight: Operands,
        lora_A: torch.Tensor | None = None,
        lora_B: torch.Tensor | None = None,
        scaling: float = 1.0,
        *,
        dtype: torch.dtype = torch.float32,
        is_transposed: bool = False,
    ) -> QuantizedTensor:
        """Return the tensor; it has a history if a factor requires a gradient."""
        weight = Operands(list(weight.tensors), weight.fmt, tuple(weight.shape), weight.codebook)
        if lora_A is None or lora_B is None:
            if lora_A is not lora_B:
                raise InvalidArgumentError("lora_A and lora_B must be given both or not at all, got one.")
            return _wrapped(weight, None, scaling, dtype, is_transposed=is_transposed)
        *stack, rows, columns = weight.shape
        rank = lora_A.shape[-2] if lora_A.ndim > 1 else -1
        if lora_A.shape != (*stack, rank, columns) or lora_B.shape != (*stack, rows, rank):
            before = "".join(f"{length}, " for length in stack)
            raise InvalidArgumentError(
                f"lora_B and lora_A must have shapes ({before}{rows}, rank) and ({before}rank, {columns}), got "
                f"{tuple(lora_B.shape)} and {tuple(lora_A.shape)}."
            )
        if torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad):
            found: QuantizedTensor = _Sum.apply(lora_A, lora_B, weight, scaling, dtype, is_transposed)  # type: ignore[no-untyped-call]
            # The factors with their history: products send gradients to them directly.
            found.factors = lora_A, lora_B
            return found
        return _wrapped(weight, (lora_A, lora_B), scaling, dtype, is_transposed=is_transposed)

    @property
    def array(self) -> QuantizedArray:
        """Quantized part, not transposed. It shares the codes and scales, except those of offloaded layers on another device."""
        return from_operands(*self.operands)

    def dequantize(self) -> torch.Tensor:
        """Return the sum of both parts as a dense tensor in the dtype that the tensor shows.

        Returns
        -------
        Tensor
            Dense tensor of the same shape. Gradients reach the factors.
        """
        if _trains_scales(self) and torch.is_grad_enabled():
            raise InvalidArgumentError(
                "weight must not be made dense while its scales train, whose gradients would be lost. Use torch.no_grad(), or call "
                "freeze_scales first."
            )
        if _trains_itself(self):
            return cast("torch.Tensor", _Dense.apply(self))  # type: ignore[no-untyped-call]
        # In float32 until the end: both parts are rounded once.
        dense: torch.Tensor = torch.ops.lqlora.dequantize(*self.operands, dtype=_wide(self.dtype))
        if self.factors is not None:
            lora_A, lora_B = (factor.to(dense.dtype) for factor in self.factors)
            with as_given(dense):
                dense = dense + self.scaling * (lora_B @ lora_A)
        return (dense.mT if self.is_transposed else dense).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # torch types no argument
        """Show shape, format and rank."""
        rank = 0 if self.factors is None else self.factors[0].shape[-2]
        return f"QuantizedTensor({tuple(self.shape)}, {self.operands.fmt}, rank={rank}, dtype={self.dtype})"

    def share_memory_(self) -> NoReturn:
        """Raise: there is no memory of the tensor itself to share, and torch would end the process."""
        raise InvalidArgumentError(
            "share_memory_ must not be called with a QuantizedTensor. Share the module that has it."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        """Return a copy with memory of its own."""
        return cast("QuantizedTensor", memo.setdefault(id(self), self.detach().clone()))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """Return the names of the tensors inside, and the rest, for compilers."""
        names = [f"_stored_{index}" for index in range(len(self.operands.tensors))]
        vars(self).update(zip(names, self.operands.tensors, strict=True))
        if self.factors is not None:
            self._lora_A, self._lora_B = self.factors
            names += ["_lora_A", "_lora_B"]
        rest = (*self.operands[1:], self.factors is not None, self.scaling, self.dtype, self.is_transposed)
        return names, rest

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], rest: tuple[Any, ...], _: Sequence[int], __: Sequence[int]
    ) -> QuantizedTensor:
        """Return the tensor that :meth:`__tensor_flatten__` took apart."""
        fmt, shape, codebook, has_factors, scaling, dtype, is_transposed = rest
        tensors = [*inner.values()]
        factors = (inner["_lora_A"], inner["_lora_B"]) if has_factors else None
        weight = Operands(tensors[:-2] if has_factors else tensors, fmt, shape, codebook)
        return _wrapped(weight, factors, scaling, dtype, is_transposed=is_transposed)

    # Compilers trace a function that uses the tensor. Where they leave one out, this must not be traced on its own: it makes
    # tensors in two steps, and a trace breaks between them. torch.compiler.disable would import the compiler with this module.
    @classmethod
    @_disable_dynamo
    def __torch_function__(
        cls, func: Callable[..., Any], _: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run products and selections of rows above autograd, where gradients go to the factors and are never dense."""
        kwargs = kwargs or {}
        if (own := _ABOVE.get(func)) is not None:
            found = _called(own, args, kwargs)
            if found is not NotImplemented:
                return found
        # Not the method of torch.Tensor, which makes every result an instance of this class.
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - what torch documents for subclasses
            found = func(*args, **kwargs)
        if isinstance(found, QuantizedTensor) and found.grad_fn is not None and _trains_itself(found):
            # A copy of the first argument. The factors made below autograd have no history, so they are copied again.
            pairs = zip(args[0].factors or (), found.factors or (), strict=True)
            found.factors = cast("Any", tuple(own.to(made.device, copy=True) for own, made in pairs)) or None
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch types it as a function
        cls, func: Any, _: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation below autograd, or raise if there is none for quantized tensors."""
        own = _BELOW.get(func)
        # In inference mode torch does not take operations apart that consist of others.
        found = (func.decompose if own is None else own)(*args, **(kwargs or {}))
        if found is NotImplemented:
            raise InvalidArgumentError(
                f"{func} must not be called with a QuantizedTensor like this. Call it with tensor.dequantize(), which is dense."
            )
        return found


class _Sum(Function):
    """Sum of a frozen and a low-rank part, as a tensor. Operations without a shorter way send a dense gradient through it."""

    @staticmethod
    def forward(
        ctx: Any,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        weight: Operands,
        scaling: float,
        dtype: torch.dtype,
        is_transposed: bool,  # noqa: FBT001 - apply() takes no keywords
    ) -> QuantizedTensor:
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling, ctx.is_transposed = scaling, is_transposed
        return _wrapped(weight, (lora_A, lora_B), scaling, dtype, is_transposed=is_transposed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # W = Q + s B A, so dL/dA = s B^T G and dL/dB = s G A^T for G = dL/dW.
        lora_A, lora_B = ctx.saved_tensors
        gradient = (grads[0].mT if ctx.is_transposed else grads[0]).to(lora_A.dtype)
        return ctx.scaling * lora_B.mT @ gradient, ctx.scaling * gradient @ lora_A.mT, None, None, None, None


class _Dense(Function):
    """Dense values of a tensor that is trained itself."""

    @staticmethod
    def forward(_: Any, tensor: QuantizedTensor) -> torch.Tensor:
        return _detached(tensor).dequantize()

    @staticmethod
    def backward(_: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def _wrapped(
    weight: Operands,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
    dtype: torch.dtype,
    *,
    is_transposed: bool,
) -> QuantizedTensor:
    """Return a tensor without a history."""
    shape = (*weight.shape[:-2], *(weight.shape[:-3:-1] if is_transposed else weight.shape[-2:]))
    found: QuantizedTensor = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - what torch documents for subclasses
        QuantizedTensor, shape, dtype=dtype, device=weight.tensors[0].device
    )
    found.operands, found.factors = weight, factors
    found.scaling, found.is_transposed = scaling, is_transposed
    return found


def _like(
    tensor: QuantizedTensor, weight: Operands | None = None, factors: Any = ..., **changes: Any
) -> QuantizedTensor:
    """Return a tensor with some of its parts replaced, without a history."""
    return _wrapped(
        weight or tensor.operands,
        tensor.factors if factors is ... else factors,
        tensor.scaling,
        changes.get("dtype", tensor.dtype),
        is_transposed=changes.get("is_transposed", tensor.is_transposed),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Products.


def _times(x: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return ``x @ tensor`` for a single matrix. Gradients reach the input and the factors."""
    x = in_autocast_dtype(x)
    if not tensor.is_transposed or _trains_scales(tensor):
        # x (Q + s B A) = x Q + s (x B) A. The operator's adjoint is the product with Q itself.
        y = _times_quantized(x, tensor)
        if tensor.factors is None:
            return y
        lora_A, lora_B = (factor.to(x.dtype) for factor in tensor.factors)
        first, second = (lora_A.mT, lora_B.mT) if tensor.is_transposed else (lora_B, lora_A)
        with as_given(x):
            return y + tensor.scaling * ((x @ first) @ second)
    if tensor.factors is None:
        return cast("torch.Tensor", torch.ops.lqlora.matmul(x, *tensor.operands))
    return cast("torch.Tensor", torch.ops.lqlora.linear(x, *tensor.operands, *tensor.factors, tensor.scaling))


def _times_quantized(x: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return the product with the quantized part. Gradients reach the input, and scales that train."""
    adjoint = not tensor.is_transposed
    if not _trains_scales(tensor):
        return cast("torch.Tensor", torch.ops.lqlora.matmul(x, *tensor.operands, adjoint=adjoint))
    (codes, scales, *others), *described = tensor.operands
    return cast(
        "torch.Tensor", torch.ops.lqlora.scaled_matmul(x, scales, [codes, *others], *described, adjoint=adjoint)
    )


def _trains_scales(tensor: QuantizedTensor) -> bool:
    """Return whether the tensor is the weight of a layer with trainable scales, which follow the codes."""
    return tensor.operands.tensors[1].requires_grad


def _is_matrix(tensor: Any) -> bool:
    return isinstance(tensor, QuantizedTensor) and tensor.ndim == 2


def _called(own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function above autograd, unless gradients would miss the tensor or the function lacks an argument."""
    if kwargs:
        names = [name for name in _FACTORS if name in kwargs]
        args += tuple(kwargs[name] for name in names)
        kwargs = {name: value for name, value in kwargs.items() if name not in names}
        if kwargs.keys() - _KEYWORDS[own]:
            return NotImplemented
    if any(isinstance(tensor, QuantizedTensor) and _trains_itself(tensor) for tensor in args):
        return NotImplemented
    return own(*args, **kwargs)


def _trains_itself(tensor: QuantizedTensor) -> bool:
    """Return whether a gradient belongs to the tensor and not to its factors, as in copies and in leaves."""
    return tensor.requires_grad and not any(own.requires_grad for own in tensor.factors or ())


def _is_dense(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, QuantizedTensor)


def _turned(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the transpose, whose factors keep their history."""
    return _like(tensor, is_transposed=not tensor.is_transposed)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not _is_dense(x) or not _is_matrix(weight):
        return NotImplemented
    y = _times(x, _turned(weight))
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(left: Any, right: Any) -> Any:
    if _is_dense(left) and _is_matrix(right):
        return _times(left, right)
    if _is_matrix(left) and _is_dense(right):
        # W x = (x^T W^T)^T; a vector is its own transpose.
        return _times(right, _turned(left)) if right.ndim == 1 else _times(right.mT, _turned(left)).mT
    return NotImplemented


def _addmm(added: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _matmul(left, right)
    if product is NotImplemented or not _is_dense(added):
        return NotImplemented
    # As in torch, beta=0 ignores the values of the summand, even NaN.
    return beta * added.to(product.dtype) + alpha * product if beta else alpha * product


def _bmm(left: Any, right: Any) -> Any:
    if _is_dense(left) == _is_dense(right) or left.ndim != 3 or right.ndim != 3 or len(left) != len(right):
        return NotImplemented
    return torch.stack([_matmul(*pair) for pair in zip(left.unbind(), right.unbind(), strict=True)])


# Selections.


def _embedding(
    ids: Any,
    weight: Any,
    *,
    padding_idx: Any = None,  # noqa: ARG001 - changes the gradient of the weight, which is frozen; the next ones too
    max_norm: Any = None,
    norm_type: Any = None,  # noqa: ARG001
    scale_grad_by_freq: Any = None,  # noqa: ARG001
    sparse: Any = None,  # noqa: ARG001
) -> Any:
    """Return rows of a matrix without factors."""
    if not _is_matrix(weight) or weight.is_transposed or weight.factors is not None or max_norm is not None:
        return NotImplemented
    return torch.ops.lqlora.embedding(ids, *weight.operands, dtype=weight.dtype)


def _matrix_of_stack(tensor: QuantizedTensor, index: int) -> QuantizedTensor:
    weight = operands(tensor.array[index])
    return _rebuilt(tensor, weight, None if tensor.factors is None else [own[index] for own in tensor.factors])


def _rebuilt(tensor: QuantizedTensor, weight: Operands, factors: Sequence[torch.Tensor] | None) -> QuantizedTensor:
    lora_A, lora_B = factors or (None, None)
    return QuantizedTensor(
        weight, lora_A, lora_B, tensor.scaling, dtype=tensor.dtype, is_transposed=tensor.is_transposed
    )


def _rows(tensor: QuantizedTensor, start: int, stop: int) -> torch.Tensor:
    """Return rows of a matrix: a quantized tensor where they begin and end with blocks and bytes, else a dense one."""
    try:
        part = tensor.array.rows(start, stop)
    except InvalidArgumentError:
        return tensor.dequantize()[start:stop]
    factors = None if tensor.factors is None else (tensor.factors[0], tensor.factors[1][start:stop])
    return _rebuilt(tensor, operands(part), factors)


def _narrow(tensor: Any, dim: int, start: Any, length: int) -> Any:
    start = int(start)
    if not isinstance(tensor, QuantizedTensor) or tensor.ndim != 2:
        return NotImplemented
    if not -2 <= dim < 2 or not -len(tensor) <= start or length < 0:
        return tensor.dequantize().narrow(dim, start, length)  # which raises
    start += tensor.shape[dim] if start < 0 else 0
    if dim % 2 == 1:
        return _narrow(_turned(tensor), 0, start, length).mT
    if start + length > len(tensor) or tensor.is_transposed:
        return tensor.dequantize().narrow(0, start, length)
    return _rows(tensor, start, start + length)


def _getitem(tensor: Any, index: Any) -> Any:
    if not isinstance(tensor, QuantizedTensor):
        return NotImplemented
    # Models of experts index a stack by tensors without dimensions. Tensors of the dtypes left out are masks.
    is_number = isinstance(index, int) or (
        isinstance(index, torch.Tensor) and not index.ndim and index.dtype in (torch.int32, torch.int64)
    )
    if is_number and not isinstance(index, bool) and tensor.ndim == 3:
        return _matrix_of_stack(tensor, int(index))
    if isinstance(index, slice) and tensor.ndim == 2 and index.step in (None, 1):
        start, stop, _ = index.indices(len(tensor))
        return _narrow(tensor, 0, start, max(0, stop - start))
    return tensor.dequantize()[index]


def _select(tensor: Any, dim: int, index: int) -> Any:
    if not isinstance(tensor, QuantizedTensor):
        return NotImplemented
    if tensor.ndim == 3 and dim in (0, -3):
        return _matrix_of_stack(tensor, int(index))
    return tensor.dequantize().select(dim, index)


def _unbind(tensor: Any, dim: int = 0) -> Any:
    if not isinstance(tensor, QuantizedTensor) or tensor.ndim != 3 or dim not in (0, -3):
        return NotImplemented
    # One node for all matrices: the gradient of a factor is put together once.
    factors = (
        [None] * len(tensor) if tensor.factors is None else zip(*(own.unbind() for own in tensor.factors), strict=True)
    )
    return tuple(_rebuilt(tensor, operands(tensor.array[index]), own) for index, own in enumerate(factors))


def _split(tensor: Any, sizes: Any, dim: int = 0) -> Any:
    if not isinstance(tensor, QuantizedTensor) or tensor.ndim != 2 or not -2 <= dim < 2:
        return NotImplemented
    length = tensor.shape[dim]
    if isinstance(sizes, int):
        if sizes < 1:
            return NotImplemented
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    if sum(sizes) != length:
        return NotImplemented
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return tuple(_narrow(tensor, dim, end - own, own) for own, end in zip(sizes, ends, strict=True))


def _chunk(tensor: Any, chunks: int, dim: int = 0) -> Any:
    if not isinstance(tensor, QuantizedTensor) or tensor.ndim != 2 or not -2 <= dim < 2 or chunks < 1:
        return NotImplemented
    return _split(tensor, max(1, -(-tensor.shape[dim] // chunks)), dim)


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    return torch.cat([own.dequantize() if isinstance(own, QuantizedTensor) else own for own in tensors], dim)


#: Names of the factors of products in torch, in the order of its arguments.
_FACTORS = ("input", "mat1", "weight", "other", "mat2", "bias")


def _replaced_data(*_: Any) -> NoReturn:
    raise InvalidArgumentError(
        "data of a QuantizedTensor must not be set, because its codes would stay. Call dequantize_model before you change the weight."
    )


def _switched(tensor: Any, requires_grad: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's signature
    if not isinstance(tensor, QuantizedTensor) or tensor.is_leaf:
        return NotImplemented
    raise InvalidArgumentError(
        f"requires_grad of the weight of a quantized layer must not be set to {requires_grad}. Set that of its lora_A and lora_B."
    )


#: What runs above autograd.
_ABOVE: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.Tensor.__getitem__: _getitem,
    **dict.fromkeys([torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__], _matmul),
    torch.Tensor.__rmatmul__: lambda right, left: _matmul(left, right),
    **dict.fromkeys([torch.addmm, torch.Tensor.addmm], _addmm),
    **dict.fromkeys([torch.bmm, torch.Tensor.bmm], _bmm),
    **dict.fromkeys([torch.narrow, torch.Tensor.narrow], _narrow),
    **dict.fromkeys([torch.select, torch.Tensor.select], _select),
    **dict.fromkeys([torch.unbind, torch.Tensor.unbind], _unbind),
    **dict.fromkeys([torch.split, torch.Tensor.split], _split),
    **dict.fromkeys([torch.chunk, torch.Tensor.chunk], _chunk),
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], _cat),
    torch.Tensor.data.__set__: _replaced_data,  # type: ignore[attr-defined]
    **dict.fromkeys([torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_], _switched),  # type: ignore[attr-defined]
}


#: Arguments that a function above autograd takes by name.
_KEYWORDS = {own: inspect.signature(own).parameters.keys() for own in _ABOVE.values()}


# What runs below autograd.


def _moved(tensor: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    if not isinstance(tensor, QuantizedTensor):
        return NotImplemented
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    if _trains_scales(tensor) and torch.is_grad_enabled():
        return NotImplemented  # the copy would lose the gradient of the scales
    own = [part.to(device=device, copy=True) for part in tensor.operands.tensors]
    factors = (
        None if tensor.factors is None else tuple(part.detach().to(device=device, copy=True) for part in tensor.factors)
    )
    return _like(tensor, tensor.operands._replace(tensors=own), factors, dtype=dtype or tensor.dtype)


def _detached(tensor: QuantizedTensor) -> QuantizedTensor:
    # Scales and factors lose their history as well, so that products with the result have no gradient.
    weight = tensor.operands._replace(tensors=[own.detach() for own in tensor.operands.tensors])
    return _like(tensor, weight, None if tensor.factors is None else tuple(own.detach() for own in tensor.factors))


def _copied(tensor: Any, source: Any, non_blocking: bool = False) -> Any:  # noqa: FBT001, FBT002 - torch's signature
    same = (
        isinstance(tensor, QuantizedTensor)
        and isinstance(source, QuantizedTensor)
        and tensor.operands[1:] == source.operands[1:]
        and tensor.is_transposed == source.is_transposed
        and (tensor.factors is None) == (source.factors is None)
        and (tensor.factors is None or tensor.scaling == source.scaling)
    )
    if not same:
        return NotImplemented
    pairs = zip(
        (*tensor.operands.tensors, *(tensor.factors or ())),
        (*source.operands.tensors, *(source.factors or ())),
        strict=True,
    )
    for own, given in pairs:
        own.copy_(given, non_blocking=non_blocking)
    return tensor


def _transposed(tensor: QuantizedTensor, first: int = 0, second: int = 1) -> Any:
    if {first % tensor.ndim, second % tensor.ndim} != {tensor.ndim - 2, tensor.ndim - 1}:
        return NotImplemented
    return _turned(tensor)


def _permuted(tensor: QuantizedTensor, order: Sequence[int]) -> Any:
    *stack, rows, columns = range(tensor.ndim)
    same = [dim % tensor.ndim for dim in order]
    return _turned(tensor) if same == [*stack, columns, rows] else NotImplemented


_aten = torch.ops.aten
_BELOW: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detached,
    _aten.alias.default: _like,
    _aten.clone.default: lambda tensor, **_: _moved(tensor),
    _aten._to_copy.default: _moved,  # noqa: SLF001 - the name of the operation
    _aten.copy_.default: _copied,
    _aten.t.default: _transposed,
    _aten.transpose.int: _transposed,
    _aten.permute.default: _permuted,
    _aten.mm.default: _matmul,
    _aten.mv.default: _matmul,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
}
