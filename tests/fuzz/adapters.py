"""Fuzzer of adapter folders of PEFT: the settings, or the tensors and the header of the weights."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

import lqlora as lq
from lqlora.integrations.peft import load_adapter, save_adapter
from tests.fuzz.mutate import Raw, changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.safetensors_files import as_arrays, mutated_tensors, read, written

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

__all__ = ["Adapters"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@functools.cache
def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 10), nn.Linear(10, 6))
    fmt, ranks = lq.BlockFormat.parse("nf4/4:float32"), {"0": 2, "1": 3, "2": 1}
    lq.nn.quantize_model(model, fmt, rank=ranks, scaling={"0": 0.5, "1": 0.3, "2": 1.0})
    return model


@functools.cache
def _original() -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder, _model(), base_model="base", task_type="CAUSAL_LM")
        return (Path(folder) / _CONFIG).read_text(), (Path(folder) / _WEIGHTS).read_bytes()


def _loaded(folder: Path) -> dict[str, lq.nn.Factors]:
    model = _model()
    load_adapter(folder, model)
    return lq.nn.factors(model)


class Adapters:
    """Mutated adapter folders."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a folder of which one file is mutated."""
        text, weights = _original()
        if rng.random() < 0.1:
            data, said = mutated_bytes(rng, weights)
            return self._case(folder, text, data, f"bytes: {said}")
        if rng.random() < 0.4:
            metadata, tensors = read(weights)
            tensors, said = mutated_tensors(rng, tensors)
            return self._case(folder, text, written(metadata, tensors), said)
        text, said = mutated_text(rng, text)
        return self._case(folder, text, weights, f"settings: {said}")

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield settings that readers often take for something else."""
        text, weights = _original()
        yield self._case(folder, text, weights, "unchanged", must="read")
        patterns = ("(a+)+$", "^0|1", ".*", "^", "", "1\\", "\\Z", "x" * 60000)
        values: dict[str, tuple[Any, ...]] = {
            "lora_alpha": (None, True, "1", [], *map(Raw, ("NaN", "1e999", "9" * 5000)), -0.0, 1e308),
            "r": (0, -1, 2.5, 2**40, None),
            "use_rslora": (1, "yes", True),
            "alpha_pattern": tuple({pattern: 2} for pattern in patterns),
            "rank_pattern": ({"^0": 7}, {"0": None}, []),
            "use_dora": (True, 1, "x"),
            "peft_type": ("IA3", None, 5),
            "init_lora_weights": ("pissa", "PiSSA_niter_4", "gaussian", 7),
            "\x1b[2J": (1,),
        }
        for field, own in values.items():
            for value in own if slow else own[:3]:
                yield self._case(folder, changed(text, {field: value}), weights, f"{field!r} is {str(value)[:20]}")

    def _case(
        self, folder: Path, text: str, weights: bytes, made: str, *, must: Literal["", "read", "refuse"] = ""
    ) -> Case:
        self._count += 1
        own = folder / f"adapter{self._count % 2}"
        own.mkdir(exist_ok=True)
        data = text.encode(errors="surrogatepass")
        (own / _CONFIG).write_bytes(data)
        (own / _WEIGHTS).write_bytes(weights)
        judge = functools.partial(_judge, text, weights)
        readers = {"load_adapter": lambda: _loaded(own)}
        return Case(made, len(data) + len(weights), (own.name,), readers, judge, must)


def _judge(text: str, weights: bytes, results: dict[str, Any]) -> None:
    """Compare factors with the tensors, and scalings with the settings as PEFT reads them."""
    for found in results.values():
        settings, arrays = json.loads(text), as_arrays(read(weights)[1])
        assert settings["peft_type"] == "LORA"
        assert not settings.get("use_dora")
        names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in arrays}
        same("layers", {name for name, own in found.items() if len(own.lora_A)}, names)
        for name in names:
            rank = _of(settings.get("rank_pattern"), name, settings.get("r", 8))
            alpha = _of(settings.get("alpha_pattern"), name, settings.get("lora_alpha", 8))
            # Alphas are read in float64. PEFT divides integers beyond 2**53 exactly, which no training has.
            scaling = float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
            same("scaling", found[name].scaling, scaling)
            for key in ("A", "B"):
                expected = arrays[f"base_model.model.{name}.lora_{key}.weight"].astype(np.float32)
                same(f"lora_{key}", getattr(found[name], f"lora_{key}").tolist(), expected.tolist())


def _of(patterns: dict[str, Any] | None, name: str, usual: Any) -> Any:
    """Return the value of the first pattern that matches."""
    return next((own for key, own in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), usual)
