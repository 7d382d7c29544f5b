"""Other libraries' files: model files as sources of matrices, 4-bit weights of bitsandbytes, Llama models in GGUF."""

from __future__ import annotations
