"""Distillation of low-rank factors and scales: options, and the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora._annotations import annotated
from lqlora._files import check_writable
from lqlora._messages import given
from lqlora._options import require_choice, require_integer, require_number
from lqlora.errors import InvalidArgumentError
from lqlora.nn.distillation.run import Run, Student, only_training
from lqlora.nn.distillation.run_file import RunFile
from lqlora.nn.distillation.teacher import (
    TeacherOutputs,
    collect_outputs,
    fingerprint,
    require_outputs,
)
from lqlora.nn.model import quantized_layers
from lqlora.nn.selection import unwrapped
from lqlora.nn.sharding import is_sharded

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["DistillationReport", "distill"]

#: What can train.
_PARTS = ("factors", "scales")


@dataclasses.dataclass(frozen=True, eq=False)
class DistillationReport:
    """Course of a distillation. Printing it sums it up.

    Parameters
    ----------
    losses : list of float
        Divergence from the teacher at each step before its update, in nats per position.
    held_out : dict of int to float
        The same on the held-out batches by the number of steps before. Empty without held-out batches.
    best_step : int
        Number of steps of the state that the model has now.
    trainable : int
        Number of entries that trained.
    seconds : float
        Time of all steps and evaluations, those of earlier calls of the same run included.
    """

    losses: list[float]
    held_out: dict[int, float]
    best_step: int
    trainable: int
    seconds: float

    def __str__(self) -> str:
        kept = f"state after step {self.best_step} of {len(self.losses)}"
        lines = [f"distilled: {self.trainable:,} parameters, {len(self.losses)} steps, {self.seconds:.0f} s, {kept}"]
        if self.losses:
            lines.append(f"divergence in training: {self.losses[0]:.4f} at first, {self.losses[-1]:.4f} at last")
        if self.held_out:
            lines.append(f"divergence held out: {self.held_out[0]:.4f} before, {self.held_out[self.best_step]:.4f} now")
        return "\n".join(lines)


@annotated
@torch.inference_mode(mode=False)  # gradients are needed
def distill(
    model: nn.Module,
    teacher: nn.Module | TeacherOutputs,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] = (),
    train: Sequence[str] = ("factors",),
    learning_rate: float = 2e-4,
    scale_learning_rate: float = 1e-3,
    temperature: float = 1.0,
    epochs: int = 1,
    evaluate_every: int = 8,
    patience: int = 3,
    dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[int, int | None], None] = True,
) -> DistillationReport:
    r"""Train the low-rank factors of a quantized model to give the outputs of the dense one, in place.

    The loss is the Kullback-Leibler divergence of the outputs from those of the teacher. Fifty steps repair much of what two or three
    bits damage. Unlike the loss of the next token, it does not adapt the model to the text: a text of another kind gains, too. Use it
    after :func:`quantize_model`, and before you fine-tune.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers, in the mode it is to train in. All that does not train is frozen for the time of the call.
    teacher : torch.nn.Module or TeacherOutputs
        The dense model, or its outputs for all batches from :func:`collect_outputs`. Their probabilities are those of one class of
        several (softmax).
    batches : iterable
        Batches as :func:`collect_gram` takes them. Each is one step. Padding is cut.
    held_out : iterable, optional
        Other batches. The model gets the state that has the least divergence on them, which may be the first one.
    train : sequence of {"factors", "scales"}, default ("factors",)
        What trains. With ``"scales"`` each quantized layer becomes a :class:`PEQALinear`, as by :func:`train_scales`, and stays one. Its
        scales take 32 bits each from then on. They are kept at 0 or above, unless the format has signed scales. Without ``"factors"``
        the factors are frozen afterwards, as by :func:`train_scales`.
    learning_rate : float, default 2e-4
        Largest learning rate of factors.
    scale_learning_rate : float, default 1e-3
        Largest learning rate of scales, relative to the mean of the scales of each layer.
    temperature : float, default 1.0
        Number that the logits of both models are divided by. It must be that of the outputs, if ``teacher`` holds outputs.
    epochs : int, default 1
        How many times each batch is used.
    evaluate_every : int, default 8
        Steps between measurements on ``held_out``, and between writes of ``checkpoint``.
    patience : int, default 3
        Stop after this number of measurements on ``held_out`` without a new least value.
    dtype : torch.dtype, optional
        Dtype of autocast, ``torch.bfloat16`` or ``torch.float16``. By default there is no autocast. float16 has no scaling of the loss.
    checkpoint : path-like, optional
        File from which the run goes on, if it exists, and where it is kept. A call with the same model, batches and options goes on
        to the same result as a run without a break. The file stays at the end, and then the call returns at once. Another run is
        told by its codes, batches, options, and the classes kept of the teacher. The values of factors and teacher are not compared.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts steps. A bar counts the batches of a teacher first.

    Returns
    -------
    DistillationReport
        Losses, measurements, and the step whose state the model has.

    Raises
    ------
    InvalidArgumentError
        If the model has nothing to train, there are no batches, the teacher has not seen a batch or has other classes, or an option is
        out of its range.
    CheckpointError
        If the file is damaged, or belongs to another run.
    NonFiniteError
        If a loss or a gradient is NaN or infinite. The model then has its best state so far, or without held-out batches the last one whose
        loss was finite.

    Notes
    -----
    AdamW with betas of 0.9 and 0.98 and without weight decay. The learning rate rises for two steps, and falls to zero linearly.
    Gradients are clipped to a total norm of 1. If the call ends with an error or is interrupted, the model has the best state so far
    with held-out batches, and otherwise the state of the last step.

    References
    ----------
    Hinton, Vinyals and Dean, arXiv 1503.02531, section 2. RILQ, arXiv 2412.01129, trains low-rank factors alone in this way.

    Examples
    --------
    >>> import copy, torch, lqlora as lq
    >>> _ = torch.manual_seed(0)
    >>> teacher = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 50))
    >>> model = copy.deepcopy(teacher)
    >>> _ = lq.nn.quantize_model(model, lq.BlockFormat.parse("nf2/64:float32"), rank=4, include="1")
    >>> batches = list(torch.arange(48).view(6, 1, 8))
    >>> report = distill(model, teacher, batches, epochs=20, learning_rate=0.01)
    >>> report.losses[-1] < report.losses[0] / 2
    True
    """
    _require_options(train, learning_rate, scale_learning_rate, temperature, epochs, evaluate_every, patience, dtype)
    learning_rate, scale_learning_rate, temperature = map(float, (learning_rate, scale_learning_rate, temperature))
    steps, tests = _as_list(batches, "batches"), _as_list(held_out, "held_out")
    if not steps:
        raise InvalidArgumentError("batches must hold at least one batch, got none. Was an iterator used up?")
    model = unwrapped(model)
    _require_trainable(model, train)
    if isinstance(teacher, nn.Module) and not set(quantized_layers(model).values()).isdisjoint(teacher.modules()):
        raise InvalidArgumentError(
            "teacher must be another model than the one that trains, but has the same quantized layers. Call collect_outputs before "
            "quantize_model, or quantize a copy."
        )
    if checkpoint is not None:
        check_writable(checkpoint)
    if not isinstance(teacher, TeacherOutputs):
        teacher = collect_outputs(teacher, [*steps, *tests], temperature=temperature, progress=progress is True)
    if teacher.temperature != temperature:
        raise InvalidArgumentError(
            f"temperature must be that of the outputs of the teacher, {teacher.temperature}, got {given(temperature)}."
        )
    keys, test_keys = require_outputs(teacher, steps, "batches"), require_outputs(teacher, tests, "held_out")
    student = Student(model, teacher, dict(zip([*keys, *test_keys], [*steps, *tests], strict=True)), dtype)
    order = keys * epochs
    file = stored = None
    if checkpoint is not None:
        numbers = [learning_rate, scale_learning_rate, temperature, int(evaluate_every), int(patience)]
        settings = {
            "options": [*sorted(set(train)), *numbers, str(dtype)],
            "order": [*order, *test_keys],
            "teacher": _kept_shapes(teacher, order),
        }
        file = RunFile(checkpoint, fingerprint(_identity(model, train) | settings))
        stored = file.read()  # refused before layers are replaced
    with only_training(model, train) as groups:
        for group, rate in zip(groups, (learning_rate, scale_learning_rate), strict=True):
            for own in group:
                own["lr"] = rate * own.pop("unit")
        run = Run(student, [own for group in groups for own in group], test_keys, patience)
        run.train(order, evaluate_every, file, stored, progress)
    return DistillationReport(run.losses, run.held_out, run.best_step, run.trainable, run.seconds)


def _require_options(
    train: Sequence[str],
    learning_rate: float,
    scale_learning_rate: float,
    temperature: float,
    epochs: int,
    evaluate_every: int,
    patience: int,
    dtype: torch.dtype | None,
) -> None:
    """Raise if an option is out of its range."""
    if isinstance(train, str) or not train:
        raise InvalidArgumentError(f"train must be a sequence of {_PARTS[0]!r} and {_PARTS[1]!r}, got {given(train)}.")
    for part in train:
        require_choice(part, "train", _PARTS)
    positive = {"learning_rate": learning_rate, "scale_learning_rate": scale_learning_rate, "temperature": temperature}
    for name, value in positive.items():
        require_number(value, name, "above 0 and finite", lambda own: 0 < own < math.inf)
    for name, count in {"epochs": epochs, "evaluate_every": evaluate_every, "patience": patience}.items():
        require_integer(count, name, 1)
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise InvalidArgumentError(f"dtype must be torch.bfloat16, torch.float16 or None, got {given(dtype)}.")


def _as_list(batches: Iterable[Any], name: str) -> list[Any]:
    if isinstance(batches, Mapping | torch.Tensor):
        raise InvalidArgumentError(f"{name} must be several batches, such as a list, got one. Pass [batch].")
    return list(batches)


def _require_trainable(model: nn.Module, train: Sequence[str]) -> None:
    """Raise if there is nothing to train, or only some processes have it."""
    layers = quantized_layers(model)
    if is_sharded(model.parameters()):
        raise InvalidArgumentError(
            "model must be whole, but is shared out to several processes. Distill before fully_shard."
        )
    if "factors" in train and not any(layer.rank for layer in layers.values()):
        raise InvalidArgumentError(
            f"model must have low-rank factors to train, but the rank of all {len(layers)} quantized layers is 0. Quantize it with a "
            "positive rank, or pass train=('scales',)."
        )


def _identity(model: nn.Module, train: Sequence[str]) -> dict[str, Any]:
    """Return what does not change in a run: shapes of factors, formats and codes of quantized layers."""
    found: dict[str, Any] = {}
    for name, layer in quantized_layers(model).items():
        array = layer.quantized.array
        found[f"{name}.codes"] = array.codes
        fmt = dataclasses.replace(array.format, scales="float32") if "scales" in train else array.format
        found[f"{name}.format"] = f"{fmt} {array.shape} rank {layer.rank}"
    return found


def _kept_shapes(teacher: TeacherOutputs, keys: Sequence[str]) -> list[Any]:
    """Return the number of classes and the shapes of what is kept of a teacher.

    The values have no part: those of a teacher that ran again may differ in the last bit, and must not end a run.
    """
    return [teacher.classes, *(tuple(values.shape) for key in keys for values, _ in teacher.batches[key])]
