"""Second moments of linear layers: Gram matrices of their inputs, and Kronecker factors of the Fisher information."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import TensorWeakRef

from lqlora._annotations import annotated
from lqlora.nn.linear_maps import matrix_of
from lqlora.nn.selection import LinearMaps
from lqlora.nn.statistics.batches import parts_of, run_model
from lqlora.nn.statistics.gradients import OutputGradients
from lqlora.nn.statistics.hooks import (
    SMALLEST,
    input_of,
    living_layers,
    require_no_overflow,
    run_batches,
    sum_outer_products,
    version_of,
    warn_of_underflow,
)
from lqlora.nn.statistics.losses import send_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

    from lqlora._patterns import Patterns
    from lqlora.nn.statistics.gradients import Gradients

__all__ = ["collect_gram", "collect_kronecker", "input_moments"]


@annotated
@torch.inference_mode(mode=False)  # tensors of inference mode have no version that shows a change in place
def collect_gram(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    progress: bool | Callable[[int, int | None], None] = True,
) -> dict[str, torch.Tensor]:
    r"""Return the second moments of the inputs of linear layers.

    Use them in :class:`lqlora.weighting.InputGram` and :func:`lqlora.gptq`.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Its flags and modes are the same afterwards.
    batches : iterable
        Mappings of keyword arguments of the model, as tokenizers and collators of transformers return them, or its only
        argument. Padding of mappings is cut as in :func:`collect_fisher`, so that it has no part in the mean.
    loss : callable, optional
        ``loss(model, batch)`` runs the model on a batch, or on a part without padding. Its result is not used.
    include, exclude : patterns
        See :func:`select_linears`.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts batches. The number of all is None if ``batches`` has no length.

    Returns
    -------
    dict of str to Tensor of float32, shape (in_features, in_features)
        Mean of :math:`x x^T` over all rows ``x`` that the layer saw: the tokens of all sequences, and of all uses in a
        pass. It is exactly symmetric, and in host memory for every device of the model. Layers that saw the same inputs
        share one tensor.

    Raises
    ------
    InvalidArgumentError
        If there are no batches, no layer matches, no layer was used, or the padding of a batch cannot be cut.
    NonFiniteError
        If a layer sees NaN, infinity, or numbers whose squares overflow float32.

    Warns
    -----
    DeadLayerWarning
        If some layers were not used in any batch. The result leaves them out. One warning lists them, when all others are
        complete.
    UserWarning
        If all squares that a layer sees are below the normal numbers of float32.

    Notes
    -----
    The squared error of a layer's outputs, averaged over those rows, is :math:`\operatorname{tr}(E G E^T)`, where
    ``E`` is the error of the weight and ``G`` this matrix.

    The products of each batch are computed in float32 and added in float64, in host memory, because the matrices of a
    large model do not fit beside it on a GPU. The mean is rounded to float32, the precision of a single product. Layers
    that are called with the very same tensor, such as the projections to queries, keys and values, share one product
    and one sum. The additions take time: prefer a few large batches to thousands of small ones.

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
    maps = LinearMaps(model)
    linears = maps.choose(include, exclude)
    means, lost = input_moments(model, maps, linears, batches, loss, progress)
    warn_of_underflow(lost, "inputs")
    living_layers({name: name in means for name in linears}, "an input")
    return means


def input_moments(
    model: nn.Module,
    maps: LinearMaps,
    linears: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Any] | None,
    progress: bool | Callable[[int, int | None], None],  # noqa: FBT001 - as in all functions for users
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the second moments of the inputs of layers without a warning.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    maps : LinearMaps
        Its linear layers.
    linears : mapping of str to torch.nn.Module
        Layers of ``maps`` by name.
    batches, loss, progress : iterable, callable, bool or callable
        See :func:`collect_gram`.

    Returns
    -------
    means : dict of str to Tensor of float32, shape (in_features, in_features)
        Second moments of the layers that were used.
    lost : list of str
        Layers whose squares are below the normal numbers of float32.
    """
    inputs = _Inputs()
    hooks = {name: _Forward(name, inputs) for name in linears}

    def step(batch: Any, _: int) -> int:
        """Add one batch and return its number of examples."""
        for part in parts_of(model, batch):
            run_model(model, part) if loss is None else loss(model, part)
            inputs.settle()
        return 1

    run_batches(model, maps, batches, step, linears, hooks, gradients=False, progress=progress, title="Gram matrices")
    return inputs.means(linears)


@annotated
@torch.inference_mode(mode=False)
def collect_kronecker(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    progress: bool | Callable[[int, int | None], None] = True,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    r"""Return the two factors of a Kronecker product that approximates the Fisher information of each layer.

    Use them in :class:`lqlora.weighting.Kronecker`.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Its gradients, flags and modes are the same afterwards.
    batches, loss : iterable and callable, optional
        See :func:`collect_fisher`.
    include, exclude : patterns
        See :func:`select_linears`.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts batches. The number of all is None if ``batches`` has no length.

    Returns
    -------
    dict of str to (Tensor, Tensor), both float32, shapes (out_features, out_features) and (in_features, in_features)
        Second moment of the gradients at the output, then that of the inputs, in host memory. The second is the result of
        :func:`collect_gram`, and layers share it in the same way.

    Raises
    ------
    InvalidArgumentError
        If there are no batches, no layer matches, a loss is not one number per example, no layer got a gradient, or the
        padding of a batch cannot be cut.
    NonFiniteError
        If a loss, an input or a gradient is NaN, infinite, or too large for its square to be a float32.

    Warns
    -----
    DeadLayerWarning
        If some layers got no gradient in any batch. The result leaves them out. One warning lists them, when all others are
        complete.
    UserWarning
        If all squares of inputs or gradients at a layer are below the normal numbers of float32.

    Notes
    -----
    With rows :math:`x_t` that a layer sees and gradients :math:`g_t` at the layer's output, of the loss of
    the same example,

    .. math:: A = \frac{1}{\text{rows}} \sum_t x_t x_t^T, \qquad G = \frac{1}{\text{examples}} \sum_t g_t g_t^T.

    ``A`` is a mean over rows (tokens), and ``G`` a mean over examples of sums over their rows. Then :math:`G \otimes A`
    approximates the empirical Fisher information of the weight, flattened row by row, on the same scale. That
    information is the mean over examples of :math:`v v^T`, where :math:`v = \sum_t g_t \otimes x_t` is the flattened
    gradient.

    The approximation is exact for one example of one row. Otherwise it supposes, as K-FAC does, that inputs are
    independent of gradients, and that gradients of different rows are not correlated. The gradient is that of the
    losses of the data, not of labels drawn from the model.

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
    maps = LinearMaps(model)
    linears = maps.choose(include, exclude)
    inputs = _Inputs()
    hooks = {name: _Both(name, inputs, matrix_of(layer).shape[0]) for name, layer in linears.items()}

    def step(batch: Any, done: int) -> int:
        """Add one batch and return its number of examples."""
        count = send_batch(model, batch, loss, hooks.values(), done)
        inputs.settle()
        return count

    # With v = sum_t g_t (x) x_t, the mean of v v^T over examples is a sum over pairs of rows,
    #     E[sum_t sum_s (g_t g_s^T) (x) (x_t x_s^T)].
    # Uncorrelated gradients of different rows leave the pairs t = s. Independence of gradients and inputs makes the
    # mean of a product the product of the means, and A = E[x_t x_t^T] is the same for each row. What is left is
    #     E[sum_t g_t g_t^T] (x) A,
    # so gradients are divided by the number of examples, and inputs by the number of rows.
    examples = run_batches(
        model, maps, batches, step, linears, hooks, gradients=True, progress=progress, title="Kronecker factors"
    )
    alive = {name: hook.is_alive for name, hook in hooks.items()}
    means, lost = inputs.means([name for name, own in alive.items() if own])
    warn_of_underflow(lost, "inputs")
    moments = {name: _mean(hooks[name].total, examples) for name in means}
    warn_of_underflow([name for name, own in moments.items() if _is_lost(hooks[name].total, own)], "output gradients")
    living_layers(alive, "a gradient")
    return {name: (own, means[name]) for name, own in moments.items()}


class _Forward:
    """Forward hook of one layer that records its input."""

    def __init__(self, name: str, inputs: _Inputs) -> None:
        self._name, self._inputs = name, inputs

    def __call__(self, _: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], __: Any) -> None:
        self._inputs.see(self._name, input_of(args, kwargs))


class _Both(OutputGradients):
    """Forward hook of one layer that records its input, and sums the second moments of the gradients at its output."""

    def __init__(self, name: str, inputs: _Inputs, size: int) -> None:
        super().__init__(name, self._add, keep_inputs=False)
        self.total = _zeros(size)
        self._what, self._see_input = f"gradient at the output of {name!r}", _Forward(name, inputs)

    def __call__(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        if self.is_forward:
            self._see_input(module, args, kwargs, output)
        return super().__call__(module, args, kwargs, output)

    def _add(self, seen: Sequence[Gradients], _: range) -> None:
        # Rows of different examples do not mix in a second moment, so all of them are multiplied at once.
        for own in seen:
            self.total.add_(_second_moment(own.values, self._what).cpu())


class _Inputs:
    """Sums of second moments of inputs, one sum for each set of layers that saw the same tensors.

    The key of a sum is the sorted tuple of the layers that saw a tensor. A layer that was called twice with the tensor
    is in the tuple twice. So q, k and v of an attention have one sum under ``(k, q, v)``, and a layer that sees other
    tensors as well has further sums, which :meth:`means` adds.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._totals: dict[tuple[str, ...], torch.Tensor] = {}
        self._rows: Counter[tuple[str, ...]] = Counter()

    def see(self, name: str, x: torch.Tensor) -> None:
        """Record that a layer sees a tensor. Its product is computed for the first layer that sees it."""
        # Tensors are compared by identity: comparing their values would take about as long as the product that it saves.
        self.settle(all_of_them=False)
        for seen in self._seen:
            if seen.tensor() is x:
                seen.names.append(name)
                return
        self._seen.append(_Seen(name, x))

    def settle(self, *, all_of_them: bool = True) -> None:
        """Add products to the sums: those whose tensor no layer can see again, or all at the end of a pass."""
        # A tensor that is gone, or was changed in place, cannot be the input of another layer any more: its list of
        # layers, and with it the key of its sum, is complete.
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

    def means(self, names: Iterable[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return the mean of each layer that saw rows, and the layers whose means are below the normal numbers of float32.

        Layers with the same uses of the same sums get the same tensor. Only the first of them is in the list.
        """
        # A layer with c_k uses of the tensors of sum k, whose total is T_k over r_k rows, has the mean
        #     (sum_k c_k T_k) / (sum_k c_k r_k).
        # Layers with equal counts have equal means, and share one tensor.
        shared: dict[tuple[tuple[tuple[str, ...], int], ...], torch.Tensor] = {}
        found, lost = {}, []
        for name in names:
            uses = tuple((key, key.count(name)) for key in self._totals if name in key)
            rows = sum(count * self._rows[key] for key, count in uses)
            if rows == 0:
                continue
            if uses not in shared:
                (first, count), *others = uses
                total = self._totals[first] * count
                for key, count in others:
                    total.add_(self._totals[key], alpha=count)
                shared[uses] = _mean(total, rows)
                if _is_lost(total, shared[uses]):
                    lost.append(name)
            found[name] = shared[uses]
        return found, lost


class _Seen:
    """The product of one input, kept as long as another layer may see the same tensor.

    The tensor itself is held by a weak reference: of a long pass only few inputs are alive at any time.
    """

    def __init__(self, name: str, x: torch.Tensor) -> None:
        self.names = [name]
        self.tensor = TensorWeakRef(x)
        self._version = version_of(x)
        self.rows = x.numel() // max(x.shape[-1], 1)
        self.product = _second_moment(x, f"input of {name!r}")

    def is_current(self) -> bool:
        """Return whether the tensor is alive and was not changed in place."""
        x = self.tensor()
        return x is not None and version_of(x) == self._version


def _second_moment(x: torch.Tensor, what: str) -> torch.Tensor:
    """Return the sum of the outer products of rows with themselves, in float32; in float64 if that would underflow."""
    x = x.detach()
    product = sum_outer_products(x, x)
    # The diagonal has the sums of squares of the columns. They are not finite if any entry of x is not, or if a square
    # overflows; entries off the diagonal are smaller, by the inequality of Cauchy and Schwarz.
    if require_no_overflow(product.diagonal(), what) >= SMALLEST * 2**24 or not x.any():
        return product
    rows = x.cpu().double().reshape(-1, x.shape[-1])
    return rows.T @ rows


def _zeros(size: int) -> torch.Tensor:
    """Return a square matrix of zeros, float64 in host memory, to which products are added."""
    return torch.zeros(size, size, dtype=torch.float64, device="cpu")


def _mean(total: torch.Tensor, count: int) -> torch.Tensor:
    """Return a sum divided by a count, made exactly symmetric, in float32."""
    # Products of matrices need not be symmetric to the last bit: the two halves are summed in different orders.
    return ((total + total.T) / (2 * count)).float()


def _is_lost(total: torch.Tensor, mean: torch.Tensor) -> bool:
    """Return whether a sum is not zero, but its mean is below the normal numbers of float32."""
    return bool((mean.diagonal() < SMALLEST).all()) and bool((total.diagonal() > 0).any())
