"""A suite of properties for any quantizer: what is promised of ours can be asked of others."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lqlora.codebooks import Codebook
from lqlora.errors import ConformanceError, InvalidArgumentError
from lqlora.testing._running import try_properties
from lqlora.testing.quantizers._properties import REGISTRY
from lqlora.testing.quantizers._subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy.typing as npt

    from lqlora.testing.report import Report

__all__ = ["PROPERTIES", "assert_quantizer_conforms", "check_quantizer"]

#: The promise of each property by its name.
PROPERTIES: Mapping[str, str] = MappingProxyType({name: prop.statement for name, prop in REGISTRY.items()})


def check_quantizer(
    quantize: Callable[[Any], Any],
    dequantize: Callable[[Any], Any],
    *,
    adapt: Callable[[npt.NDArray[Any]], Any] | None = None,
    block_size: int | None = None,
    size_multiple: int = 1,
    levels: Codebook | Sequence[float] | npt.NDArray[Any] | None = None,
    ties_to: Literal["lower", "upper"] | None = None,
    symmetric: bool = False,
    independent_blocks: bool = True,
    tolerance: float = 2.0**-20,
    scale_tolerance: float = 0.0,
    smallest: float = 2.0**-100,
    largest: float = 2.0**100,
    only: Collection[str] | None = None,
    exclude: Collection[str] = (),
    max_examples: int = 100,
    derandomize: bool = True,
) -> Report:
    """Try every property that applies on a quantizer, each by many inputs that Hypothesis draws.

    Parameters
    ----------
    quantize : callable
        Takes an array of float32, mostly of one dimension, and returns anything.
    dequantize : callable
        Takes what ``quantize`` returned, and returns an array of the same shape, of any library.
    adapt : callable, optional
        Turns a NumPy array into what ``quantize`` takes, such as ``torch.from_numpy``. What it raises is no fault of
        the quantizer: layouts and dtypes that it refuses are passed over.
    block_size : int, optional
        Weights per scale, in row-major order. Properties of blocks need it.
    size_multiple : int, default 1
        Where the quantizer takes only multiples of a number of weights, that number: all properties but those of odd
        sizes, tails, single weights and none then keep to it.
    levels : Codebook or sequence of float, optional
        Values a code can stand for, where the largest weight of a block stands for the largest absolute level.
    ties_to : {"lower", "upper"}, optional
        Which of two levels a weight midway between them goes to. If None, any.
    symmetric : bool, default False
        True if turned signs should come back as turned signs.
    independent_blocks : bool, default True
        False if blocks share anything, such as scales that are quantized themselves. Properties that say otherwise are
        then skipped.
    tolerance : float, default 2**-20
        Error allowed beyond what the levels make necessary, as a fraction of the largest weight of the block.
    scale_tolerance : float, default 0.0
        The same, for scales that are rounded: a fraction of the largest weight of the block, or of the array if
        blocks are not independent. Used by the error bounds only.
    smallest, largest : float, default 2**-100 and 2**100
        Range of the largest absolute weight of a block in which the quantizer works; it includes 1/4 and 1. The
        properties "subnormal" and "huge" leave it on purpose.
    only : collection of str, optional
        Names of the properties to try.
    exclude : collection of str, optional
        Names of properties to skip.
    max_examples : int, default 100
        Inputs per property.
    derandomize : bool, default True
        The same inputs at every run. False draws others each time.

    Returns
    -------
    Report
        A finding for each property; whatever the quantizer raises is a finding too.

    Raises
    ------
    InvalidArgumentError
        If a name is none of :data:`PROPERTIES`, levels are not two or more increasing numbers, or a number is out of
        range.

    Notes
    -----
    An input has only the hardship its property is about: the sizes that do not fill a block, for example, are met by
    "ragged_tail" alone. So a fault usually fails one property, the one that is named for it.

    Examples
    --------
    >>> import numpy as np
    >>> def quantize(w):  # forgets that a block may be all zeros
    ...     blocks = w.reshape(-1, 64)
    ...     scales = np.abs(blocks).max(axis=1, keepdims=True)
    ...     return np.rint(blocks / scales * 7), scales, w.shape
    >>> def dequantize(q):
    ...     codes, scales, shape = q
    ...     return (codes / 7 * scales).reshape(shape)
    >>> print(check_quantizer(quantize, dequantize, block_size=64, only=["shape", "zero_block"]))
    shape       passed  What comes back has the shape of the input.
    zero_block  FAILED  A block of zeros beside other blocks comes back as zeros.
                        w = zeros but for 1.0 at 64 (float32, shape (128,)): weight 0.0 at index 0 came
                        back as nan, and as 0.0 if it were right.
    1 passed, 1 failed.
    """
    subject = Subject(
        quantize, dequantize, adapt, block_size, size_multiple, _sorted_levels(levels), ties_to,
        symmetric, independent_blocks, tolerance, scale_tolerance, smallest, largest,
    )  # fmt: skip
    _require_sound(subject)
    return try_properties(REGISTRY, subject, only, exclude, max_examples, derandomize=derandomize)


def assert_quantizer_conforms(
    quantize: Callable[[Any], Any], dequantize: Callable[[Any], Any], **options: Any
) -> Report:
    """Raise if a property fails: one line of a test.

    Parameters
    ----------
    quantize, dequantize : callable
        The quantizer, as in :func:`check_quantizer`.
    **options
        The options of :func:`check_quantizer`.

    Returns
    -------
    Report
        If nothing failed.

    Raises
    ------
    ConformanceError
        If a property failed or could not be tried. It is an AssertionError, and its message is the report.

    Examples
    --------
    >>> import lqlora as lq
    >>> fmt = lq.BlockFormat(lq.NF4, 16)
    >>> report = assert_quantizer_conforms(
    ...     lambda w: lq.quantize(w, fmt), lq.dequantize, block_size=16, levels=lq.NF4, max_examples=10
    ... )
    >>> report["error_bound"].result
    'passed'
    """
    report = check_quantizer(quantize, dequantize, **options)
    if not report.passed:
        raise ConformanceError(f"The quantizer fails {', '.join(report.failed)}.\n{report}")
    return report


def _sorted_levels(levels: Codebook | Sequence[float] | npt.NDArray[Any] | None) -> npt.NDArray[np.float64] | None:
    if levels is None:
        return None
    values = np.array(levels.levels if isinstance(levels, Codebook) else levels, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all() or not (np.diff(values) > 0).all():
        raise InvalidArgumentError("Levels are two or more finite numbers, each above the one before.")
    return values


def _require_sound(subject: Subject) -> None:
    for name in ("block_size", "size_multiple"):
        number = getattr(subject, name)
        absent = name == "block_size" and number is None
        if not absent and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise InvalidArgumentError(f"{name} is an integer of at least 1, not {number!r}.")
    if subject.ties_to not in (None, "lower", "upper"):
        raise InvalidArgumentError(f"Ties go to 'lower' or 'upper', not {subject.ties_to!r}.")
    if not (subject.tolerance >= 0 and subject.scale_tolerance >= 0):
        raise InvalidArgumentError("A tolerance is a number, not negative.")
    if not (2.0**-126 <= subject.smallest <= 0.25 and 1 <= subject.largest <= 2.0**127):
        raise InvalidArgumentError("The range of weights must lie in 2**-126 to 2**127, and reach from 1/4 to 1.")
