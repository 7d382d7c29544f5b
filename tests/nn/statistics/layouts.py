"""Models whose layers see the examples of a batch in several layouts, and statistics of single examples as the oracle."""

from __future__ import annotations

import copy

from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from lqlora.nn import select_linears  # noqa: E402
from lqlora.nn.experts import ExpertMatrix  # noqa: E402
from lqlora.nn.linear_maps import matrix_of  # noqa: E402


class Experts(nn.Module):
    """Sends each token to one of two experts, by the sign of its first feature."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        out = torch.zeros_like(h)
        for expert, chosen in zip(self.experts, (x[..., 0] > 0, x[..., 0] <= 0), strict=True):
            out[chosen] = expert(h[chosen])
        return h + out


class Flat(nn.Module):
    """Merges the axes of examples and tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(torch.tanh(self.first(x)).reshape(-1, 4)).reshape(*x.shape[:-1], 3)


class TimeFirst(nn.Module):
    """Has the tokens on the first axis, and uses one layer twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.layer(torch.tanh(self.layer(x.transpose(0, 1)))))
        return self.last(h).transpose(0, 1)


class Positions(nn.Module):
    """Maps a table of positions that all examples share, and sees the examples in another layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.position, self.layer, self.single = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        table = self.position(self.table.weight[: x.shape[1]])
        scale = self.single(self.table.weight[0])  # one row for all
        return torch.tanh(self.layer(x) * scale) * table


class Checkpointed(nn.Module):
    """Computes a part again in the backward pass."""

    def __init__(self, *, reentrant: bool = False):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant = reentrant

    def part(self, x):
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))

    def forward(self, x):
        return self.last(checkpoint(self.part, self.first(x), use_reentrant=self.reentrant))


MODELS = {
    "experts": Experts,
    "flat": Flat,
    "time first": TimeFirst,
    "positions": Positions,
    "checkpointed": Checkpointed,
}


def make(kind, seed: int = 0, dtype=torch.float64) -> nn.Module:
    """Return a model in float64."""
    torch.manual_seed(seed)
    return kind().to(dtype)


class Watched(TorchFunctionMode):
    """Copy of a model that keeps the inputs and outputs of its layers in forward passes with gradients.

    Products with matrices of experts are known by the memory of the matrix.
    """

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.linears = select_linears(self.model)
        self.inputs, self.outputs = ({name: [] for name in self.linears} for _ in range(2))
        self._experts = {}
        for name, layer in self.linears.items():
            if isinstance(layer, ExpertMatrix):
                self._experts[layer.weight.data_ptr()] = name
            else:
                layer.register_forward_hook(self._hook(name), with_kwargs=True)

    def weight_of(self, name):
        """Return a parameter, and how its gradient becomes that of the matrix."""
        layer = self.linears[name]
        if not isinstance(layer, ExpertMatrix):
            return layer.weight, lambda grad: grad if isinstance(layer, nn.Linear) else grad.T
        array, _, index = name.rpartition(".")
        owner = self.model.get_submodule(array.rpartition(".")[0])
        is_transposed = getattr(owner, "is_transposed", False)
        return self.model.get_parameter(array), lambda grad: grad[int(index)].T if is_transposed else grad[int(index)]

    def __torch_function__(self, func, _, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].ndim == 2 and output is not None:
            name = self._experts.get(args[1].data_ptr())
            if name is not None:
                self.inputs[name].append(args[0].detach().clone())
                self.outputs[name].append(output)
        return output

    def _hook(self, name):
        def hook(_, args, kwargs, output):
            if torch._C._current_graph_task_id() == -1:  # not while a checkpoint computes a part again
                self.inputs[name].append((args[0] if args else kwargs["input"]).detach().clone())
                self.outputs[name].append(output)

        return hook

    def clear(self):
        for seen in (*self.inputs.values(), *self.outputs.values()):
            seen.clear()


def rows(x):
    return x.reshape(-1, x.shape[-1])


def by_example(model, losses_of_examples) -> tuple[dict, dict]:
    """Return Fisher information and Kronecker factors, from one pass for each example.

    ``losses_of_examples`` are functions of the model that run it on one example and return its loss.
    """
    watched = Watched(model)
    fisher = {name: torch.zeros_like(matrix_of(layer)) for name, layer in watched.linears.items()}
    outer = dict.fromkeys(watched.linears, 0)
    gram, counts = dict.fromkeys(watched.linears, 0), dict.fromkeys(watched.linears, 0)
    for loss_of in losses_of_examples:
        watched.clear()
        with watched:
            loss = loss_of(watched.model).sum()
        for name in watched.linears:
            if not watched.outputs[name]:
                continue
            weight, of_matrix = watched.weight_of(name)
            gradient, *outputs = torch.autograd.grad(
                loss, [weight, *watched.outputs[name]], retain_graph=True, allow_unused=True
            )
            if gradient is not None:
                fisher[name] += of_matrix(gradient).square()
            for x, g in zip(watched.inputs[name], outputs, strict=True):
                outer[name] += 0 if g is None else rows(g).T @ rows(g)
                gram[name] += rows(x).T @ rows(x)
                counts[name] += rows(x).shape[0]
    n = len(losses_of_examples)
    seen = [name for name in watched.linears if counts[name]]
    return {name: fisher[name] / n for name in seen}, {
        name: (outer[name] / n, gram[name] / counts[name]) for name in seen
    }


def assert_close(found, expected) -> None:
    """Compare float32 results with those of float64, at 1e-6 of the largest entry."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        pairs = zip(found[name], values, strict=True) if isinstance(values, tuple) else [(found[name], values)]
        for own, other in pairs:
            torch.testing.assert_close(
                own.double(), other.double(), rtol=1e-6, atol=1e-6 * other.abs().max().item(), msg=name
            )
