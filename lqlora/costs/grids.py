"""Grids of formats to choose from: the configurations that LQ-LoRA searches."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Literal

from lqlora._options import require_choice
from lqlora.codebooks import normal_float
from lqlora.formats import BlockFormat, ScaleFormat

if TYPE_CHECKING:
    from lqlora._typing import FloatName

__all__ = ["paper_grid"]


def paper_grid(which: Literal["code", "paper"] = "code") -> list[BlockFormat]:
    """Return all formats that LQ-LoRA searches.

    Parameters
    ----------
    which : {"code", "paper"}
        ``"code"``: the 432 formats of the published code, with codes of 2, 3, 4 or 8 bits. ``"paper"``: the 243 of the
        paper's table, with 2, 3 or 4 bits.

    Returns
    -------
    list of BlockFormat
        NormalFloat codes in blocks of 16, 32 or 64; scales of the same choice of bits in blocks of 16, 64 or 256;
        second-level scales in bfloat16, float16 or float32.

    Raises
    ------
    InvalidArgumentError
        If ``which`` has another value.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, table 1.

    Examples
    --------
    >>> len(paper_grid("code")), len(paper_grid("paper"))
    (432, 243)
    """
    widths = {"code": (2, 3, 4, 8), "paper": (2, 3, 4)}
    require_choice(which, "which", widths)
    dtypes: tuple[FloatName, ...] = ("bfloat16", "float16", "float32")
    return [
        BlockFormat(normal_float(b0), size0, ScaleFormat(b1, size1, dtype))
        for b0, size0, b1, size1, dtype in product(widths[which], (16, 32, 64), widths[which], (16, 64, 256), dtypes)
    ]
