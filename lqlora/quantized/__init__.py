"""Quantized arrays: quantization by absolute maxima, least squares or error feedback, decoding, and products.

``array`` checks stored arrays on load. ``_fits`` chooses scales and levels, ``_search`` has the least squares of that choice,
and ``_scales`` rounds and stores the scales. ``_encoding`` and ``_decoding`` convert between weights and packed codes.
"""

from __future__ import annotations

from lqlora.quantized.array import QuantizedArray
from lqlora.quantized.error_feedback import Order, gptq
from lqlora.quantized.quantization import Fit, dequantize, matmul, quantize

__all__ = ["Fit", "Order", "QuantizedArray", "dequantize", "gptq", "matmul", "quantize"]
