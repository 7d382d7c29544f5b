"""Quantized torch models: linear layers, torch operators, conversion, checkpoints, and calibration statistics."""

from __future__ import annotations

from lqlora._optional import require

require("torch", "pip install torch", "lqlora.nn")

from lqlora.nn.adapters import (  # noqa: E402 - after the check
    Factors,
    factors,
    load_factors,
    save_factors,
    set_factors,
    using_factors,
)
from lqlora.nn.block_tuning import BlockTuning  # noqa: E402
from lqlora.nn.blocks import quantize_blocks  # noqa: E402
from lqlora.nn.distillation.teacher import TeacherOutputs, collect_outputs  # noqa: E402
from lqlora.nn.distillation.training import DistillationReport, distill  # noqa: E402
from lqlora.nn.embedding import QuantizedEmbedding, QuantizedHead  # noqa: E402 - after the check
from lqlora.nn.linear import LQLinear  # noqa: E402
from lqlora.nn.merging import RequantizedLayer, dequantize_model, merged_weight, requantize_model  # noqa: E402
from lqlora.nn.model import quantize_model, weight_arrays  # noqa: E402 - after the check
from lqlora.nn.offload import offload_model, onload_model  # noqa: E402
from lqlora.nn.operator_arguments import Operands, from_operands, operands  # noqa: E402
from lqlora.nn.peqa.conversion import freeze_scales, peqa_model, train_scales  # noqa: E402
from lqlora.nn.peqa.linear import PEQALinear  # noqa: E402
from lqlora.nn.peqa.tasks import (  # noqa: E402
    Scales,
    combine_scales,
    load_scales,
    save_scales,
    scales,
    set_scales,
    using_scales,
)
from lqlora.nn.report import DensePart, QuantizationReport, QuantizedLayer, QuantizedTable  # noqa: E402
from lqlora.nn.selection import select_linears  # noqa: E402
from lqlora.nn.shardable import make_shardable  # noqa: E402
from lqlora.nn.state import load_model, save_model  # noqa: E402
from lqlora.nn.statistics.fisher import collect_fisher  # noqa: E402
from lqlora.nn.statistics.gram import collect_gram, collect_kronecker  # noqa: E402
from lqlora.nn.statistics.losses import causal_lm_loss  # noqa: E402
from lqlora.nn.tensor import QuantizedTensor  # noqa: E402
from lqlora.nn.weight import QuantizedWeight  # noqa: E402

__all__ = [
    "BlockTuning",
    "DensePart",
    "DistillationReport",
    "Factors",
    "LQLinear",
    "Operands",
    "PEQALinear",
    "QuantizationReport",
    "QuantizedEmbedding",
    "QuantizedHead",
    "QuantizedLayer",
    "QuantizedTable",
    "QuantizedTensor",
    "QuantizedWeight",
    "RequantizedLayer",
    "Scales",
    "TeacherOutputs",
    "causal_lm_loss",
    "collect_fisher",
    "collect_gram",
    "collect_kronecker",
    "collect_outputs",
    "combine_scales",
    "dequantize_model",
    "distill",
    "factors",
    "freeze_scales",
    "from_operands",
    "load_factors",
    "load_model",
    "load_scales",
    "make_shardable",
    "merged_weight",
    "offload_model",
    "onload_model",
    "operands",
    "peqa_model",
    "quantize_blocks",
    "quantize_model",
    "requantize_model",
    "save_factors",
    "save_model",
    "save_scales",
    "scales",
    "select_linears",
    "set_factors",
    "set_scales",
    "train_scales",
    "using_factors",
    "using_scales",
    "weight_arrays",
]
