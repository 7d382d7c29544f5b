"""Uniform codebooks: equally spaced levels, symmetric, unsigned, or with a zero point (affine)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from lqlora._options import require_choice, require_kind
from lqlora.codebooks._checks import cached, require_integer
from lqlora.codebooks.codebook import Codebook
from lqlora.errors import InvalidArgumentError

__all__ = ["affine", "uniform"]


@cached()
def uniform(bits: int, *, signed: bool = True, normalization: Literal["absmax", "signed"] = "absmax") -> Codebook:
    """Return a codebook of equally spaced levels.

    Parameters
    ----------
    bits : int
        Bits of a code, 1 to 8, or 2 to 8 if signed.
    signed : bool, default True
        True: ``2**bits - 1`` levels ``k / (2**(bits-1) - 1)`` from -1 to 1, symmetric about an exact zero.
        False: ``2**bits`` levels ``k / (2**bits - 1)`` from 0 to 1, in which LQ-LoRA stores scales.
    normalization : {"absmax", "signed"}, default "absmax"
        ``"signed"`` uses all codes: the ``2**bits`` integers from ``1 - 2**(bits-1)`` to ``2**(bits-1)``, of which the last stands for the
        entry of a block that is largest, with its sign. It is the grid of Q4_0, Q5_0 and Q8_0 in llama.cpp.

    Returns
    -------
    Codebook
        Codebook named ``int{bits}`` or ``int{bits}s`` if signed, else ``uint{bits}``.

    Raises
    ------
    InvalidArgumentError
        If ``bits`` is out of range, or unsigned integers are to have a normalization of signed ones.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2 (second-level quantization of the scales). llama.cpp, ``ggml-quants.c``, ``quantize_row_q4_0_ref``.

    Examples
    --------
    >>> uniform(2, signed=False).levels.tolist()
    [0.0, 0.3333333432674408, 0.6666666865348816, 1.0]
    >>> uniform(3).levels.size
    7
    >>> uniform(2, normalization="signed").levels.tolist()
    [-1.0, 0.0, 1.0, 2.0]
    """
    require_kind(signed, "signed", bool, "True or False")
    require_integer("bits", bits, 1 + signed, 8, "signed integers" if signed else "unsigned integers")
    require_choice(normalization, "normalization", ("absmax", "signed"))
    if normalization == "signed":
        if not signed:
            raise InvalidArgumentError("normalization must be 'absmax' for unsigned integers, got 'signed'.")
        half = 2 ** (bits - 1)
        return Codebook(np.arange(1 - half, half + 1), name=f"int{bits}s", normalization="signed")
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    codes = np.arange(-steps if signed else 0, steps + 1)
    return Codebook(codes / steps, name=f"{'int' if signed else 'uint'}{bits}")


@cached()
def affine(bits: int, zero_point_bits: int | None = None) -> Codebook:
    """Return the codebook of asymmetric integer quantization, with a zero point for each block.

    A code ``c`` decodes to ``scale * (levels[c] - zero_point)``, with levels ``step * c``. By default the step is 1: zero is one of the
    levels, so zeros stay zero. This is the grid of GPTQ, and of PEQA before training. With more bits a zero point lies between two levels,
    so that each block has a minimum of its own beside its scale, as in the K-quants of llama.cpp. At two bits and blocks of 16 this
    takes a tenth off the error. Zeros may then decode to other numbers, so a sparse matrix does not stay sparse.

    Parameters
    ----------
    bits : int
        Bits of a code, 1 to 8.
    zero_point_bits : int, optional
        Bits of a zero point, from ``bits``, the default, to 8. Each bit more than ``bits`` halves its steps: the gap between two levels
        is ``2**(zero_point_bits - bits)`` steps.

    Returns
    -------
    Codebook
        Codebook of ``2**bits`` levels with normalization ``"affine"``, named ``affine{bits}`` or ``affine{bits}-{zero_point_bits}``.

    Raises
    ------
    InvalidArgumentError
        If a number is out of range.

    References
    ----------
    PEQA, arXiv 2305.14152, equations 1 to 3; GPTQ, arXiv 2210.17323, section 5, setup (asymmetric grid from minimum to
    maximum). Fine zero points are ours.

    Examples
    --------
    >>> affine(2).levels.tolist(), affine(2).normalization
    ([0.0, 1.0, 2.0, 3.0], 'affine')
    >>> affine(2, 4).levels.tolist(), affine(2, 4).name
    ([0.0, 4.0, 8.0, 12.0], 'affine2-4')
    """
    require_integer("bits", bits, 1, 8, "affine codebooks")
    if zero_point_bits is None:
        zero_point_bits = bits
    require_integer("zero_point_bits", zero_point_bits, bits, 8, f"affine codebooks of {bits} bits")
    name = f"affine{bits}" if zero_point_bits == bits else f"affine{bits}-{zero_point_bits}"
    return Codebook(np.arange(2**bits) * 2 ** (zero_point_bits - bits), name=name, normalization="affine")
