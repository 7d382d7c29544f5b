"""Fuzzer of folders of shards, with and without their document: the document, the index, the configuration, or a shard."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors.numpy import save_file

import lqlora as lq
from lqlora.checkpoint._container import digest
from lqlora.integrations._model_folders import open_parts
from tests.fuzz.mutate import changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

__all__ = ["Folders"]

_DOCUMENT, _CONFIG, _INDEX = "lqlora.json", "config.json", "model.safetensors.index.json"


@functools.cache
def _original() -> dict[str, bytes]:
    """Return the files of a folder of several shards, with an array of experts."""
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.up.weight": rng.standard_normal((8, 16)).astype(np.float32) for i in range(3)}
    tensors |= {
        "layers.0.experts.w": rng.standard_normal((2, 8, 16)).astype(np.float32),
        "norm": np.ones(4, np.float32),
    }
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "dense").mkdir()
        save_file(tensors, folder / "dense" / "model.safetensors")
        (folder / "dense" / _CONFIG).write_text('{"model_type": "llama"}')
        fmt = lq.BlockFormat.parse("nf3/16:u8/256:float32")
        options = {"rank": 1, "max_iter": 1, "shard_bytes": 300, "progress": False}
        lq.decompose_checkpoint(folder / "dense", folder / "small", fmt, **options)
        return {path.name: path.read_bytes() for path in (folder / "small").iterdir()}


class Folders:
    """Mutated folders."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a folder of which one file is mutated."""
        files = dict(_original())
        shard = next(name for name in files if name.endswith(".safetensors"))
        name = rng.choice([_DOCUMENT, _DOCUMENT, _CONFIG, _CONFIG, _INDEX, shard])
        is_plain = name != _DOCUMENT and rng.random() < 0.4
        if name == shard or rng.random() < 0.1:
            files[name], said = mutated_bytes(rng, files[name])
        else:
            text, said = mutated_text(rng, files[name].decode())
            files[name] = (
                _signed(text).encode(errors="surrogatepass")
                if name == _DOCUMENT
                else text.encode(errors="surrogatepass")
            )
        if is_plain:
            del files[_DOCUMENT]
        return self._case(folder, files, f"{name}{' without a document' if is_plain else ''}: {said}")

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield documents and configurations that readers often take for something else."""
        files = _original()
        yield self._case(folder, files, "unchanged", must="read")
        yield self._case(
            folder, {name: own for name, own in files.items() if name != _DOCUMENT}, "no document", must="read"
        )
        shards = [name for name in files if name.endswith(".safetensors")]
        documents: dict[str, tuple[Any, ...]] = {
            "spec": (2, None, "1", True),
            "shards": ({}, [], {"../x.safetensors": "a"}, {shards[0]: 5}, {"x.bin": "a"}, {"\x1b[2J.safetensors": "a"}),
            "metadata": (
                5,
                {},
                {"tensors": []},
                {"tensors": {"a": {"matrices": ["layers.0.up"]}}},
                {"tensors": {"a": 5}},
            ),
        }
        for field, values in documents.items():
            for value in values if slow else values[:3]:
                text = _signed(changed(files[_DOCUMENT].decode(), {field: value}))
                yield self._case(folder, {**files, _DOCUMENT: text.encode()}, f"{field} is {str(value)[:20]}")
        group = json.loads(files[_CONFIG])["quantization_config"]["groups"][0]
        for change in (
            {"rank": -1},
            {"format": "nf99"},
            {"scaling": None},
            {"matrices": ["x"]},
            {"matrices": []},
            {"levels": [1]},
        ):
            config = {"quantization_config": {"quant_method": "lqlora", "groups": [{**group, **change}]}}
            own = {**files, _CONFIG: json.dumps(config).encode()}
            del own[_DOCUMENT]
            yield self._case(folder, own, f"group with {change}", must="" if "matrices" in change else "refuse")

    def _case(
        self, folder: Path, files: dict[str, bytes], made: str, *, must: Literal["", "read", "refuse"] = ""
    ) -> Case:
        self._count += 1
        own = folder / f"folder{self._count % 2}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        for name, data in files.items():
            (own / name).write_bytes(data)
        readers = {
            "load": lambda: lq.load(own),
            "mapped": lambda: lq.load(own, mapped=True),
            "verify": lambda: lq.verify(own),
            "parts": lambda: open_parts(own),
        }
        return Case(
            made,
            sum(map(len, files.values())),
            (own.name,),
            readers,
            functools.partial(_judge, _DOCUMENT in files),
            must,
        )


def _signed(text: str) -> str:
    """Return a document with the fingerprint of its content, if it has one at all."""
    try:
        plain = json.loads(text)
        return json.dumps({**plain, "sha256": digest({}, plain)})
    except (RecursionError, TypeError, ValueError):
        return text


def _judge(has_document: bool, results: dict[str, Any]) -> None:
    """Compare what was verified with the folder that was not damaged. Without the document there are no fingerprints."""
    if not has_document or "verify" not in results:
        return
    with tempfile.TemporaryDirectory() as text:
        for name, data in _original().items():
            (Path(text) / name).write_bytes(data)
        expected = lq.load(text)
    for key, own in results["verify"].matrices.items():
        same("format", str(own.quantized.format), str(expected.matrices[key].quantized.format))
        same("codes", own.quantized.packed.tolist(), expected.matrices[key].quantized.packed.tolist())
        same("lora_A", own.lora_A.tolist(), expected.matrices[key].lora_A.tolist())
