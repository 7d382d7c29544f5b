"""Checkpoints: decompositions of a whole model in one safetensors file, written atomically and checked on load."""

from __future__ import annotations

from lqlora.checkpoint.file import Checkpoint, StoredMatrix, load, save, verify

__all__ = ["Checkpoint", "StoredMatrix", "load", "save", "verify"]
