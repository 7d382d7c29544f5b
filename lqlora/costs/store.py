"""Costs on disk: what was finished is not done again, whenever and wherever the work was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lqlora.costs._lock import lock
from lqlora.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

__all__ = ["CostStore", "StoredRow"]

_SPEC = 1

#: Raised by whoever changes what a decomposition costs: rows of another number are not mixed with new ones.
NUMERICS = 1


@dataclass(frozen=True)
class StoredRow:
    """Costs of one matrix.

    Parameters
    ----------
    name : str
        The matrix.
    shape : tuple of int
        Its shape.
    content : str
        Digest of its entries.
    weighting : str
        Digest of its weighting.
    costs : dict of str to float
        By configuration, in the spelling of the store.
    """

    name: str
    shape: tuple[int, ...]
    content: str
    weighting: str
    costs: dict[str, float]

    def joined(self, other: StoredRow, where: str) -> StoredRow:
        """Return the costs of both.

        Parameters
        ----------
        other : StoredRow
            Of the same matrix.
        where : str
            Where the other is from, for errors.

        Returns
        -------
        StoredRow
            With the costs of either.

        Raises
        ------
        StoreError
            If the two are of different contents or weightings, or disagree on a cost.
        """
        for what, mine, others in (
            ("entries", self.content, other.content),
            ("weighting", self.weighting, other.weighting),
        ):
            if mine != others:
                raise StoreError(f"{where}: matrix {self.name!r} has other {what} than the one whose costs are stored.")
        for key in self.costs.keys() & other.costs.keys():
            if self.costs[key] != other.costs[key]:
                raise StoreError(
                    f"{where}: {self.name!r} in {key} costs {other.costs[key]!r}, but {self.costs[key]!r} is stored."
                )
        return StoredRow(self.name, self.shape, self.content, self.weighting, self.costs | other.costs)


class CostStore:
    """A file of costs that only ever grows: a line of settings, then one line for each piece of work that was finished.

    A line is JSON with a checksum. It is flushed to the disk before the next one is begun, so that a process may be
    killed at any time: what it was writing then is cut off when the store is opened again. One process at a time may
    have a store open.

    Parameters
    ----------
    path : str or path
        The file. It is made if there is none.
    settings : mapping of str to JSON values
        What all costs of the store have in common.

    Raises
    ------
    StoreError
        If another process has the store open, it was made with other settings, or a line is corrupt.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "costs.jsonl"
    >>> with CostStore(path, {"seed": 0}) as store:
    ...     store.append(StoredRow("a", (2, 3), "c0ffee", "none", {"nf4/64:float16 rank 8": 1.5}))
    >>> CostStore.read(path)["a"].costs
    {'nf4/64:float16 rank 8': 1.5}
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        head = {"lqlora_costs": _SPEC, "numerics": NUMERICS, "settings": dict(settings)}
        try:
            self._file = open(self.path, "a+b", buffering=0)  # noqa: PTH123, SIM115 - closed by close()
        except OSError as error:
            raise StoreError(f"Cannot open {self.path}: {error}.") from error
        try:
            lock(self._file, self.path)
            self._file.seek(0)
            data = self._file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):  # a line that was being written when its process ended
                self._file.truncate(whole)
            found, self.rows = _parsed(data[:whole], self.path)
            if found is None:
                self._write(head)
            else:
                _check_head(found, head, self.path)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: StoredRow) -> None:
        """Add costs, and return when they are on the disk.

        Parameters
        ----------
        row : StoredRow
            Costs of a matrix; the store may have others of the same matrix already.

        Raises
        ------
        StoreError
            If they contradict those in the store, or cannot be written.
        """
        known = self.rows.get(row.name)
        joined = row if known is None else known.joined(row, str(self.path))
        self._write(
            {
                "name": row.name,
                "shape": list(row.shape),
                "content": row.content,
                "weighting": row.weighting,
                "costs": row.costs,
            }
        )
        self.rows[row.name] = joined

    def close(self) -> None:
        """Close the file, so that another process may open it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, document: dict[str, Any]) -> None:
        try:
            line = memoryview(_line(document))
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StoreError(f"Cannot write {self.path}: {error}.") from error

    @staticmethod
    def read(path: str | os.PathLike[str]) -> dict[str, StoredRow]:
        """Read the rows of a store; another process may be writing it meanwhile.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        dict of str to StoredRow
            By matrix.

        Raises
        ------
        StoreError
            If there is no such file, or a line is corrupt.
        """
        return _read(Path(path))[1]

    @staticmethod
    def merge(paths: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
        """Join stores that were written by several machines.

        Parameters
        ----------
        paths : iterable of str or path
            Stores with the same settings.
        path : str or path
            Where the joined store is written; there must be no file yet.

        Raises
        ------
        StoreError
            If settings differ, two stores disagree about a matrix, a line is corrupt, or there is a file already.
        """
        target, head, rows = Path(path), None, dict[str, StoredRow]()
        for source in map(Path, paths):
            own, found = _read(source)
            if head is not None and own is not None:
                _check_head(own, head, source)
            head = own or head
            for name, row in found.items():
                rows[name] = rows[name].joined(row, str(source)) if name in rows else row
        if head is None:
            raise StoreError("There is nothing to merge.")
        beside = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with CostStore(beside, head["settings"]) as store:
                for row in rows.values():
                    store.append(row)
            os.link(beside, target)  # unlike a rename it fails where there is a file
        except OSError as error:
            raise error if isinstance(error, StoreError) else StoreError(f"Cannot write {target}: {error}.") from error
        finally:
            with suppress(OSError):
                beside.unlink()


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, StoredRow]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error}.") from error
    return _parsed(data[: data.rfind(b"\n") + 1], path)


def _line(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, allow_nan=False)
    return f'{{"sum": "{_checksum(text)}", "line": {text}}}\n'.encode()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parsed(data: bytes, path: Path) -> tuple[dict[str, Any] | None, dict[str, StoredRow]]:
    """Return the first line of a store, if it has one, and its rows."""
    head, rows = None, dict[str, StoredRow]()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            outer = json.loads(line)
            document = outer["line"]
            if outer["sum"] != _checksum(json.dumps(document, allow_nan=False)):
                raise ValueError("the checksum is another")
            if number == 1:
                if document["lqlora_costs"] != _SPEC:
                    raise ValueError(f"this library reads version {_SPEC}, not {document['lqlora_costs']!r}")
                head = document
                continue
            row = StoredRow(
                document["name"],
                tuple(document["shape"]),
                document["content"],
                document["weighting"],
                {key: _finite(cost) for key, cost in document["costs"].items()},
            )
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise StoreError(f"Line {number} of {path} is corrupt: {type(error).__name__} {error}.") from error
        rows[row.name] = rows[row.name].joined(row, f"Line {number} of {path}") if row.name in rows else row
    return head, rows


def _finite(value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no cost")
    return value


def _check_head(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raise unless a store was made with the settings at hand, and say which of them differ."""
    if found["numerics"] != wanted["numerics"]:
        raise StoreError(
            f"{path} has costs of another version of the numerics ({found['numerics']!r}; this is {wanted['numerics']!r})."
        )
    mine, others = wanted["settings"], found["settings"]
    different = sorted(key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key))
    if different:
        listed = ", ".join(f"{key} is {others.get(key)!r} and not {mine.get(key)!r}" for key in different)
        raise StoreError(f"{path} has costs of other settings: {listed[:500]}. Use another file.")
