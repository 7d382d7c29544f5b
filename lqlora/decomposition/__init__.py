"""Decomposition ``W ≈ Q + scaling * lora_B @ lora_A`` into a quantized and a low-rank part, by alternation."""

from lqlora.decomposition.batched import DecompositionStack, decompose_stack
from lqlora.decomposition.measurement import relative_error
from lqlora.decomposition.quantizers import Quantizer, QuantizerName
from lqlora.decomposition.result import Decomposition, StopReason
from lqlora.decomposition.solver import Init, decompose

__all__ = [
    "Decomposition",
    "DecompositionStack",
    "Init",
    "Quantizer",
    "QuantizerName",
    "StopReason",
    "decompose",
    "decompose_stack",
    "relative_error",
]
