"""Folder of statistics that is written block after block, and what its content depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lqlora._documents import Reader
from lqlora._files import remove_left_over, write_whole
from lqlora._messages import shortened, shown
from lqlora.errors import CheckpointError
from lqlora.integrations._work_folders import compare_settings, hold
from lqlora.integrations.statistics import DOCUMENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

__all__ = ["DIGESTS", "CalibrationFolder", "described", "digest_of", "mapped", "source_digest"]

#: What settings that are kept as digests stand for.
DIGESTS = {
    "source": "a model of other weights, or of another configuration",
    "batches": "another text, or other numbers of tokens",
}

_UNFINISHED, _RUN, _LOCK, _WEIGHTS = "unfinished", "run.json", "lock", "weights"

#: Names in a folder of statistics, and in the folder of unfinished ones. What killed processes leave beside them has a dot before the name.
_RESULT = rf"{re.escape(_RUN)}|{re.escape(DOCUMENT)}|(?:inputs|output_gradients)-\d{{5}}-of-\d{{5}}\.safetensors"
_WORK = rf"{_LOCK}|{_WEIGHTS}|(?:states|gradients)-\d{{5}}(?:\.new)?|(?:inputs|gradients)-\d{{5}}\.json"


def _is_ours(name: str, kinds: str) -> bool:
    return re.fullmatch(rf"(?:{kinds})|\.(?:{kinds})\..*\.(?:partial|lock)", name) is not None


class CalibrationFolder:
    """Folder of statistics that is written block after block. Entering it locks it.

    Parameters
    ----------
    path : Path
        The folder.
    settings : dict
        JSON values that the content depends on.

    Attributes
    ----------
    folder, path : Path
        The folder, and the one in it for what is not finished.
    is_complete : bool
        Whether an earlier call has finished.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.folder, self._settings = path, settings
        self.path = path / _UNFINISHED
        self.is_complete = self._is_new = False
        self._lock: Any = None

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(shortened(f"{self.folder} is not a folder. Name another one."))
        self._refuse_others()
        if (self.folder / DOCUMENT).exists():
            self._compare()
            self.is_complete = True
            self.clean()
            return self
        self._is_new = not self.folder.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.path / _LOCK, self.folder)
        try:
            if self.finished() > 0:
                self._compare()
            else:  # other settings may be tried
                self._remove()
                write_whole(self.folder / _RUN, f"{json.dumps(self._settings)}\n".encode())
        except BaseException:
            self._unlock()
            raise
        return self

    def _refuse_others(self) -> None:
        """Raise if something in the folder is not ours."""
        own = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        work = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        foreign = [name for name in own if name != _UNFINISHED and not _is_ours(name, _RESULT)]
        foreign += [f"{_UNFINISHED}/{name}" for name in work if not _is_ours(name, _WORK)]
        if foreign:
            raise CheckpointError(
                shortened(
                    f"{self.folder} is not a folder of statistics: it holds {shown(foreign[0])}. Name another folder."
                )
            )

    def _compare(self) -> None:
        """Raise if the statistics were begun with other settings."""
        path = self.folder / _RUN
        if not path.is_file():
            raise CheckpointError(
                shortened(f"{self.folder} has no {_RUN}, which says what it was begun with. Name another folder.")
            )
        found = Reader(f"{path} is damaged", CheckpointError).read(path.read_bytes(), dict[str, Any])
        compare_settings(self.folder, found, self._settings, DIGESTS)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._lock is not None and self.finished() == 0:
            self._remove()
            shutil.rmtree(self.path, ignore_errors=True)
            if self._is_new:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _remove(self) -> None:
        """Remove what is there of a run that has finished no block."""
        for folder, kinds in ((self.folder, _RESULT), (self.path, _WORK)):
            for path in list(folder.iterdir()):
                if path.name != _LOCK and _is_ours(path.name, kinds):
                    with contextlib.suppress(OSError):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def clean(self) -> None:
        """Remove what is needed only while the statistics are not complete, and what killed processes left."""
        for path in list(self.folder.iterdir()):
            if path.is_file():
                remove_left_over(path)
        shutil.rmtree(self.path, ignore_errors=True)

    def finished(self) -> int:
        """Return the number of blocks that ran forwards.

        Returns
        -------
        int
            The number.
        """
        return max(self.positions("states"), default=0)

    def positions(self, kind: str) -> list[int]:
        """Return the positions of the files of a kind.

        Parameters
        ----------
        kind : {"states", "gradients"}
            The kind.

        Returns
        -------
        list of int
            Numbers of blocks before them.
        """
        names = [path.name for path in self.path.glob(f"{kind}-*")]
        return [int(name[-5:]) for name in names if re.fullmatch(rf"{kind}-\d{{5}}", name)]

    def file(self, kind: str, position: int) -> Path:
        """Return the file of the hidden states, or gradients, before a block.

        Parameters
        ----------
        kind : {"states", "gradients"}
            Which of them.
        position : int
            Number of blocks before.

        Returns
        -------
        Path
            The file.
        """
        return self.path / f"{kind}-{position:05d}"

    def entries(self, position: int, kind: str = "inputs") -> Path:
        """Return the file that lists the matrices of a block.

        Parameters
        ----------
        position : int
            Number of blocks before.
        kind : {"inputs", "gradients"}
            Statistic.

        Returns
        -------
        Path
            The file.
        """
        return self.path / f"{kind}-{position:05d}.json"

    @property
    def weights(self) -> Path:
        """Folder for weights that the model has in another layout than the files."""
        return self.path / _WEIGHTS


def source_digest(path: Path) -> str:
    """Return a digest of the files of a model.

    Parameters
    ----------
    path : Path
        Folder, or one file.

    Returns
    -------
    str
        SHA-256 in hexadecimal digits.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    """
    total = hashlib.sha256()
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file == path or (file.suffix in (".json", ".safetensors") and file.is_file()):
                with file.open("rb") as content:
                    total.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    except (OSError, ValueError) as error:
        raise CheckpointError(shortened(f"{path} cannot be read: {error}.")) from error
    return total.hexdigest()


def digest_of(values: Any) -> str:
    """Return a digest of tensors in lists, tuples and mappings, and of other values by their text.

    Parameters
    ----------
    values : object
        The values.

    Returns
    -------
    str
        SHA-256 in hexadecimal digits.
    """
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            own = value.detach().cpu().contiguous()
            total.update(f"{own.dtype} {tuple(own.shape)} ".encode())
            total.update(own.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            total.update(f"{len(value)} entries ".encode())
            for key, own in value.items():
                total.update(f"{key!r}: ".encode())
                add(own)
        elif isinstance(value, list | tuple):
            total.update(f"{len(value)} items ".encode())
            for own in value:
                add(own)
        else:
            total.update(f"{value!r} ".encode())

    add(values)
    return total.hexdigest()


def described(value: Any) -> str:
    """Return a text of an option: a pattern, several of them, a function, or a plain value.

    Parameters
    ----------
    value : object
        The value.

    Returns
    -------
    str
        Text that is equal for equal values. A function is known by its name and its code, and not by the variables that it
        uses.
    """
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(described, value))
    if isinstance(value, re.Pattern):
        return f"re:{value.pattern} {value.flags}"
    code = getattr(value, "__code__", None)
    if code is not None:
        parts = (
            code.co_code,
            repr(code.co_names).encode(),
            re.sub(r"0x[0-9a-f]+|, line \d+", "", repr(code.co_consts)).encode(),
        )
        return f"{value.__module__}.{value.__qualname__} {hashlib.sha256(b''.join(parts)).hexdigest()}"
    return str(value)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the entries of lists, tuples and mappings.

    Parameters
    ----------
    value : object
        The value.
    function : callable
        Function of an entry.

    Returns
    -------
    object
        Lists, tuples and dicts of the results.
    """
    if isinstance(value, Mapping):
        return {key: mapped(own, function) for key, own in value.items()}
    if isinstance(value, list | tuple):
        own = [mapped(entry, function) for entry in value]
        return own if isinstance(value, list) else tuple(own)
    return function(value)
