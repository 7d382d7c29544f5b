"""Folder of a checkpoint that is written piece by piece, and continued after a kill."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lqlora._documents import Reader, Size, Text
from lqlora._files import remove_left_over, write_whole
from lqlora._messages import shortened
from lqlora._printable import printable
from lqlora._progress import bars_hidden
from lqlora.checkpoint.file import read_file, save, verify_file
from lqlora.checkpoint.folder import DOCUMENT, INDEX, read_document_of, write_document
from lqlora.checkpoint.quantization_config import MatrixFormat, describe_matrices
from lqlora.costs._digests import format_key, text_digest
from lqlora.costs.store import NUMERICS
from lqlora.errors import CheckpointError
from lqlora.integrations._streaming_tasks import Copy, loaded_copy, tensor_digest
from lqlora.integrations._work_folders import compare_settings, hold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from lqlora._typing import FloatName
    from lqlora.checkpoint import Checkpoint
    from lqlora.integrations._streaming_tasks import Finished, Piece, Task
    from lqlora.integrations.contents import ModelContents

__all__ = ["Folder", "run_settings", "small_files"]

_log = logging.getLogger("lqlora")

#: Folder of the work that is not finished, with the settings of the run and a file for each finished matrix.
_UNFINISHED, _RUN, _LOCK = "unfinished", "run.json", "lock"

#: Files of finished matrices in one folder. Each write lists its folder, in search of what killed processes left.
_IN_A_FOLDER = 256

#: Files that are copied beside the weights: configurations, tokenizers, templates. Code of a model is not copied.
_COPIED = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe"})
_MOST_COPIED_BYTES = 2**28

#: What settings that are kept as digests stand for.
_DIGESTS = {
    "matrices": "other matrices, formats or ranks",
    "source": "a model of other tensors",
    "numerics": "another version of lqlora",
}


class _Numbers(Struct, frozen=True):
    """Metadata of a file: digests of the inputs and error of each matrix, and digests of copied tensors."""

    matrices: dict[Text, tuple[Text, Size]]
    tensors: dict[Text, Text]


def run_settings(
    contents: ModelContents,
    tasks: Mapping[str, Task],
    factor_dtype: FloatName,
    shard_bytes: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the files depend on, besides the values of tensors and norms."""
    tensors = [[name, own.dtype, list(own.shape)] for name, own in contents.tensors.items()]
    matrices = [[own.name, format_key(own.format), own.rank] for own in tasks.values()]
    return {
        "numerics": NUMERICS,
        "source": text_digest(json.dumps(tensors)),
        "matrices": text_digest(json.dumps(matrices)),
        "factor_dtype": factor_dtype,
        "shard_bytes": shard_bytes,
        **dict(sorted(options.items())),  # in whatever order they were given
    }


class Folder:
    """Folder of a checkpoint that is written piece by piece. Entering it locks it, and finds what an earlier run has finished.

    Parameters
    ----------
    path : Path
        The folder.
    settings : dict
        Result of :func:`run_settings`.
    contents : ModelContents
        The source.
    tasks : mapping of str to Task
        All matrices.
    files : mapping of str to sequence of Piece
        What each file holds.

    Attributes
    ----------
    inputs : dict of str to str
        Digest of the inputs of each matrix that is finished, in its own file or in a file of the checkpoint.
    errors : dict of str to float
        Error of each of them.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        contents: ModelContents,
        tasks: Mapping[str, Task],
        files: Mapping[str, Sequence[Piece]],
    ) -> None:
        self.path, self._settings, self._contents, self._tasks, self._files = path, settings, contents, tasks, files
        self._work = path / _UNFINISHED
        self._numbers = {name: number for number, name in enumerate(tasks)}
        self._file_of = {piece.name: name for name, pieces in files.items() for piece in pieces if piece.tensor is None}
        self._missing = {name: sum(own.tensor is None for own in pieces) for name, pieces in files.items()}
        self.inputs: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self._copies: dict[str, str] = {}
        self._fingerprints: dict[str, str] = {}
        self._is_complete = self._is_new = False
        self._lock: Any = None

    def __enter__(self) -> Self:
        try:
            self._refuse_source()
            if self.path.exists() and not self.path.is_dir():
                raise CheckpointError(f"{self.path} is not a folder. Name another one.")
            if (self.path / DOCUMENT).exists():
                self._open_complete()
            else:
                self._open_unfinished()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._lock is not None and not self.inputs:
            # No matrix is lost, and other options may be tried with the same folder.
            with suppress(OSError):
                for name in self._fingerprints:
                    (self.path / name).unlink()
            self._clean()
            if self._is_new:
                with suppress(OSError):
                    self.path.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _refuse_source(self) -> None:
        """Raise if the folder is, or holds, what is read."""
        try:
            own = self.path.resolve()
            read = [path.resolve() for path in (self._contents.path, *self._contents.files)]
        except (OSError, ValueError) as error:
            raise CheckpointError(shortened(f"{str(self.path)!r} cannot be written: {error}.")) from error
        if any(path == own or path.is_relative_to(own) for path in read):
            raise CheckpointError(shortened(f"{self.path} holds the model that is read. Name another folder."))

    def _open_complete(self) -> None:
        """Take over the numbers of a complete checkpoint of the same settings."""
        document = read_document_of(self.path)
        run = document.metadata.get("run")
        compare_settings(self.path, run if isinstance(run, dict) else {}, self._settings, _DIGESTS)
        for name in self._files:
            self._take_over(name)
        if self._fingerprints != document.shards:
            raise CheckpointError(
                shortened(f"{self.path} has files that {DOCUMENT} does not list, or others. Name another folder.")
            )
        self._is_complete = True
        self._clean()

    def _open_unfinished(self) -> None:
        self._is_new = not self.path.exists()
        if not self._is_new and not self._is_ours():
            raise CheckpointError(f"{self.path} is not empty, and holds no unfinished checkpoint. Name another folder.")
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self._work / _LOCK, self.path)
        own = self._work / _RUN
        present = [name for name in self._files if (self.path / name).exists()]
        finished = {name: self._path_of(name) for name in self._tasks if self._path_of(name).exists()}
        # With other settings the files of the checkpoint may have other names.
        is_begun = any(path.suffix == ".safetensors" for path in self.path.iterdir()) or finished
        if own.exists() and is_begun:
            compare_settings(
                self.path,
                Reader(f"{own} is damaged", CheckpointError).read(own.read_bytes(), dict[str, Any]),
                self._settings,
                _DIGESTS,
            )
        else:
            write_whole(own, f"{json.dumps(self._settings)}\n".encode())
        self._remove_partial()
        for name in present:
            remove_left_over(self.path / name)
            self._take_over(name)
        for name, path in finished.items():
            if name in self.inputs:  # its file of the checkpoint was written, and the process killed after that
                path.unlink()
            else:
                self._take_matrix(name, path)

    def _is_ours(self) -> bool:
        """Return whether the folder is empty, or holds an unfinished checkpoint."""
        names = {path.name for path in self.path.iterdir()}
        if not names or (self._work / _RUN).is_file():
            return True
        # A process may be killed before it has written its settings. It has written nothing else then.
        inner = {path.name for path in self._work.iterdir()} if names == {_UNFINISHED} and self._work.is_dir() else {""}
        return all(name == _LOCK or _is_partial(name, _RUN) for name in inner)

    def _path_of(self, name: str) -> Path:
        """Return the file of one finished matrix."""
        number = self._numbers[name]
        return self._work / f"{number // _IN_A_FOLDER:05d}" / f"{number:07d}.safetensors"

    def _take_over(self, name: str) -> None:
        """Check a file of the checkpoint, and take over its numbers."""
        path, pieces = self.path / name, self._files[name]
        content, fingerprint = verify_file(path)
        numbers = _read_numbers(path, content)
        copies = {piece.name for piece in pieces if piece.tensor is not None}
        if (
            content.matrices.keys() | content.tensors.keys() != {piece.name for piece in pieces}
            or content.tensors.keys() != copies
        ):
            raise CheckpointError(
                shortened(f"{path} is not the file of this checkpoint. Remove it, or name another folder.")
            )
        self._note(numbers)
        self._copies |= numbers.tensors
        self._fingerprints[name] = fingerprint

    def _take_matrix(self, name: str, path: Path) -> None:
        """Take over the numbers of a finished matrix, or remove its file if it is damaged."""
        try:
            content, _ = verify_file(path)
            numbers = _read_numbers(path, content)
            if content.matrices.keys() != {name}:
                raise CheckpointError(shortened(f"{path} is the file of another matrix."))
        except CheckpointError as error:
            _log.warning("%s The matrix is decomposed again.", error)
            path.unlink()
            return
        self._note(numbers)

    def _note(self, numbers: _Numbers) -> None:
        for name, (inputs, error) in numbers.matrices.items():
            self.inputs[name], self.errors[name] = inputs, error
            self._missing[self._file_of[name]] -= 1

    def items(self) -> list[Task | Copy]:
        """Return the tasks of all matrices, and comparisons of the tensors that are copied already."""
        tasks = [task._replace(known=self.inputs.get(name)) for name, task in self._tasks.items()]
        return [*tasks, *(Copy(name, self._contents.tensors[name], known) for name, known in self._copies.items())]

    def take(self, result: Finished | None, report: Callable[[int], None]) -> None:
        """Write a finished matrix, and the file of the checkpoint that is full with it."""
        if result is None or result.matrix is None:
            return
        matrix, result.matrix = result.matrix, None
        path, numbers = self._path_of(result.name), {result.name: (result.inputs, result.error)}
        path.parent.mkdir(exist_ok=True)
        save(path, {result.name: matrix}, metadata={"matrices": numbers, "tensors": {}})
        del matrix
        self._note(_Numbers(numbers, {}))
        if _log.isEnabledFor(logging.INFO):
            with bars_hidden():
                values = printable(result.name), result.error, len(self.inputs), len(self._tasks)
                _log.info("%s: relative error %.4g, %d of %d", *values)
        report(len(self.inputs))
        name = self._file_of[result.name]
        if not self._missing[name]:
            self._write_file(name)

    def write_full_files(self) -> None:
        """Write the files of the checkpoint whose matrices are all finished."""
        for name, missing in self._missing.items():
            if not missing and name not in self._fingerprints:
                self._write_file(name)

    def _write_file(self, name: str) -> None:
        pieces = self._files[name]
        paths = {own.name: self._path_of(own.name) for own in pieces if own.tensor is None}
        # Not mapped: each mapped file would keep a file descriptor.
        matrices = {own: verify_file(path)[0].matrices[own] for own, path in paths.items()}
        tensors = {own.name: loaded_copy(own.name, own.tensor) for own in pieces if own.tensor is not None}
        numbers = {
            "matrices": {own: [self.inputs[own], self.errors[own]] for own in paths},
            "tensors": {own: tensor_digest(tensor) for own, tensor in tensors.items()},
        }
        save(self.path / name, matrices, tensors, numbers)
        del matrices, tensors
        self._fingerprints[name] = read_file(self.path / name, mapped=True)[1]
        for path in paths.values():
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write what makes the folder a checkpoint, the document last."""
        if self._is_complete:
            for path in small_files(self._contents.path):
                if not (self.path / path.name).exists():
                    self._copy(path)
            return
        from safetensors import safe_open  # noqa: PLC0415 - save has imported it

        places: dict[str, str] = {}
        for name in self._files:
            with safe_open(self.path / name, framework="numpy") as file:
                places |= dict.fromkeys(file.keys(), name)
        size = sum(own.nbytes for pieces in self._files.values() for own in pieces)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_whole(self.path / INDEX, f"{json.dumps(index, indent=2, sort_keys=True)}\n".encode())
        for path in small_files(self._contents.path):
            self._copy(path)
        # In the order of the files, and not in that in which they were finished.
        shards = {name: self._fingerprints[name] for name in self._files}
        write_document(self.path, shards, {"run": self._settings, "tensors": _origins(self._contents, self._tasks)})
        self._clean()

    def _copy(self, path: Path) -> None:
        """Copy a file of the source that is not one of its tensors."""
        data = path.read_bytes()
        write_whole(self.path / path.name, self._marked(data) if path.name == "config.json" else data)

    def _marked(self, config: bytes) -> bytes:
        """Return a configuration of transformers that says how the matrices are stored."""
        # Without it transformers would look for dense weights, find none, and fill the layers with random numbers.
        try:
            found = json.loads(config)
        except (RecursionError, ValueError):
            return config
        if not isinstance(found, dict):
            return config
        scaling = float(self._settings.get("scaling", 1.0))
        rows = {own.name: MatrixFormat(own.format, own.rank, scaling) for own in self._tasks.values()}
        return f"{json.dumps({**found, 'quantization_config': describe_matrices(rows)}, indent=2)}\n".encode()

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {name: (self.path / name).stat().st_size for name in self._files}

    def _folders(self) -> list[Path]:
        """Return the folders of finished matrices."""
        return sorted({self._path_of(name).parent for name in self._tasks})

    def _remove_partial(self) -> None:
        """Remove what killed processes left among the finished matrices. The lock of the run says that none of them is alive."""
        for folder in (self._work, *self._folders()):
            with suppress(OSError):
                for path in list(folder.iterdir()):
                    if path.name.endswith(".partial") and (folder != self._work or _is_partial(path.name, _RUN)):
                        shutil.rmtree(path, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what is needed only while the checkpoint is not complete."""
        copied = [path.name for path in small_files(self._contents.path)]
        for name in (*self._files, INDEX, DOCUMENT, *copied):
            remove_left_over(self.path / name)
        if self._work.is_dir():
            self._remove_partial()
            with suppress(OSError):
                for path in map(self._path_of, self._tasks):
                    path.unlink(missing_ok=True)
            for folder in self._folders():
                with suppress(OSError):
                    folder.rmdir()
        self._unlock()
        with suppress(OSError):
            for name in (_RUN, _LOCK):
                (self._work / name).unlink(missing_ok=True)
            self._work.rmdir()


def _origins(contents: ModelContents, tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """Return how the tensors of the source hold the matrices, as far as names do not say it."""
    found = {}
    for name, tensor in contents.tensors.items():
        is_usual = (
            tensor.matrices == (name.removesuffix(".weight"),) and name.endswith(".weight") and not tensor.is_transposed
        )
        if tensor.matrices and tensor.matrices[0] in tasks and not is_usual:
            found[name] = {
                "matrices": list(tensor.matrices),
                "is_transposed": tensor.is_transposed,
                "is_stack": len(tensor.shape) == 3,
            }
    return found


def _is_partial(name: str, target: str) -> bool:
    """Return whether a name is that of a temporary folder beside a file."""
    return name.startswith(f".{target}.") and name.endswith(".partial")


def _read_numbers(path: Path, content: Checkpoint) -> _Numbers:
    """Return the metadata of a file of a checkpoint, checked."""
    numbers = Reader(f"{path} is not a file of a checkpoint that is written piece by piece", CheckpointError).convert(
        content.metadata, _Numbers
    )
    if numbers.matrices.keys() != content.matrices.keys() or numbers.tensors.keys() != content.tensors.keys():
        raise CheckpointError(shortened(f"{path} is inconsistent: its metadata are those of other tensors."))
    return numbers


def small_files(source: Path) -> list[Path]:
    """Return the files beside the weights that a model needs, too."""
    if not source.is_dir():
        return []
    return sorted(
        path
        for path in source.iterdir()
        if path.suffix in _COPIED
        and not path.name.endswith(".index.json")
        and path.name not in ("adapter_config.json", DOCUMENT)
        and path.is_file()
        and path.stat().st_size <= _MOST_COPIED_BYTES
    )
