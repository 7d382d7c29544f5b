"""Weightings: the norm in which a decomposition measures errors, that is, how much an error in each entry matters.

Pass one to :func:`lqlora.decompose` as ``weighting``. It provides the norm of a residual, the best low-rank
approximation in that norm, and the importance of single entries for the quantizer.
"""

from lqlora.weighting.base import AbstractWeighting, LowRankStep, MeasuredNorm, ScaledWeighting
from lqlora.weighting.diagonal import RowColumn, Uniform
from lqlora.weighting.elementwise import Elementwise
from lqlora.weighting.gram import InputGram, Kronecker

__all__ = [
    "AbstractWeighting",
    "Elementwise",
    "InputGram",
    "Kronecker",
    "LowRankStep",
    "MeasuredNorm",
    "RowColumn",
    "ScaledWeighting",
    "Uniform",
]
