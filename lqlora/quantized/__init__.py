"""Quantized arrays: quantization by absolute maxima, least squares or error feedback, decoding, and products.

``array`` checks stored arrays on load. ``_layout`` cuts an array into lines, blocks and pieces. ``_fits`` chooses scales and
levels: ``lqlora.ops.search`` has the least squares of a scale, and ``_search`` that of levels fitted together with scales.
``_scales`` rounds and stores the scales. ``_encoding`` and ``_decoding`` convert between weights and packed codes.
``error_feedback`` has :func:`gptq`, and ``_sweep`` its loop over columns.
"""

from __future__ import annotations

from lqlora.quantized.array import QuantizedArray
from lqlora.quantized.error_feedback import Order, gptq
from lqlora.quantized.quantization import Fit, dequantize, matmul, quantize

__all__ = ["Fit", "Order", "QuantizedArray", "dequantize", "gptq", "matmul", "quantize"]
