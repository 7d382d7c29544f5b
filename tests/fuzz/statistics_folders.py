"""Fuzzer of folders of statistics: the document, with and without its fingerprint, or a file of tensors."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lqlora.checkpoint._container import digest
from lqlora.integrations.statistics import open_statistics, write_document, write_gradients, write_inputs
from tests.fuzz.mutate import changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

__all__ = ["StatisticsFolders"]

_DOCUMENT, _INPUTS, _GRADIENTS = (
    "statistics.json",
    "inputs-00001-of-00001.safetensors",
    "output_gradients-00001-of-00001.safetensors",
)


@functools.cache
def _original() -> dict[str, bytes]:
    """Return the files of a folder with two matrices that share their inputs, and a third one."""
    rng = np.random.default_rng(0)
    shared, other = (rows.T @ rows for rows in (rng.standard_normal((8, 4)), rng.standard_normal((8, 6))))
    grams = {"q": ((3, 4), np.float32(shared)), "k": ((2, 4), None), "up": ((5, 6), np.float32(other))}
    grams["k"] = ((2, 4), grams["q"][1])
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        entries = write_inputs(folder / _INPUTS, grams)
        write_gradients(
            folder / _GRADIENTS, {name: np.ones(shape[0], np.float32) for name, (shape, _) in grams.items()}
        )
        for own in entries.values():
            own["gradients"] = _GRADIENTS
        write_document(folder, entries, examples=2)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


class StatisticsFolders:
    """Mutated folders."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a folder of which one file is mutated."""
        files = dict(_original())
        name = rng.choice([_DOCUMENT, _DOCUMENT, _DOCUMENT, _INPUTS, _GRADIENTS])
        if name == _DOCUMENT and rng.random() < 0.9:
            text, said = mutated_text(rng, files[name].decode())
            files[name] = text.encode(errors="surrogatepass")
        else:
            files[name], said = mutated_bytes(rng, files[name])
        is_signed = rng.random() < 0.8
        return self._case(folder, _signed(files) if is_signed else files, f"{name}: {said}", is_signed=is_signed)

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield documents that readers often take for something else."""
        files = _original()
        yield self._case(folder, files, "unchanged", must="read")
        yield self._case(
            folder, {name: own for name, own in files.items() if name != _DOCUMENT}, "no document", must="refuse"
        )
        entry = json.loads(files[_DOCUMENT])["matrices"]["up"]
        documents: dict[str, tuple[Any, ...]] = {
            "spec": (2, None, "1", True),
            "examples": (-1, 1.5, "2", 2**70),
            "files": ({}, [], {"../x.safetensors": "0" * 64}, {_INPUTS: 5}, {"x.bin": "0" * 64}),
            "matrices": (
                {},
                {"up": {**entry, "shape": [5, 2**31 - 1]}},
                {"up": {**entry, "shape": [-1, 6]}},
                {"up": {**entry, "inputs": "q.inputs"}},
                {"up": {**entry, "file": "x.safetensors"}},
                {"up": {**entry, "gradients": _INPUTS}},
                {"down": entry},
            ),
        }
        for field, values in documents.items():
            for value in values if slow else values[:4]:
                text = changed(files[_DOCUMENT].decode(), {field: value})
                own = _signed({**files, _DOCUMENT: text.encode()}, list_files=field != "files")
                yield self._case(folder, own, f"{field} is {str(value)[:20]}", must="refuse")

    def _case(
        self,
        folder: Path,
        files: dict[str, bytes],
        made: str,
        *,
        must: Literal["", "read", "refuse"] = "",
        is_signed: bool = False,
    ) -> Case:
        self._count += 1
        own = folder / f"folder{self._count % 2}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        for name, data in files.items():
            (own / name).write_bytes(data)
        judge = functools.partial(_judge, is_signed)
        return Case(made, sum(map(len, files.values())), (own.name,), {"open": lambda: _read(own)}, judge, must)


def _read(folder: Path) -> dict[str, Any]:
    """Read everything that a folder lists."""
    found = open_statistics(folder)
    return {
        "inputs": {name: load() for name, load in found.inputs.items()},
        "gradients": {name: load() for name, load in found.output_gradients.items()},
    }


def _signed(files: dict[str, bytes], *, list_files: bool = True) -> dict[str, bytes]:
    """Return files with the fingerprints that they have now, if the document is one at all."""
    try:
        plain = json.loads(files[_DOCUMENT])
        if list_files:
            for name in plain["files"]:
                if name in files:
                    plain["files"][name] = hashlib.sha256(files[name]).hexdigest()
        plain["sha256"] = digest({}, plain)
        return {**files, _DOCUMENT: json.dumps(plain).encode()}
    except (KeyError, RecursionError, TypeError, ValueError):
        return files


def _judge(is_signed: bool, results: dict[str, Any]) -> None:
    """Compare what was read with the folder that was not damaged. With new fingerprints any content may be right."""
    if "open" not in results:
        return
    for own in results["open"]["inputs"].values():
        same("symmetry", own.tobytes(), own.T.copy().tobytes())
    if is_signed:
        return
    with tempfile.TemporaryDirectory() as text:
        for name, data in _original().items():
            (Path(text) / name).write_bytes(data)
        expected = _read(Path(text))
    for kind, arrays in results["open"].items():
        for name, own in arrays.items():
            same(f"{kind} of {name}", own.tolist(), expected[kind][name].tolist())
