"""Kinds of files that the fuzzers damage, by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lqlora._optional import is_installed
from tests.requirements import require_or_skip

if TYPE_CHECKING:
    from tests.fuzz.running import Kind

__all__ = ["KINDS", "load"]

#: Module, class, and the packages that it needs, by the name of a kind.
_KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "checkpoint": ("checkpoints", "Checkpoints", ()),
    "folder": ("folders", "Folders", ()),
    "statistics": ("statistics_folders", "StatisticsFolders", ()),
    "factors": ("factor_files", "FactorFiles", ()),
    "scales": ("scale_files", "ScaleFiles", ()),
    "plan": ("plans", "Plans", ()),
    "table": ("tables", "Tables", ()),
    "store": ("stores", "Stores", ()),
    "bitsandbytes": ("bitsandbytes_states", "BitsandbytesStates", ()),
    "model": ("models", "Models", ()),
    "coded": ("coded_models", "CodedModels", ()),
    "adapter": ("adapters", "Adapters", ("torch",)),
    "gguf": ("gguf_files", "GgufFiles", ("torch", "gguf", "transformers")),
}

KINDS = tuple(_KINDS)


def load(name: str) -> Kind:
    """Return a kind of files; skip the running test if a package that it needs is not installed."""
    module, kind, packages = _KINDS[name]
    for package in packages:
        require_or_skip(package, is_installed(package))
    made: Kind = getattr(importlib.import_module(f"tests.fuzz.{module}"), kind)()
    return made
