"""Oracle of the plain alternation of LoftQ and LQ-LoRA, for any quantizer and low-rank step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np


def alternation(
    matrix: np.ndarray,
    rounded: Callable[[np.ndarray], np.ndarray],
    approximated: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the quantized and the low-rank part of each iterate, from a starting low-rank part."""
    product = start
    while True:
        quantized = rounded(matrix - product)
        product = approximated(matrix - quantized)
        yield quantized, product
