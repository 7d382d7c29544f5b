"""The quantizer step: how what the low-rank part leaves is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError
from lqlora.quantized import QuantizedArray, gptq, quantize

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.quantized import Fit
    from lqlora.weighting import AbstractWeighting

__all__ = ["Quantizer", "QuantizerName", "make_quantizer"]

QuantizerName: TypeAlias = Literal["nearest", "gptq"]


class Quantizer(Protocol):
    """A quantizer step of one's own."""

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        """Quantize a matrix.

        Parameters
        ----------
        target : array of float32 or float64, shape (m, n)
            The matrix minus a low-rank part.
        previous : QuantizedArray, optional
            What this quantizer returned for the iterate that is gone on from; None for the first.

        Returns
        -------
        QuantizedArray of shape (m, n)
            In the library and on the device of the target.
        """


def make_quantizer(
    quantizer: QuantizerName | Quantizer, fmt: BlockFormat, fit: Fit, weighting: AbstractWeighting, name: str
) -> Quantizer:
    """Return the quantizer step of a decomposition.

    Parameters
    ----------
    quantizer : {"nearest", "gptq"} or callable
        What was asked for.
    fmt : BlockFormat
        Format.
    fit : {"absmax", "scale", "levels+scale"}
        How scales and levels are chosen.
    weighting : AbstractWeighting
        Norm of the residual.
    name : str
        What the matrix is, for errors.

    Returns
    -------
    callable
        The step.

    Raises
    ------
    InvalidArgumentError
        If there is no such quantizer, or the weighting lacks what it needs.
    """
    if callable(quantizer):
        return _Looked(quantizer)
    if quantizer == "nearest":
        return _Nearest(fmt, fit, None if fit == "absmax" else weighting.element_weights(), name)
    if quantizer != "gptq":
        raise InvalidArgumentError(f"quantizer is 'nearest', 'gptq' or a callable, not {quantizer!r}.")
    if weighting.feedback_gram is None:
        raise InvalidArgumentError(
            "quantizer='gptq' feeds errors back by the second moment of the inputs: it needs a weighting that has one, "
            "such as lqlora.weighting.InputGram."
        )
    return _Feedback(fmt, fit, weighting.feedback_gram, name)


@dataclass(frozen=True)
class _Nearest:
    """Nearest levels, fitted from those of the iterate before."""

    fmt: BlockFormat
    fit: Fit
    weights: Array | None
    name: str

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        # The residual may overflow the range of narrow scales although the matrix did not: it is checked, too.
        options: dict[str, Any] = {"weights": self.weights, "fit": self.fit, "name": self.name}
        if self.fit == "absmax" or previous is None:
            return quantize(target, self.fmt, **options)
        return quantize(target, previous.format, start=previous, **options)


@dataclass(frozen=True)
class _Feedback:
    """Error feedback."""

    fmt: BlockFormat
    fit: Fit
    gram: Array
    name: str

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        if self.fit == "absmax" or previous is None:
            return gptq(target, self.fmt, self.gram, fit=self.fit, name=self.name)
        return gptq(target, previous.format, self.gram, fit=self.fit, start=previous, name=self.name)


@dataclass(frozen=True)
class _Looked:
    """A quantizer of one's own, whose results are looked at."""

    quantizer: Quantizer

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        q = self.quantizer(target, previous)
        if not isinstance(q, QuantizedArray) or q.shape != tuple(target.shape):
            found = f"one of shape {q.shape}" if isinstance(q, QuantizedArray) else type(q).__name__
            raise InvalidArgumentError(
                f"The quantizer returned {found}, not a QuantizedArray of shape {tuple(target.shape)}."
            )
        namespace(target, q.packed)
        return q
