"""Run of a distillation: what trains, the steps, the measurements, and the state from which it goes on."""

from __future__ import annotations

import functools
import math
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora._progress import reported
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn.distillation.teacher import divergence, logits_of
from lqlora.nn.model import quantized_layers
from lqlora.nn.modes import evaluation_mode
from lqlora.nn.peqa.conversion import train_scales
from lqlora.nn.peqa.linear import PEQALinear
from lqlora.nn.statistics.batches import parts_of
from lqlora.nn.statistics.hooks import SMALLEST

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from lqlora.nn.distillation.run_file import RunFile
    from lqlora.nn.distillation.teacher import TeacherOutputs

__all__ = ["Run", "Student", "only_training"]

#: Steps in which the learning rate rises.
_WARM_UP = 2

#: Averages that the optimizer keeps of each parameter, and the number of its own steps: a parameter without a gradient takes none.
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@contextmanager
def only_training(
    model: nn.Module, train: Sequence[str]
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Let gradients flow to what trains alone, and restore flags, gradients and dtypes at the end.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers.
    train : sequence of {"factors", "scales"}
        What trains.

    Yields
    ------
    tuple of list of dict
        Groups of parameters for factors and for scales, each with the unit that its learning rate is multiplied by.
    """
    if "scales" in train:
        train_scales(model, train_factors="factors" in train)
    low_rank, scales = _chosen(model, train)
    before = [(own, own.requires_grad, own.grad) for own in model.parameters()]
    # Small steps would vanish in a half precision.
    halves = [(own, own.dtype) for own in low_rank if own.dtype.itemsize < torch.float32.itemsize]
    norms = [own for own in model.modules() if isinstance(own, nn.modules.batchnorm._BatchNorm) and own.training]  # noqa: SLF001
    groups = (
        [{"params": low_rank, "unit": 1.0}] if low_rank else [],
        [{"params": [own], "unit": max(float(own.detach().abs().mean()), SMALLEST)} for own in scales if own.numel()],
    )
    try:
        model.requires_grad_(requires_grad=False)
        for own in (*low_rank, *scales):
            own.grad = None
        for own, _ in halves:
            own.data = own.data.float()
        for norm in norms:  # their averages do not train
            norm.eval()
        for own in (*low_rank, *scales):
            own.requires_grad_()
        yield groups
    finally:
        for own, dtype in halves:
            own.grad = None
            own.data = own.data.to(dtype)
        for norm in norms:
            norm.train()
        for own, flag, gradient in before:
            own.requires_grad_(flag)
            own.grad = gradient


def _chosen(model: nn.Module, train: Sequence[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the factors and the scales that train. Layers may share them, and an optimizer takes each once."""
    low_rank: dict[torch.Tensor, None] = {}
    scales: dict[torch.Tensor, None] = {}
    for layer in quantized_layers(model).values():
        if "factors" in train and layer.rank:
            low_rank |= dict.fromkeys((layer.lora_A, layer.lora_B))
        if "scales" in train and isinstance(layer, PEQALinear):
            scales[layer.quantized.scales] = None
    return [*low_rank], [*scales]


class Student:
    """Model that trains, with the batches and the outputs of the teacher for them.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    teacher : TeacherOutputs
        Outputs of the teacher.
    batches : mapping of str to object
        Batches by fingerprint.
    dtype : torch.dtype, optional
        Dtype of autocast.
    """

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

    def positions(self, key: str) -> int:
        """Return the number of positions of a batch.

        Parameters
        ----------
        key : str
            Fingerprint of the batch.

        Returns
        -------
        int
            Positions of all parts.
        """
        return sum(values.shape[0] for values, _ in self._teacher.batches[key])

    def divergences(self, key: str) -> Iterator[torch.Tensor]:
        """Yield the divergences of the parts of a batch. Their sum is the mean over all positions.

        Parameters
        ----------
        key : str
            Fingerprint of the batch.

        Yields
        ------
        Tensor of float32, shape ()
            Divergence of a part, divided by the positions of the batch.

        Raises
        ------
        InvalidArgumentError
            If the model has other positions or classes than the teacher.
        """
        kept = self._teacher.batches[key]
        count = self.positions(key)
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


class Run:
    """Training with its state: parameters, optimizer, losses, and the best state on held-out batches.

    Parameters
    ----------
    student : Student
        The model with its batches.
    groups : list of dict
        Groups of parameters with their largest learning rates.
    tests : sequence of str
        Fingerprints of the held-out batches.
    patience : int
        Measurements without a new least value that end the run.

    Attributes
    ----------
    losses : list of float
        Divergence at each step.
    held_out : dict of int to float
        Divergence on held-out batches by steps.
    best_step : int
        Number of steps of the best state.
    seconds : float
        Time of steps and measurements.
    """

    def __init__(self, student: Student, groups: list[dict[str, Any]], tests: Sequence[str], patience: int) -> None:
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

    def train(
        self,
        order: Sequence[str],
        every: int,
        file: RunFile | None,
        stored: tuple[dict[str, torch.Tensor], dict[str, Any]] | None,
        progress: Any,
    ) -> None:
        """Take one step for each batch, from what the file held, and leave the best state in the model.

        Parameters
        ----------
        order : sequence of str
            Fingerprint of the batch of each step.
        every : int
            Steps between measurements and writes.
        file : RunFile, optional
            Where the state is kept.
        stored : tuple of dict, optional
            State to go on from.
        progress : bool or callable
            See :func:`distill`.

        Raises
        ------
        NonFiniteError
            If a loss, a gradient or a measurement is NaN or infinite.
        """
        if stored is not None:
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
            if not own.requires_grad:
                raise InvalidArgumentError(
                    "model must compute its logits with what trains, but no gradient reaches it. Leave torch.inference_mode, and look "
                    "for detach in the model."
                )
            loss += float(own.detach())
            own.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, 1.0))
        for what, value in {"loss": loss, "gradient of the loss": norm}.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{what} must be finite, got {value} at step {step}, counted from 0. Lower learning_rate, or leave out dtype. The "
                    f"model has its state after step {self.best_step}."
                )
        if not self._tests:
            self.best_step = step
            for best, own in zip(self._best, self._parameters, strict=True):
                best.copy_(own.detach())
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
            counts = [self._student.positions(key) for key in self._tests]
            pairs = zip(self._tests, counts, strict=True)
            values = [count * float(own) for key, count in pairs for own in self._student.divergences(key)]
        found = math.fsum(values) / sum(counts)
        step = len(self.losses)
        if not math.isfinite(found):
            raise NonFiniteError(
                f"divergence on held_out must be finite, got {found} after step {step}. Lower learning_rate, or leave out dtype. The model "
                f"has its state after step {self.best_step}."
            )
        least = min(self.held_out.values(), default=math.inf)
        self.held_out[step] = found
        if found < least:
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
                averages = {key: tensors[f"{position}.{key}"].to(own.device) for key in _MOMENTS[:2]}
                self._optimizer.state[own] = {"step": tensors[f"{position}.step"], **averages}
