"""Checks of quantized models, one for each column of the table of architectures, and the program that records the table.

``python -m tests.nn.architecture_checks`` runs every check on every architecture of the table, and writes the outcomes into
``docs/measurements/architectures.json``, which ``docs/reference/architectures.md`` shows.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lqlora as lq
from benchmarks.records import origin
from tests.nn.architectures import ARCHITECTURES
from tests.requirements import require_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.nn.architectures import Architecture

torch = require_module("torch")
from torch.nn.functional import cross_entropy  # noqa: E402 - needs torch

from lqlora.nn import LQLinear, dequantize_model, load_model, quantize_model, save_model  # noqa: E402

RECORD = Path(__file__).parents[2] / "docs" / "measurements" / "architectures.json"

#: Rows of the table: architectures by the name that readers know.
ROWS = {
    "Llama": "llama",
    "Llama, tied": "tied llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Mixtral": "mixtral",
    "Qwen3-MoE": "qwen3 experts",
    "GPT-2": "gpt2",
    "Falcon": "falcon",
    "BERT": "bert",
    "RoBERTa": "roberta classifier",
    "DeBERTa-v2": "deberta classifier",
    "T5": "t5",
    "ViT": "vit",
    "Whisper": "whisper",
    "Mamba": "mamba",
}

#: Outcomes of a check. A failed one raises an error.
RIGHT, NOT_APPLICABLE = "right", "does not apply"

#: One architecture for each way in which models multiply by a weight: for them the backward pass is traced, too.
WITH_BACKWARD = ("llama", "mixtral", "mamba")

#: Low bits and a low rank, so that no check succeeds with the original weights.
FORMAT = lq.BlockFormat.parse("nf3/16:float32")


class NotApplicableError(Exception):
    """The architecture does not have what the check concerns."""


_kept: dict[str, Any] = {}


def quantized(architecture: Architecture):
    """Return a copy of the quantized model, which is made once."""
    key = repr(architecture)
    if key not in _kept:
        _kept[key] = architecture.make()
        quantize_model(_kept[key], FORMAT, rank=4, max_iter=1)
    return copy.deepcopy(_kept[key])


def layers_of(model) -> dict[str, LQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LQLinear)}


def trainable(model) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def dense_matrix(model, name: str, kind: str = "data"):
    """Return a matrix of a dense model, or its gradient, in shape (out_features, in_features): a view."""
    owner, _, last = name.rpartition(".")
    if last.isdigit() and isinstance(array := _attribute(model, owner), torch.nn.Parameter):  # all experts of a layer
        is_transposed = getattr(model.get_submodule(owner.rpartition(".")[0]), "is_transposed", False)
        return getattr(array, kind)[int(last)].T if is_transposed else getattr(array, kind)[int(last)]
    layer = model.get_submodule(name)
    matrix = getattr(layer.weight, kind)
    return matrix if isinstance(layer, torch.nn.Linear) else matrix.T  # Conv1D of GPT-2


def _attribute(model, name: str):
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last, None)


class Reference:
    """Dense model in float64 with the sums of both parts as weights, and the parameters of the quantized model.

    Its gradients are those of dense weights. The gradients of factors follow from them by the chain rule.
    """

    def __init__(self, architecture: Architecture, model):
        self.architecture = architecture
        self.model = architecture.make().double().requires_grad_(requires_grad=True)
        self.model.config._experts_implementation = "eager"  # the grouped products have no float64
        self.layers = layers_of(model)
        self.frozen = {name: lq.dequantize(own.quantized.array).double() for name, own in self.layers.items()}
        self.parameters = {name: own.detach().double().clone() for name, own in trainable(model).items()}
        self.fill()

    def factors(self, name: str):
        return self.parameters[f"{name}.lora_A"], self.parameters[f"{name}.lora_B"]

    def merged(self, name: str):
        lora_A, lora_B = self.factors(name)
        return self.frozen[name] + self.layers[name].scaling * lora_B @ lora_A

    def heads(self) -> set[str]:
        return self.parameters.keys() - {f"{name}.lora_{x}" for name in self.layers for x in "AB"}

    def fill(self) -> None:
        """Write the sums of both parts, and the heads, into the dense model."""
        with torch.no_grad():
            for name in self.layers:
                dense_matrix(self.model, name).copy_(self.merged(name))
            for name in self.heads():
                self.model.get_parameter(name).copy_(self.parameters[name])

    def run(self):
        return self.architecture.run(self.model, torch.float64)

    def gradients(self, run: Callable[..., Any] | None = None) -> dict[str, Any]:
        self.model.zero_grad()
        loss_of(run(self.model) if run else self.run()).backward()
        found = {name: self.model.get_parameter(name).grad.double() for name in self.heads()}
        for name, layer in self.layers.items():
            gradient = dense_matrix(self.model, name, "grad").double()
            lora_A, lora_B = self.factors(name)
            found[f"{name}.lora_A"] = layer.scaling * lora_B.T @ gradient
            found[f"{name}.lora_B"] = layer.scaling * gradient @ lora_A.T
        return found


def loss_of(output):
    """Return a loss with gradients of order one: the cross entropy of fixed classes."""
    classes = torch.randint(output.shape[-1], output.shape[:-1], generator=torch.Generator().manual_seed(2))
    return cross_entropy(output.double().flatten(0, -2), classes.flatten())


def gradients(model, run: Callable[..., Any]) -> dict[str, Any]:
    """Return the gradients of all parameters that train. An expert that no token chose takes part in no product."""
    model.zero_grad()
    loss_of(run(model)).backward()
    return {
        name: torch.zeros_like(own) if own.grad is None else own.grad.clone() for name, own in trainable(model).items()
    }


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the relative Frobenius norm of the differences of all tensors together."""
    assert found.keys() == expected.keys()
    squares = [
        sum(float(own.detach().double().square().sum()) for own in tensors)
        for tensors in ([found[name].double() - own for name, own in expected.items()], expected.values())
    ]
    return (squares[0] / squares[1]) ** 0.5


def error(found, expected, floor: float = 1e-3) -> float:
    """Return the largest difference of two tensors, or of tensors by name, relative to the largest entry.

    Some gradients are zero but for rounding, so entries below ``floor`` times the largest of all tensors count as that.
    """
    if not isinstance(expected, dict):
        found, expected = {"": found}, {"": expected}
    assert found.keys() == expected.keys()
    assert all(found[name].shape == own.shape and found[name].isfinite().all() for name, own in expected.items())
    with torch.no_grad():
        sizes = {name: float(own.abs().max()) for name, own in expected.items()}
        least = floor * max(sizes.values())
        return max(
            float((found[name].double() - own.double()).abs().max()) / max(sizes[name], least)
            for name, own in expected.items()
        )


def converts(architecture: Architecture, _: Path) -> None:
    """The report names the layers, and each layer holds the decomposition of its matrix."""
    model, dense = architecture.make(), architecture.make()
    report = quantize_model(model, FORMAT, rank=4, max_iter=1)
    layers = layers_of(model)
    assert layers.keys() == report.layers.keys()
    assert len(layers) == architecture.taken
    assert {group: list(part.layers) for group, part in report.dense.items() if part.layers} == architecture.left
    for name, layer in layers.items():
        matrix = dense_matrix(dense, name)
        expected = lq.decompose(matrix.numpy(), FORMAT, min(4, *matrix.shape), max_iter=1)
        found = layer.state_dict()
        assert all(
            torch.equal(found[key], own) for key, own in LQLinear.from_decomposition(expected).state_dict().items()
        )
    heads = {name for name in trainable(model) if any(name.startswith(f"{head}.") for head in architecture.trains)}
    assert trainable(model).keys() == heads | {f"{name}.lora_{x}" for name in layers for x in "AB"}


def runs_forward(architecture: Architecture, _: Path) -> None:
    """Outputs are those of the dense model in float64."""
    model = quantized(architecture)
    assert error(architecture.run(model), Reference(architecture, model).run()) < 1e-5


def runs_backward(architecture: Architecture, _: Path) -> None:
    """Gradients are those of the dense model in float64."""
    model = quantized(architecture)
    assert error(gradients(model, architecture.run), Reference(architecture, model).gradients()) < 1e-4


def trains(architecture: Architecture, _: Path) -> None:
    """Three steps end at the parameters of three steps in float64, at a lower loss."""
    model = quantized(architecture).train()
    reference = Reference(architecture, model)
    expected = reference.parameters
    first = {name: own.clone() for name, own in expected.items()}
    # The largest entry moves by about 0.01, which is far above the rounding of float32.
    rate = 0.01 / max(float(own.abs().max()) for own in reference.gradients().values())
    optimizer = torch.optim.SGD(trainable(model).values(), rate)
    before = float(loss_of(reference.run()).detach())
    for _step in range(3):
        gradients(model, architecture.run)
        optimizer.step()
        for name, gradient in reference.gradients().items():
            expected[name] -= rate * gradient
        reference.fill()
    moved = {name: own.detach() - first[name] for name, own in trainable(model).items()}
    assert error(moved, {name: own - first[name] for name, own in expected.items()}, floor=0.1) < 1e-3
    assert float(loss_of(architecture.run(model)).detach()) < before


def checkpoints_activations(architecture: Architecture, _: Path) -> None:
    """Layers run again in the backward pass, reentrant or not, and gradients are the same."""
    model = quantized(architecture).train()
    if not model.supports_gradient_checkpointing:
        raise NotApplicableError
    calls: list[str] = []
    for name, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    plain = gradients(model, architecture.run)
    once = len(calls)
    model.enable_input_require_grads()  # for the reentrant way, which needs an input with a gradient
    for reentrant in (False, True):
        calls.clear()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        # The reentrant way runs first without gradients, where a layer is one operator that adds in another order. Small gradients
        # of biases are sums of large ones that cancel.
        assert error(gradients(model, architecture.run), plain, floor=0.1) < 1e-5
        assert len(calls) > 1.5 * once


def runs_under_autocast(architecture: Architecture, _: Path) -> None:
    """Outputs and gradients are about as near to float64 as those of a dense model under autocast."""

    def run(own):
        with torch.autocast("cpu", torch.bfloat16):
            return architecture.run(own)

    _compare_in_bfloat16(architecture, quantized(architecture), torch.float32, run)


def runs_in_bfloat16(architecture: Architecture, _: Path) -> None:
    """Outputs and gradients are about as near to float64 as those of a dense model in bfloat16."""
    _compare_in_bfloat16(
        architecture, quantized(architecture), torch.bfloat16, lambda own: architecture.run(own, torch.bfloat16)
    )


def _compare_in_bfloat16(architecture: Architecture, model, dtype: Any, run: Callable[..., Any]) -> None:
    reference, dense = Reference(architecture, model), Reference(architecture, model)
    exact, gradient = reference.run(), reference.gradients()
    dense.model.to(dtype)
    model.to(dtype)
    assert all(own.dtype == dtype for own in model.parameters())
    found, expected = run(model), run(dense.model)
    assert found.dtype == expected.dtype
    assert error(found, exact) < 2 * error(expected, exact) + 1e-3
    # A unit of ReLU near zero changes single entries by much, so all entries are compared together.
    assert distance(gradients(model, run), gradient) < 2 * distance(dense.gradients(run), gradient) + 1e-3


def is_copied(architecture: Architecture, _: Path) -> None:
    """A deep copy has the same outputs and gradients, and shares no factor."""
    model = quantized(architecture)
    output, own = architecture.run(model), gradients(model, architecture.run)
    copied = copy.deepcopy(model)
    assert torch.equal(architecture.run(copied), output)
    found = gradients(copied, architecture.run)
    assert all(torch.equal(found[name], gradient) for name, gradient in own.items())
    with torch.no_grad():
        for parameter in trainable(copied).values():
            parameter.zero_()
    assert not torch.equal(architecture.run(copied), output)
    assert torch.equal(architecture.run(model), output)


def is_compiled(architecture: Architecture, _: Path) -> None:
    """A compiled model of one layer, without a cache, has the outputs and gradients of the dense model in float64.

    Where experts are chosen, the blocks are compiled one by one.
    """
    backend = _tracing() if architecture in [ARCHITECTURES[name] for name in WITH_BACKWARD] else "eager"
    architecture = architecture.shallow()
    model = quantized(architecture)
    reference = Reference(architecture, model)
    model.config.use_cache = False
    torch.compiler.reset()
    if "experts" in " ".join(layers_of(model)):
        # The eager experts of transformers, dense ones too, end a graph. Each module around them would be traced twice.
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                module.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    assert error(architecture.run(model), reference.run()) < 1e-5
    inner = getattr(model, "_orig_mod", model)
    assert error(gradients(inner, lambda _: architecture.run(model)), reference.gradients()) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _tracing() -> Any:
    """Return a backend that traces forward and backward passes as Inductor does, and runs the graphs without C++ code."""
    from torch._decomp import get_decompositions
    from torch._dynamo.backends.common import aot_autograd

    # Inductor decomposes this operator, too. torch 2.13 predicts other strides of its result than the kernel has.
    decompositions = get_decompositions([torch.ops.aten.softplus_backward])
    return aot_autograd(fw_compiler=lambda graph, _: graph.forward, decompositions=decompositions)


def is_saved(architecture: Architecture, path: Path) -> None:
    """The file holds every tensor of the model once, and saving changes no output."""
    model = quantized(architecture)
    output = architecture.run(model)
    save_model(path, model)
    lq.verify(path)
    content, layers = lq.load(path), layers_of(model)
    assert content.matrices.keys() == layers.keys()
    for name, layer in layers.items():
        stored = content.matrices[name]
        for key, array in layer.quantized.array.to_arrays().items():
            assert (stored.quantized.to_arrays()[key] == array.numpy()).all()
        assert (stored.lora_A == layer.lora_A.detach().numpy()).all()
        assert (stored.lora_B == layer.lora_B.detach().numpy()).all()
    names = {id(own): name for name, own in model.named_parameters()}  # tied ones are listed once
    others = {name for name in names.values() if name.rpartition(".")[0] not in layers or name.endswith(".bias")}
    assert others <= content.tensors.keys()
    assert torch.equal(architecture.run(model), output)


def is_loaded(architecture: Architecture, path: Path) -> None:
    """A model of other values, and one on the meta device, have the same outputs, bit by bit, once the file is loaded; gradients too."""
    model, fresh = quantized(architecture), architecture.make(seed=1)
    save_model(path, model)
    load_model(path, fresh)
    assert torch.equal(architecture.run(fresh), architecture.run(model))
    with torch.device("meta"):
        skeleton = architecture.make(seed=1)
    load_model(path, skeleton)
    assert torch.equal(architecture.run(skeleton), architecture.run(model))
    found, expected = gradients(skeleton, architecture.run), gradients(model, architecture.run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], own) for name, own in expected.items())


def generates(architecture: Architecture, _: Path) -> None:
    """Tokens are those of the dense model in float64, with and without a cache."""
    model = quantized(architecture)
    if not model.can_generate():
        raise NotApplicableError
    dense = Reference(architecture, model).model
    for cache in (True, False):
        settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": cache}
        found = model.generate(**architecture.batch(), **settings)
        assert torch.equal(found, dense.generate(**architecture.batch(torch.float64), **settings))


def merges(architecture: Architecture, _: Path) -> None:
    """Dense layers hold the sums of both parts, and a dense model that loads their state computes the same."""
    model, fresh = quantized(architecture), architecture.make(seed=1)
    reference = Reference(architecture, model)
    dequantize_model(model)
    assert not layers_of(model)
    for name in reference.layers:
        torch.testing.assert_close(dense_matrix(model, name), reference.merged(name).float(), rtol=1e-6, atol=1e-7)
    output = architecture.run(model)
    assert error(output, reference.run()) < 1e-5
    fresh.load_state_dict(model.state_dict())
    assert error(architecture.run(fresh), output) < 1e-6


#: Columns of the table: what a user does, and its check.
COLUMNS: dict[str, Callable[[Architecture, Path], None]] = {
    "convert": converts,
    "forward": runs_forward,
    "backward": runs_backward,
    "train": trains,
    "checkpointing": checkpoints_activations,
    "autocast": runs_under_autocast,
    "to(bfloat16)": runs_in_bfloat16,
    "deepcopy": is_copied,
    "compile": is_compiled,
    "save": is_saved,
    "load": is_loaded,
    "generate": generates,
    "merge": merges,
}


def outcome(row: str, column: str, folder: Path) -> str:
    """Return the outcome of a check, or raise what a failed one raises."""
    try:
        COLUMNS[column](ARCHITECTURES[ROWS[row]], folder / "m.safetensors")
    except NotApplicableError:
        return NOT_APPLICABLE
    return RIGHT


def descriptions() -> dict[str, str]:
    """Return the first line of each check."""
    return {column: str(check.__doc__).partition("\n")[0] for column, check in COLUMNS.items()}


def read() -> dict[str, Any]:
    """Return the record."""
    content: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return content


def record() -> None:
    """Run all checks, and write the record."""
    warnings.simplefilter("ignore")
    content: dict[str, Any] = {
        **origin(["torch", "transformers"]),
        "columns": descriptions(),
        "rows": {},
    }
    for row, name in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes = {column: outcome(row, column, Path(folder)) for column in COLUMNS}
        content["rows"][row] = {"model": ARCHITECTURES[name].model, "outcomes": outcomes}
        print(row, *outcomes.values(), sep=" | ", flush=True)  # noqa: T201 - a program
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
