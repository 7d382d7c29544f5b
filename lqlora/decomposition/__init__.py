"""The alternating decomposition ``W ≈ Q + scaling * lora_B @ lora_A``."""

from lqlora.decomposition.batched import DecompositionStack, decompose_stack
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
]
