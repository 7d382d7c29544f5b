"""Second moments of what linear layers see, and of the gradients at their outputs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import TensorWeakRef

from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn.model import select_linears
from lqlora.nn.statistics.fisher import causal_lm_loss
from lqlora.nn.statistics.hooks import checked_losses, connected, frozen, hooked, input_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from lqlora._patterns import Patterns

__all__ = ["collect_gram", "collect_kronecker"]


@torch.inference_mode(mode=False)  # tensors made in it have no version, so a change in place could not be noticed
def collect_gram(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    include: Patterns = "*",
    exclude: Patterns = ("lm_head", "*.lm_head"),
    progress: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    r"""Average the outer products of the inputs of linear layers.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; its flags and mode are as before afterwards.
    batches : iterable
        What the model takes as its only argument, or what ``loss`` takes.
    loss : callable, optional
        ``loss(model, batch)`` runs the model in place of ``model(batch)``; what it returns is not used.
    include, exclude : patterns
        See :func:`select_linears`.
    progress : callable, optional
        Called after each batch with the number of batches so far.

    Returns
    -------
    dict of str to Tensor of float32, shape (in_features, in_features)
        Mean of :math:`x x^T` over all rows ``x`` that the layer saw (the tokens of all sequences, and of all uses in a
        pass), exactly symmetric, in host memory wherever the model is. Layers that saw the same inputs share one tensor.

    Raises
    ------
    InvalidArgumentError
        If there are no batches, no layer matches, or a layer that matches was never used.
    NonFiniteError
        If a layer sees NaN, infinity, or numbers whose squares overflow float32.

    Notes
    -----
    The squared error of a layer's outputs, averaged over those rows, is :math:`\operatorname{tr}(E G E^T)`, where
    ``E`` is the error of the weight and ``G`` this matrix.

    Products are formed in float32 for each batch and added up in float64, in host memory: the matrices of a large model
    do not fit beside it on a GPU. The result is rounded to float32, which a single product has no more digits than.
    Layers that are called with the very same tensor, such as projections to queries, keys and values, share product and
    sum. For thousands of batches the additions count: larger batches have fewer.

    References
    ----------
    GPTQ, arXiv 2210.17323, section 3.1 (the Hessian of the error of a layer, twice this matrix).

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    >>> lq.nn.collect_gram(model, [torch.tensor([[1.0, 2.0], [3.0, 0.0]])])["0"].tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """
    linears = select_linears(model, include, exclude)
    inputs = _Inputs()
    hooks = {name: _Hook(name, inputs, None) for name in linears}
    count = 0
    with frozen(model), hooked(linears, hooks), torch.no_grad():
        for batch in batches:
            _ = model(batch) if loss is None else loss(model, batch)
            inputs.settle()
            count += 1
            if progress is not None:
                progress(count)
    if count == 0:
        raise InvalidArgumentError("Second moments need at least one batch.")
    return inputs.means(linears)


@torch.inference_mode(mode=False)
def collect_kronecker(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] = causal_lm_loss,
    include: Patterns = "*",
    exclude: Patterns = ("lm_head", "*.lm_head"),
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    r"""Collect the two factors of a Kronecker product that approximates the Fisher information of each layer.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; its gradients, flags and mode are as before afterwards.
    batches : iterable
        What ``loss`` takes.
    loss : callable, default :func:`causal_lm_loss`
        ``loss(model, batch)`` returns one loss per example, shape (examples,). No loss may depend on other examples.
    include, exclude : patterns
        See :func:`select_linears`.
    progress : callable, optional
        Called after each batch with the number of examples so far.

    Returns
    -------
    dict of str to (Tensor, Tensor), both float32, shapes (out_features, out_features) and (in_features, in_features)
        Second moment of the gradients at the output, then that of the inputs, in host memory. The second is as of
        :func:`collect_gram`, shared in the same way.

    Raises
    ------
    InvalidArgumentError
        If there are no batches, no layer matches, a layer that matches was never used, or a loss is not one number per
        example.
    NonFiniteError
        If a loss, an input or a gradient is NaN, infinite, or too large for its square to be a float32.

    Notes
    -----
    With rows :math:`x_t` that a layer sees and gradients :math:`g_t` of the loss of their own example at the layer's
    output,

    .. math:: A = \frac{1}{\text{rows}} \sum_t x_t x_t^T, \qquad G = \frac{1}{\text{examples}} \sum_t g_t g_t^T.

    ``A`` is a mean over rows (tokens) and ``G`` a mean over examples of sums over their rows. So :math:`G \otimes A`
    approximates, on its own scale, the empirical Fisher information of the weight with its entries in rows, the mean
    over examples of the outer product of the gradient :math:`\sum_t g_t x_t^T` with itself. It is exact for one example
    of one row, and else supposes that inputs and gradients are independent and gradients of different rows are not
    correlated (K-FAC). The gradient is that of the losses of the data, not of labels drawn from the model.

    References
    ----------
    Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, arXiv 1503.05671,
    section 3.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> output, inputs = lq.nn.collect_kronecker(model, [x], loss=lambda model, x: 2 * model(x)[:, 0])["0"]
    >>> output.tolist(), inputs.tolist()
    ([[4.0]], [[5.0, 1.0], [1.0, 2.0]])
    """
    linears = select_linears(model, include, exclude)
    inputs = _Inputs()
    outputs = {name: _zeros(module.out_features) for name, module in linears.items()}
    hooks = {name: _Hook(name, inputs, total) for name, total in outputs.items()}
    examples = 0
    with frozen(model), hooked(linears, hooks), torch.enable_grad():
        for batch in batches:
            losses = checked_losses(loss(model, batch), examples)
            losses.sum().backward()
            inputs.settle()
            examples += losses.shape[0]
            if progress is not None:
                progress(examples)
    if examples == 0:
        raise InvalidArgumentError("Kronecker factors need at least one batch.")
    means = inputs.means(linears)
    return {name: (_mean(total, examples), means[name]) for name, total in outputs.items()}


class _Hook:
    """Forward hook of one layer: adds what it sees, and the gradients at its output if there is a total for them."""

    def __init__(self, name: str, inputs: _Inputs, gradients: torch.Tensor | None) -> None:
        self._name, self._inputs, self._gradients = name, inputs, gradients

    def __call__(
        self, _: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        total = self._gradients
        if total is not None and not torch.is_grad_enabled():
            return None
        self._inputs.see(self._name, input_of(args, kwargs))
        if total is None:
            return None

        def see(gradient: torch.Tensor) -> None:
            total.add_(_second_moment(gradient, f"The gradient at the output of {self._name!r}").cpu())

        output = connected(output)
        output.register_hook(see)
        return output


class _Inputs:
    """Sums of second moments of inputs, one for each set of layers that saw the same ones."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._totals: dict[tuple[str, ...], torch.Tensor] = {}
        self._rows: Counter[tuple[str, ...]] = Counter()

    def see(self, name: str, x: torch.Tensor) -> None:
        """Note that a layer sees a tensor; the product is formed at its first sight."""
        self.settle(all_of_them=False)
        for seen in self._seen:
            if seen.tensor() is x:
                seen.names.append(name)
                return
        self._seen.append(_Seen(name, x))

    def settle(self, *, all_of_them: bool = True) -> None:
        """Add to the sums what no layer can see again, or everything at the end of a pass."""
        current = [] if all_of_them else [seen for seen in self._seen if seen.is_current()]
        for seen in self._seen:
            if seen in current:
                continue
            key = tuple(sorted(seen.names))
            if key not in self._totals:
                self._totals[key] = _zeros(seen.product.shape[0])
            self._totals[key].add_(seen.product.cpu())
            self._rows[key] += seen.rows
        self._seen = current

    def means(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the mean of each layer, the same tensor for layers with the same uses of the same sums."""
        shared: dict[tuple[tuple[tuple[str, ...], int], ...], torch.Tensor] = {}
        found = {}
        for name in names:
            uses = tuple((key, key.count(name)) for key in self._totals if name in key)
            rows = sum(count * self._rows[key] for key, count in uses)
            if rows == 0:
                raise InvalidArgumentError(f"The layer {name!r} never saw an input: exclude it, or give other batches.")
            if uses not in shared:
                (first, count), *others = uses
                total = self._totals[first] * count
                for key, count in others:
                    total.add_(self._totals[key], alpha=count)
                shared[uses] = _mean(total, rows)
            found[name] = shared[uses]
        return found


class _Seen:
    """The product of an input, kept while another layer may still see the same tensor.

    The tensor itself is not kept: of a long pass only few inputs are alive at any time.
    """

    def __init__(self, name: str, x: torch.Tensor) -> None:
        self.names = [name]
        self.tensor = TensorWeakRef(x)
        self._version = _version(x)
        self.rows = x.numel() // max(x.shape[-1], 1)
        self.product = _second_moment(x, f"The input of {name!r}")

    def is_current(self) -> bool:
        """Tell whether the tensor lives and was not changed in place."""
        x = self.tensor()
        return x is not None and _version(x) == self._version


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version  # noqa: SLF001 - torch has no public name for it


def _second_moment(x: torch.Tensor, what: str) -> torch.Tensor:
    """Return the sum of outer products of rows in float32, whatever the precision of a surrounding autocast."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        product = rows.T @ rows
    if not bool(torch.isfinite(product.diagonal()).all()):  # where anything else that is not finite shows too
        raise NonFiniteError(f"{what} holds NaN, infinity, or numbers whose squares overflow float32.")
    return product


def _zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, size, dtype=torch.float64, device="cpu")


def _mean(total: torch.Tensor, count: int) -> torch.Tensor:
    return ((total + total.T) / (2 * count)).float()  # a product of matrices need not be symmetric to the last bit
