"""Quantized arrays: quantization by absolute maxima, least squares or error feedback, decoding, and products."""

from __future__ import annotations

from lqlora.quantized.array import QuantizedArray
from lqlora.quantized.error_feedback import Order, gptq
from lqlora.quantized.quantization import Fit, dequantize, matmul, quantize

__all__ = ["Fit", "Order", "QuantizedArray", "dequantize", "gptq", "matmul", "quantize"]
