"""Low-rank plus quantized weight decomposition: ``W ≈ Q + scaling * lora_B @ lora_A``.

Every step is a function on arrays of NumPy, torch or any library that follows the array API standard. ``lqlora.nn``
applies them to torch modules, and ``lqlora.testing`` tests quantizers, solvers and backends of your own. Both are
imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lqlora import backends, codebooks, errors, initializers, ops, reports, solvers, weighting
from lqlora._dispatch import forced
from lqlora.allocation import Limit, LimitUse, Plan, PlannedMatrix, allocate, cache_bytes, memory_budget, pareto, ties
from lqlora.checkpoint import Checkpoint, StoredMatrix, load, save, verify
from lqlora.codebooks import (
    NF4,
    Codebook,
    affine,
    dynamic8,
    fp4,
    logarithmic,
    normal_float,
    small_float,
    student_float,
    uniform,
)
from lqlora.costs import Configuration, CostStore, CostTable, cost_table
from lqlora.costs.grids import paper_grid
from lqlora.decomposition import Decomposition, DecompositionStack, decompose, decompose_stack, relative_error
from lqlora.formats import BlockFormat, Rotation, ScaleFormat
from lqlora.quantized import QuantizedArray, dequantize, gptq, matmul, quantize

if TYPE_CHECKING:
    from lqlora import nn, recipes, testing
    from lqlora.integrations.streaming import decompose_checkpoint

__version__ = "0.1.0"

__all__ = [
    "NF4",
    "BlockFormat",
    "Checkpoint",
    "Codebook",
    "Configuration",
    "CostStore",
    "CostTable",
    "Decomposition",
    "DecompositionStack",
    "Limit",
    "LimitUse",
    "Plan",
    "PlannedMatrix",
    "QuantizedArray",
    "Rotation",
    "ScaleFormat",
    "StoredMatrix",
    "affine",
    "allocate",
    "backends",
    "cache_bytes",
    "codebooks",
    "cost_table",
    "decompose",
    "decompose_checkpoint",
    "decompose_stack",
    "dequantize",
    "dynamic8",
    "errors",
    "forced",
    "fp4",
    "gptq",
    "initializers",
    "load",
    "logarithmic",
    "matmul",
    "memory_budget",
    "nn",
    "normal_float",
    "ops",
    "paper_grid",
    "pareto",
    "quantize",
    "recipes",
    "relative_error",
    "reports",
    "save",
    "small_float",
    "solvers",
    "student_float",
    "testing",
    "ties",
    "uniform",
    "verify",
    "weighting",
]


def __getattr__(name: str) -> object:
    if name in ("nn", "recipes", "testing"):  # need torch and Hypothesis, which nothing else here does
        return importlib.import_module(f"lqlora.{name}")
    if name == "decompose_checkpoint":  # reads files of other libraries
        return importlib.import_module("lqlora.integrations.streaming").decompose_checkpoint
    raise AttributeError(f"module 'lqlora' has no attribute {name!r}")
