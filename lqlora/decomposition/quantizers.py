"""Quantizer step of the alternation: nearest rounding, error feedback (GPTQ), or a callable of the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from lqlora._dispatch import namespace
from lqlora._options import require_choice
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.quantized import QuantizedArray, gptq, quantize
from lqlora.quantized._rotation import as_rotated, as_stored, rotated

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.quantized import Fit
    from lqlora.weighting import AbstractWeighting

__all__ = ["Quantizer", "QuantizerName", "make_quantizer"]

QuantizerName: TypeAlias = Literal["nearest", "gptq"]


class Quantizer(Protocol):
    """Signature of a custom quantizer, which :func:`lqlora.decompose` accepts as ``quantizer``."""

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        """Quantize a matrix.

        Parameters
        ----------
        target : array of float32 or float64, shape (m, n)
            Matrix minus a low-rank part.
        previous : QuantizedArray, optional
            Result of this quantizer for the iterate that the alternation continues from; None for the first call.

        Returns
        -------
        QuantizedArray of shape (m, n)
            Quantized target, of the same library and on the same device.
        """


def make_quantizer(
    quantizer: QuantizerName | Quantizer, fmt: BlockFormat, fit: Fit, weighting: AbstractWeighting, name: str
) -> Quantizer:
    """Return the quantizer step of a decomposition.

    Parameters
    ----------
    quantizer : {"nearest", "gptq"} or callable
        Name or callable.
    fmt : BlockFormat
        Format of the quantized part.
    fit : {"absmax", "scale", "levels+scale"}
        Rule that chooses scales and levels.
    weighting : AbstractWeighting
        Norm of the residual.
    name : str
        Name of the matrix in error messages.

    Returns
    -------
    callable
        Quantizer step.

    Raises
    ------
    InvalidArgumentError
        If the name is unknown, or the weighting has no second moment of the inputs and ``"gptq"`` needs one.
    """
    if callable(quantizer):
        return _Custom(quantizer)
    require_choice(quantizer, "quantizer", ("nearest", "gptq"))
    if quantizer == "nearest":
        return _nearest(fmt, fit, weighting, name)
    if weighting.feedback_gram is None:
        raise InvalidArgumentError(
            f"quantizer='gptq' needs a weighting with the second moment of the inputs, got {type(weighting).__name__}. "
            "Use lqlora.weighting.InputGram or Kronecker."
        )
    return _ErrorFeedback(fmt, fit, weighting.feedback_gram, name)


def _nearest(fmt: BlockFormat, fit: Fit, weighting: AbstractWeighting, name: str) -> Quantizer:
    """Return the step that rounds to nearest, with the importance of the entries that are rounded."""
    if not isinstance(fmt, BlockFormat) or fmt.rotation is None or fit == "absmax":
        return _Nearest(fmt, fit, None if fit == "absmax" else weighting.element_weights(), name)
    # quantize() knows importance of entries only. A weighting may know more: its whole quadratic form, and the diagonal of that
    # after the rotation.
    importance = weighting.rotated_element_weights(fmt.rotation.seeds)
    return _Rotated(_Nearest(fmt.unrotated, fit, importance, name), fmt, name)


@dataclass(frozen=True)
class _Rotated:
    """A step in the basis of the rotation of a format."""

    inner: Quantizer
    fmt: BlockFormat
    name: str

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        assert self.fmt.rotation is not None
        near = None if previous is None else as_stored(previous)
        return as_rotated(self.inner(rotated(target, self.fmt.rotation, self.name), near), self.fmt)


@dataclass(frozen=True)
class _Nearest:
    """Rounding to the nearest level, with fits of scales and levels that start from the previous iterate."""

    fmt: BlockFormat
    fit: Fit
    importance: Array | None
    name: str

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        # The target is checked, although the matrix was: its scales may leave the range of float16 where those of the
        # matrix did not.
        options: dict[str, Any] = {"weights": self.importance, "fit": self.fit, "name": self.name}
        if self.fit == "absmax" or previous is None:
            return quantize(target, self.fmt, **options)
        return quantize(target, previous.format, start=previous, **options)


@dataclass(frozen=True)
class _ErrorFeedback:
    """Error feedback (GPTQ) by the second moment of the inputs."""

    fmt: BlockFormat
    fit: Fit
    gram: Array
    name: str

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        if self.fit == "absmax" or previous is None:
            return gptq(target, self.fmt, self.gram, fit=self.fit, name=self.name)
        return gptq(target, previous.format, self.gram, fit=self.fit, start=previous, name=self.name)


@dataclass(frozen=True)
class _Custom:
    """Quantizer of the user, with checks of its results."""

    quantizer: Quantizer

    def __call__(self, target: Array, previous: QuantizedArray | None) -> QuantizedArray:
        q = self.quantizer(target, previous)
        if not isinstance(q, QuantizedArray) or q.shape != tuple(target.shape):
            found = f"shape {q.shape}" if isinstance(q, QuantizedArray) else type(q).__name__
            raise InvalidArgumentError(
                f"quantizer must return a QuantizedArray of shape {tuple(target.shape)}, got {found}."
            )
        namespace(target, q.packed)  # raises if the two are of different libraries
        return q
