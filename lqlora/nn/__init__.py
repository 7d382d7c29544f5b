"""The torch.nn bridge: quantized linear layers, conversion of models, Fisher information, second moments."""

from __future__ import annotations

from lqlora._optional import require

require("torch", "pip install torch", "lqlora.nn")

from lqlora.nn.convert import QuantizationReport, quantize_model, select_linears, weight_arrays  # noqa: E402 - after the check
from lqlora.nn.fisher import causal_lm_loss, collect_fisher  # noqa: E402
from lqlora.nn.gram import collect_gram, collect_kronecker  # noqa: E402
from lqlora.nn.linear import LQLinear, QuantizedWeight  # noqa: E402
from lqlora.nn.state import load_model, save_model  # noqa: E402

__all__ = [
    "LQLinear",
    "QuantizationReport",
    "QuantizedWeight",
    "causal_lm_loss",
    "collect_fisher",
    "collect_gram",
    "collect_kronecker",
    "load_model",
    "quantize_model",
    "save_model",
    "select_linears",
    "weight_arrays",
]
