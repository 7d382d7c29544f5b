"""Weightings: what an error in each entry of a matrix counts.

A weighting is the norm of :func:`lqlora.decompose`. It gives the solver three things: the norm of a residual, the
low-rank matrix that is best in that norm, and weights of single entries for the quantizer.
"""

from lqlora.weighting.base import AbstractWeighting, LowRankStep, ScaledWeighting
from lqlora.weighting.diagonal import RowColumn, Uniform
from lqlora.weighting.elementwise import Elementwise
from lqlora.weighting.gram import InputGram, Kronecker

__all__ = [
    "AbstractWeighting",
    "Elementwise",
    "InputGram",
    "Kronecker",
    "LowRankStep",
    "RowColumn",
    "ScaledWeighting",
    "Uniform",
]
