"""Conformance suite for quantizers: ``check_quantizer`` and ``assert_quantizer_conforms``."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lqlora._annotations import annotated
from lqlora._options import require_choice, require_integer, require_number
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

#: Statement of each property by its name.
PROPERTIES: Mapping[str, str] = MappingProxyType({name: prop.statement for name, prop in REGISTRY.items()})


@annotated
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
    """Check every property that applies to a quantizer, each on many inputs that Hypothesis draws.

    Parameters
    ----------
    quantize : callable
        Function of an array, mostly float32 of one dimension. It may return any object.
    dequantize : callable
        Function of the result of ``quantize`` that returns an array of the same shape, of any library.
    adapt : callable, optional
        Function that converts a NumPy array for ``quantize``, such as ``torch.from_numpy``. Layouts and dtypes for
        which it raises are left out.
    block_size : int, optional
        Weights per scale, in row-major order. Properties about blocks need it.
    size_multiple : int, default 1
        Every number of weights that is quantized is a multiple of this, except in the properties about odd sizes,
        tails, single weights and empty arrays.
    levels : Codebook or sequence of float, optional
        Values of the codes. The largest absolute weight of a block maps to the largest absolute level.
    ties_to : {"lower", "upper"}, optional
        Level that a weight midway between two levels goes to; either one if None.
    symmetric : bool, default False
        True if negated weights should give negated results.
    independent_blocks : bool, default True
        False if blocks influence each other, as under double quantization. Properties that need independent blocks are
        then skipped.
    tolerance : float, default 2**-20
        Error allowed beyond half the widest gap between levels, as a fraction of the absmax of the block.
    scale_tolerance : float, default 0.0
        Error allowed for rounded scales, as a fraction of the absmax of the block, or of the array if blocks are not
        independent. Only the error bounds use it.
    smallest, largest : float, default 2**-100 and 2**100
        Range of the absmax of a block that the quantizer supports. It must include 1/4 and 1. Only the properties
        "subnormal" and "huge" go beyond it.
    only : collection of str, optional
        Names of the properties to check; all by default.
    exclude : collection of str, optional
        Names of properties to skip.
    max_examples : int, default 100
        Number of inputs for each property.
    derandomize : bool, default True
        True draws the same inputs in every run, False draws new ones.

    Returns
    -------
    Report
        One finding for each property. Exceptions of the quantizer are findings too.

    Raises
    ------
    InvalidArgumentError
        If a name is not in :data:`PROPERTIES`, levels are not two or more increasing numbers, or a number is out of
        range.

    Notes
    -----
    Each input is hard in one respect only. Short last blocks, for example, occur in "ragged_tail" alone. So a fault
    usually fails one property, whose name says what is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> def quantize(w):  # divides by zero in a block of zeros
    ...     blocks = w.reshape(-1, 64)
    ...     scales = np.abs(blocks).max(axis=1, keepdims=True)
    ...     return np.rint(blocks / scales * 7), scales, w.shape
    >>> def dequantize(q):
    ...     codes, scales, shape = q
    ...     return (codes / 7 * scales).reshape(shape)
    >>> print(check_quantizer(quantize, dequantize, block_size=64, only=["shape", "zero_block"]))
    shape       passed  The result has the shape of the input.
    zero_block  FAILED  A block of zeros among other blocks gives zeros.
                        w = zeros except 1.0 at 64 (float32, shape (128,)): weight 0.0 at index 0 gave nan
                        instead of 0.0.
    1 passed, 1 failed.
    """
    subject = Subject(
        quantize, dequantize, adapt, block_size, size_multiple, _sorted_levels(levels),
        isinstance(levels, Codebook) and levels.normalization == "signed", ties_to,
        symmetric, independent_blocks, tolerance, scale_tolerance, smallest, largest,
    )  # fmt: skip
    _require_sound(subject)
    return try_properties(REGISTRY, subject, only, exclude, max_examples, derandomize=derandomize)


def assert_quantizer_conforms(
    quantize: Callable[[Any], Any], dequantize: Callable[[Any], Any], **options: Any
) -> Report:
    """Check a quantizer as :func:`check_quantizer` does, and raise if a property fails. Use it in a test.

    Parameters
    ----------
    quantize, dequantize : callable
        The quantizer, as in :func:`check_quantizer`.
    **options
        Options of :func:`check_quantizer`.

    Returns
    -------
    Report
        The report, if nothing failed.

    Raises
    ------
    ConformanceError
        If a property failed or could not be checked. It is an AssertionError, and its message is the report.

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
        raise ConformanceError(f"quantizer fails {', '.join(report.failed)}.\n{report}")
    return report


def _sorted_levels(levels: Codebook | Sequence[float] | npt.NDArray[Any] | None) -> npt.NDArray[np.float64] | None:
    if levels is None:
        return None
    values = np.array(levels.levels if isinstance(levels, Codebook) else levels, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all() or not (np.diff(values) > 0).all():
        raise InvalidArgumentError(
            f"levels must be two or more finite numbers in increasing order, got {values!r:.200}."
        )
    return values


def _require_sound(subject: Subject) -> None:
    for name in ("block_size", "size_multiple"):
        number = getattr(subject, name)
        if name == "size_multiple" or number is not None:
            require_integer(number, name, 1)
    if subject.ties_to is not None:
        require_choice(subject.ties_to, "ties_to", ("lower", "upper"))
    for name in ("tolerance", "scale_tolerance"):
        require_number(getattr(subject, name), name, "at least 0", lambda own: own >= 0)
    require_number(
        subject.smallest, "smallest", f"between {2.0**-126:.6g} and 0.25", lambda own: 2.0**-126 <= own <= 0.25
    )
    require_number(subject.largest, "largest", f"between 1 and {2.0**127:.6g}", lambda own: 1 <= own <= 2.0**127)
