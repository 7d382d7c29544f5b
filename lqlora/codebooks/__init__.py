"""Codebooks: the levels of codes, and the normalization of a block before its entries are rounded.

Each family is a function that returns a :class:`Codebook`: NormalFloat, AF4, BOF4, Student float, integers, small
floats, dynamic and logarithmic maps. :func:`by_name` finds a codebook by the name that formats and files use.
"""

from __future__ import annotations

from lqlora.codebooks.abnormal import AF4, abnormal_float
from lqlora.codebooks.codebook import Codebook, Normalization
from lqlora.codebooks.dynamic import dynamic8
from lqlora.codebooks.geometric import logarithmic
from lqlora.codebooks.integers import affine, uniform
from lqlora.codebooks.names import (
    by_name,
    check_work,
    codebook_from_json,
    codebook_from_text,
    codebook_to_json,
    codebook_to_text,
    is_standard,
)
from lqlora.codebooks.normal import NF4, normal_float
from lqlora.codebooks.optimal import block_optimal
from lqlora.codebooks.small_floats import FP4_BNB, fp4, small_float
from lqlora.codebooks.student import student_float
from lqlora.codebooks.trellis import Trellis, trellis_code

__all__ = [
    "AF4",
    "FP4_BNB",
    "NF4",
    "Codebook",
    "Normalization",
    "Trellis",
    "abnormal_float",
    "affine",
    "block_optimal",
    "by_name",
    "check_work",
    "codebook_from_json",
    "codebook_from_text",
    "codebook_to_json",
    "codebook_to_text",
    "dynamic8",
    "fp4",
    "is_standard",
    "logarithmic",
    "normal_float",
    "small_float",
    "student_float",
    "trellis_code",
    "uniform",
]
