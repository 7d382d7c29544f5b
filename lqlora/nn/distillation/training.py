"""Distillation of low-rank factors and scales: the training loop with early stopping, and its report."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lqlora._annotations import annotated
from lqlora._messages import given
from lqlora._options import require_choice, require_integer, require_number
from lqlora._progress import reported
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn.distillation.run_file import RunFile
from lqlora.nn.distillation.teacher import (
    TeacherOutputs,
    collect_outputs,
    divergence,
    evaluation_mode,
    fingerprint,
    logits_of,
    require_outputs,
)
from lqlora.nn.model import quantized_layers
from lqlora.nn.peqa.conversion import train_scales
from lqlora.nn.peqa.linear import PEQALinear
from lqlora.nn.selection import unwrapped
from lqlora.nn.sharding import is_sharded
from lqlora.nn.statistics.batches import parts_of
from lqlora.nn.statistics.hooks import SMALLEST

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

__all__ = ["DistillationReport", "distill"]

#: Steps in which the learning rate rises.
_WARM_UP = 2

#: Averages that the optimizer keeps of each parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq")

#: What can train.
_PARTS = ("factors", "scales")


@dataclass(frozen=True, eq=False)
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
        The dense model, or its outputs for all batches from :func:`collect_outputs`.
    batches : iterable
        Batches as :func:`collect_gram` takes them. Each is one step. Padding is cut.
    held_out : iterable, optional
        Other batches. The model gets the state that has the least divergence on them, which may be the first one.
    train : sequence of {"factors", "scales"}, default ("factors",)
        What trains. With ``"scales"`` each quantized layer becomes a :class:`PEQALinear`, as by :func:`train_scales`, and stays one. Its
        scales take 32 bits each from then on. They are kept at 0 or above, unless the format has signed scales.
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
        If a loss is NaN or infinite. The model then has its best state so far.

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
    steps, tests = _as_list(batches, "batches"), _as_list(held_out, "held_out")
    if not steps:
        raise InvalidArgumentError("batches must hold at least one batch, got none. Was an iterator used up?")
    model = unwrapped(model)
    _require_trainable(model, train)
    if not isinstance(teacher, TeacherOutputs):
        teacher = collect_outputs(teacher, [*steps, *tests], temperature=temperature, progress=progress is True)
    if teacher.temperature != temperature:
        raise InvalidArgumentError(
            f"temperature must be that of the outputs of the teacher, {teacher.temperature}, got {given(temperature)}."
        )
    keys, test_keys = require_outputs(teacher, steps, "batches"), require_outputs(teacher, tests, "held_out")
    student = _Student(model, teacher, dict(zip([*keys, *test_keys], [*steps, *tests], strict=True)), dtype)
    order = keys * epochs
    with _only_training(model, train) as groups:
        for group, rate in zip(groups, (learning_rate, scale_learning_rate), strict=True):
            for own in group:
                own["lr"] = rate * own.pop("unit")
        run = _Run(student, [own for group in groups for own in group], test_keys, patience)
        file = None
        if checkpoint is not None:
            options = [*train, learning_rate, scale_learning_rate, temperature, evaluate_every, patience, str(dtype)]
            settings = {"options": options, "order": [*order, *test_keys], "teacher": _kept_shapes(teacher, order)}
            file = RunFile(checkpoint, fingerprint(_identity(model) | settings))
        run.train(order, evaluate_every, file, progress)
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


def _identity(model: nn.Module) -> dict[str, Any]:
    """Return what does not change in a run: shapes of factors, formats and codes of quantized layers."""
    found: dict[str, Any] = {}
    for name, layer in quantized_layers(model).items():
        array = layer.quantized.array
        found[f"{name}.codes"] = array.codes
        found[f"{name}.format"] = f"{array.format} {array.shape} rank {layer.rank}"
    return found


def _kept_shapes(teacher: TeacherOutputs, keys: Sequence[str]) -> list[Any]:
    """Return the number of classes and the shapes of what is kept of a teacher.

    The values have no part: those of a teacher that ran again may differ in the last bit, and must not end a run.
    """
    return [teacher.classes, *(tuple(values.shape) for key in keys for values, _ in teacher.batches[key])]


@contextmanager
def _only_training(
    model: nn.Module, train: Sequence[str]
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Let gradients flow to what trains alone, and restore flags and gradients at the end.

    Yields groups of parameters for factors and for scales, each with the unit that its learning rate is multiplied by.
    """
    if "scales" in train:
        train_scales(model, train_factors="factors" in train)
    layers = quantized_layers(model).values()
    # Layers may share parameters, which an optimizer takes once.
    low_rank: dict[torch.Tensor, None] = {}
    scales: dict[torch.Tensor, None] = {}
    for layer in layers:
        if "factors" in train and layer.rank:
            low_rank |= dict.fromkeys((layer.lora_A, layer.lora_B))
        if "scales" in train and isinstance(layer, PEQALinear):
            scales[layer.quantized.scales] = None
    before = [(own, own.requires_grad, own.grad) for own in model.parameters()]
    groups = (
        [{"params": [*low_rank], "unit": 1.0}] if low_rank else [],
        [{"params": [own], "unit": max(float(own.detach().abs().mean()), SMALLEST)} for own in scales if own.numel()],
    )
    try:
        model.requires_grad_(requires_grad=False)
        for own in (*low_rank, *scales):
            own.requires_grad_()
        yield groups
    finally:
        for own, flag, gradient in before:
            own.requires_grad_(flag)
            own.grad = gradient


class _Student:
    """Model that trains, with the batches and the outputs of the teacher for them."""

    def __init__(
        self, model: nn.Module, teacher: TeacherOutputs, batches: Mapping[str, Any], dtype: torch.dtype | None
    ) -> None:
        self.model, self._teacher, self._batches, self._dtype = model, teacher, batches, dtype

    @functools.cached_property
    def unsigned_scales(self) -> list[torch.Tensor]:
        """Scales that train, of formats that have no sign for them."""
        layers = (own for own in self.model.modules() if isinstance(own, PEQALinear))
        return [
            own.quantized.scales
            for own in layers
            if own.quantized.scales.requires_grad and own.quantized.format.codebook.normalization != "signed"
        ]

    def divergences(self, key: str) -> Iterator[torch.Tensor]:
        """Yield the divergences of the parts of a batch. Their sum is the mean over all positions."""
        kept = self._teacher.batches[key]
        count = sum(values.shape[0] for values, _ in kept)
        for part, own in zip(parts_of(self.model, self._batches[key]), kept, strict=True):
            with self._autocast():
                logits = logits_of(self.model, part)
            if (seen := tuple(logits.shape)) != (own[0].shape[0], self._teacher.classes):
                raise InvalidArgumentError(
                    f"teacher must have the positions and classes of the model, {seen}, but has {own[0].shape[0]} and "
                    f"{self._teacher.classes}."
                )
            yield divergence(logits, own, self._teacher.temperature) / count

    def _autocast(self) -> AbstractContextManager[Any]:
        device = next(self.model.parameters()).device
        return nullcontext() if self._dtype is None else torch.autocast(device.type, self._dtype)


class _Run:
    """Training with its state: parameters, optimizer, losses, and the best state on held-out batches."""

    def __init__(self, student: _Student, groups: list[dict[str, Any]], tests: Sequence[str], patience: int) -> None:
        self._student, self._tests, self._patience = student, tests, patience
        self._parameters: list[torch.Tensor] = [own for group in groups for own in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self._rates = [group["lr"] for group in groups]
        self._best = [own.detach().clone() for own in self._parameters]
        self.losses: list[float] = []
        self.held_out: dict[int, float] = {}
        self.best_step, self.seconds = 0, 0.0

    @property
    def trainable(self) -> int:
        """Number of entries that train."""
        return sum(own.numel() for own in self._parameters)

    @property
    def _is_stopped(self) -> bool:
        """True if the last measurements are no better than the best one."""
        return sum(step > self.best_step for step in self.held_out) >= self._patience

    def train(self, order: Sequence[str], every: int, file: RunFile | None, progress: Any) -> None:
        """Take one step for each batch, from where the file ends, and leave the best state in the model."""
        if file is not None and (stored := file.read()) is not None:
            self._restore(*stored)
        done = len(self.losses)
        try:
            with reported(progress, "Distilling", len(order), "step", done) as report, torch.enable_grad():
                while len(self.losses) < len(order) and not self._is_stopped:
                    start = time.perf_counter()
                    if not self.losses:
                        self._measure()
                    self._step(order[len(self.losses)], len(order))
                    at_end = len(self.losses) == len(order)
                    if at_end or len(self.losses) % every == 0:
                        self._measure()
                    self.seconds += time.perf_counter() - start
                    if file is not None and (at_end or len(self.losses) % every == 0):
                        file.write(*self._stored())
                    report(len(self.losses))
        except NonFiniteError:
            self._put(self._best)
            raise
        finally:
            if self._tests:
                self._put(self._best)
        if not self._tests:
            self.best_step = len(self.losses)

    def _step(self, key: str, total: int) -> None:
        step = len(self.losses)
        # Step k of n (from 0) has the share min((k + 1) / (w + 1), (n - k) / n): the last one is small, but not zero.
        share = min((step + 1) / (_WARM_UP + 1), (total - step) / total)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for own in self._student.divergences(key):
            loss += float(own.detach())
            own.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, 1.0))
        for what, value in {"loss": loss, "gradient of the loss": norm}.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{what} must be finite, got {value} at step {step}, counted from 0. Lower learning_rate, or leave out dtype. The "
                    f"model has its state after step {self.best_step}."
                )
        self._optimizer.step()
        with torch.no_grad():
            for scales in self._student.unsigned_scales:
                scales.clamp_(min=0)
        self.losses.append(loss)

    def _measure(self) -> None:
        """Measure the divergence on held-out batches, and keep the state if it is the least."""
        if not self._tests:
            return
        with evaluation_mode(self._student.model), torch.no_grad():
            values = [float(own) for key in self._tests for own in self._student.divergences(key)]
        found = math.fsum(values) / len(self._tests)
        step = len(self.losses)
        self.held_out[step] = found
        if found <= min(self.held_out.values()):
            self.best_step, self._best = step, [own.detach().clone() for own in self._parameters]

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for own, value in zip(self._parameters, values, strict=True):
                own.copy_(value)

    def _stored(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return tensors and numbers from which the run goes on."""
        tensors = {"random": torch.get_rng_state()}
        for position, (own, best) in enumerate(zip(self._parameters, self._best, strict=True)):
            state = self._optimizer.state[own]
            moments = {key: state[key] for key in _MOMENTS if key in state}
            named = {"now": own.detach(), "best": best, **moments}
            tensors |= {f"{position}.{key}": value for key, value in named.items()}
        held_out = {str(step): value for step, value in self.held_out.items()}
        numbers = {"losses": self.losses, "held_out": held_out, "best_step": self.best_step, "seconds": self.seconds}
        return tensors, numbers

    def _restore(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what was stored."""
        self.losses, self.best_step, self.seconds = numbers["losses"], numbers["best_step"], numbers["seconds"]
        self.held_out = {int(step): value for step, value in numbers["held_out"].items()}
        torch.set_rng_state(tensors["random"])
        self._put([tensors[f"{position}.now"] for position in range(len(self._parameters))])
        for position, own in enumerate(self._parameters):
            self._best[position].copy_(tensors[f"{position}.best"])
            if f"{position}.{_MOMENTS[0]}" in tensors:
                moments = {key: tensors[f"{position}.{key}"].to(own.device) for key in _MOMENTS}
                self._optimizer.state[own] = {"step": torch.tensor(float(len(self.losses))), **moments}
