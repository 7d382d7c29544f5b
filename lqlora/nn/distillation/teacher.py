"""Outputs of a teacher that are kept for distillation: the largest probabilities at each position, and the divergence from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lqlora._annotations import annotated
from lqlora._options import require_integer, require_number
from lqlora._progress import reported
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn.modes import evaluation_mode
from lqlora.nn.statistics.batches import parts_of, run_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

__all__ = [
    "TeacherOutputs",
    "collect_outputs",
    "divergence",
    "fingerprint",
    "logits_of",
    "require_outputs",
]


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """Outputs of a teacher for some batches, in host memory. :func:`collect_outputs` makes them.

    Parameters
    ----------
    classes : int
        Number of classes, which is the size of the vocabulary for a language model.
    temperature : float
        Temperature of the probabilities.
    batches : dict of str to list of tuple of Tensor
        By fingerprint of the batch, for each part of it that runs at once. The first tensor has the logarithms of the largest
        probabilities at each position, and of the sum of the others in a last column: float16, shape (positions, kept + 1). The second
        has the classes of the former in int32, shape (positions, kept). If all classes are kept, the first has them in the order of
        the logits, and the second is empty.
    """

    classes: int
    temperature: float
    batches: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(own.nbytes for parts in self.batches.values() for pair in parts for own in pair)


@annotated
def collect_outputs(
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    top_k: int | None = 512,
    temperature: float = 1.0,
    progress: bool | Callable[[int, int | None], None] = True,
) -> TeacherOutputs:
    """Return the outputs of a dense model that :func:`distill` trains a quantized one to give.

    With them the teacher need not be in memory while the other model trains. 512 kept classes take 3 kB for each token.

    Parameters
    ----------
    teacher : torch.nn.Module
        Any model that returns logits, or an object that has ``logits``. It runs in evaluation mode, and is the same afterwards.
    batches : iterable
        Batches for training and for evaluation, as :func:`collect_gram` takes them. Padding is cut.
    top_k : int, optional
        Number of classes to keep at each position, those with the largest logits. None keeps all of them.
    temperature : float, default 1.0
        Positive number that the logits are divided by.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts batches.

    Returns
    -------
    TeacherOutputs
        Outputs by batch. Equal batches are kept once.

    Raises
    ------
    InvalidArgumentError
        If there are no batches, the model returns no logits, or an option is out of its range.
    NonFiniteError
        If a logit is NaN or infinite.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> _ = torch.manual_seed(0)
    >>> teacher = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> outputs = collect_outputs(teacher, [torch.arange(10)[None]], top_k=4)
    >>> outputs.classes, outputs.nbytes
    (50, 260)
    """
    if top_k is not None:
        require_integer(top_k, "top_k", 1)
    require_number(temperature, "temperature", "above 0 and finite", lambda own: 0 < own < math.inf)
    temperature = float(temperature)
    if isinstance(batches, Mapping | torch.Tensor):
        raise InvalidArgumentError("batches must be several batches, such as a list, got one. Pass [batch].")
    total = None
    with suppress(TypeError, NotImplementedError):
        total = len(batches)  # type: ignore[arg-type]
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    classes = 0
    with evaluation_mode(teacher), torch.no_grad(), reported(progress, "Teacher", total, "batch") as report:
        for done, batch in enumerate(batches, start=1):
            key = fingerprint(batch)
            if key not in found:
                found[key] = []
                for part in parts_of(teacher, batch):
                    logits = logits_of(teacher, part) / temperature
                    if not bool(logits.isfinite().all()):
                        raise NonFiniteError(
                            f"teacher must return finite logits, got NaN or infinity in batch {done - 1}, counted from 0."
                        )
                    classes = logits.shape[-1]
                    if classes == 1:
                        raise InvalidArgumentError(
                            "teacher must have at least 2 classes, got logits of 1, such as those of a regression."
                        )
                    found[key].append(_kept(logits, top_k))
            report(done)
    if not found:
        raise InvalidArgumentError("batches must hold at least one batch, got none. Was an iterator used up?")
    return TeacherOutputs(classes, temperature, found)


def _kept(logits: torch.Tensor, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithms of the largest probabilities and of what is left, and the classes of the former."""
    if top_k is None or top_k >= logits.shape[-1]:
        indices = torch.empty(0, dtype=torch.int32)
    else:
        indices = logits.topk(top_k, dim=-1).indices
    return _events(logits, indices).clamp_min(torch.finfo(torch.float16).min).half().cpu(), indices.int().cpu()


def _events(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities of some classes, and of all others together in a last column."""
    log_p = torch.log_softmax(logits, dim=-1)
    if indices.numel() == 0:
        return log_p
    # The sum over the others, and not one minus the sum over these, which may be rounded to zero.
    rest = log_p.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_p.gather(-1, indices), rest], dim=-1)


def logits_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the logits of a model for a batch in float32, one row for each position.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    batch : mapping or object
        Batch without padding.

    Returns
    -------
    Tensor of float32, shape (positions, classes)
        Logits.

    Raises
    ------
    InvalidArgumentError
        If the model returns none.
    """
    output = run_model(model, batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.ndim < 2 or logits.numel() == 0:
        seen = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InvalidArgumentError(
            f"model must return logits of shape (..., classes), or an object that has logits, got {seen}."
        )
    return logits.float().flatten(0, -2)


def divergence(logits: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    r"""Return the Kullback-Leibler divergence of a model from a teacher, summed over positions.

    Parameters
    ----------
    logits : Tensor of float32, shape (positions, classes)
        Logits of the model.
    kept : tuple of Tensor
        Outputs of the teacher, see :class:`TeacherOutputs`.
    temperature : float, default 1.0
        Temperature of the teacher's outputs.

    Returns
    -------
    Tensor of float32, shape ()
        Divergence in nats, times the square of the temperature.

    Notes
    -----
    If not all classes are kept, the others count as one class with the rest of the probability:

    .. math:: \sum_{c \in K} p_c \log\frac{p_c}{q_c} + p_R \log\frac{p_R}{q_R}.

    By the log-sum inequality this is at most the divergence over all classes.
    """
    values, indices = (own.to(logits.device) for own in kept)
    log_p = torch.log_softmax(values.float(), dim=-1)  # rounding to half precision left a sum that is not exactly 1
    log_q = _events(logits / temperature, indices.long())
    return (log_p.exp() * (log_p - log_q)).sum() * temperature**2


def fingerprint(batch: Any) -> str:
    """Return the SHA-256 fingerprint of the content of a batch.

    Parameters
    ----------
    batch : mapping or object
        Tensors by name, or one tensor.

    Returns
    -------
    str
        Hexadecimal digits.
    """
    total = hashlib.sha256()
    _add(total, "", batch)
    return total.hexdigest()


def _add(total: Any, name: str, value: Any) -> None:
    """Add a value to a hash. The text of a container or a large array would leave entries out."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        total.update(f"{name}:{array.dtype}:{tuple(array.shape)};".encode())
        total.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping | list | tuple):
        total.update(f"{name}[{len(value)}];".encode())
        for key, own in sorted(value.items()) if isinstance(value, Mapping) else enumerate(value):
            _add(total, str(key), own)
    else:
        total.update(f"{name}={value!r};".encode())


def require_outputs(outputs: TeacherOutputs, batches: Sequence[Any], what: str) -> list[str]:
    """Return the fingerprints of batches, all of which a teacher has seen.

    Parameters
    ----------
    outputs : TeacherOutputs
        Outputs of the teacher.
    batches : sequence
        Batches.
    what : str
        Argument that they come from, for errors.

    Returns
    -------
    list of str
        Fingerprints.

    Raises
    ------
    InvalidArgumentError
        If the teacher has not seen a batch.
    """
    keys = [fingerprint(batch) for batch in batches]
    for position, key in enumerate(keys):
        if key not in outputs.batches:
            raise InvalidArgumentError(
                f"{what} must be batches that the teacher has seen, but not so batch {position}, counted from 0. Pass all batches to "
                f"collect_outputs, cut in the same way. Batches that it has seen: {len(outputs.batches)}."
            )
    return keys
