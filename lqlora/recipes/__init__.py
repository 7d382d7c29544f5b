"""Recipes for causal language models: text and token sequences, perplexity, a fine-tuning loop, and the demo.

They are the short programs that users would otherwise copy from the tutorial. Perplexity and fine-tuning need torch,
which is imported when one of them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lqlora._optional import require
from lqlora.recipes.text import Split, packaged_text, read_text, split_sequences, token_sequences

if TYPE_CHECKING:
    from lqlora.recipes.checkpoints import compress_checkpoint
    from lqlora.recipes.compression import CompressionReport, compress
    from lqlora.recipes.evaluation import divergence, perplexity
    from lqlora.recipes.fine_tuning import fine_tune

__all__ = [
    "CompressionReport",
    "Split",
    "compress",
    "compress_checkpoint",
    "divergence",
    "fine_tune",
    "packaged_text",
    "perplexity",
    "read_text",
    "split_sequences",
    "token_sequences",
]

_MODULES_WITH_TORCH = {
    "CompressionReport": "compression",
    "compress": "compression",
    "compress_checkpoint": "checkpoints",
    "divergence": "evaluation",
    "fine_tune": "fine_tuning",
    "perplexity": "evaluation",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES_WITH_TORCH:
        raise AttributeError(f"module 'lqlora.recipes' has no attribute {name!r}")
    require("torch", "pip install torch", f"lqlora.recipes.{name}")
    return getattr(importlib.import_module(f"lqlora.recipes.{_MODULES_WITH_TORCH[name]}"), name)
