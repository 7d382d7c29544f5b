"""Cost store: a file of finished costs that stays readable after a crash, with locking and merging.

Each row is one line that is flushed to the disk before the next one begins. A process that is killed can therefore
leave only one incomplete line, the last one, without a line break. Opening the store cuts that line off. JSON escapes
line breaks inside texts, so a line break always ends a line. A kill cannot cause any other fault, such as a wrong
checksum or a broken line before the last: opening such a file raises.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lqlora._annotations import annotated, annotated_class
from lqlora._files import input_file, lock, open_unshared, replace_file
from lqlora._messages import shortened, shown
from lqlora.errors import CheckpointError, InvalidArgumentError, StoreError

if TYPE_CHECKING:
    import io
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from lqlora._documents import Reader
    from lqlora.costs._schema import Head, Line

__all__ = ["CostStore", "StoredRow"]

_SPEC = 1

#: First bytes of every line.
_BEGINNING = b'{"sum": "'

#: Version of the numerics. Raise it with any change of the costs of decompositions, so that stores do not mix old and
#: new.
NUMERICS = 1


@dataclass(frozen=True)
class StoredRow:
    """Costs of one matrix.

    Parameters
    ----------
    name : str
        Name of the matrix.
    shape : tuple of int
        Shape of the matrix.
    content : str
        Digest of the entries of the matrix.
    weighting : str
        Digest of the weighting of the matrix.
    costs : dict of str to float
        Cost of each configuration, by its key in the store.
    """

    name: str
    shape: tuple[int, ...]
    content: str
    weighting: str
    costs: dict[str, float]

    def joined(self, other: StoredRow, where: str) -> StoredRow:
        """Merge the costs of this row and of another row of the same matrix.

        Parameters
        ----------
        other : StoredRow
            Row of the same matrix.
        where : str
            File or line that the other row is from, for errors.

        Returns
        -------
        StoredRow
            The row of all costs.

        Raises
        ------
        StoreError
            If the two are of different contents or weightings, or disagree on a cost.
        """
        for what, mine, others in (
            ("shape and entries", (self.shape, self.content), (other.shape, other.content)),
            ("weighting arguments", self.weighting, other.weighting),
        ):
            if mine != others:
                raise StoreError(
                    shortened(
                        f"{where}: the {what} of matrix {self.name!r} have changed since its costs were stored. Use "
                        "another store."
                    )
                )
        for key in self.costs.keys() & other.costs.keys():
            if self.costs[key] != other.costs[key]:
                raise StoreError(
                    shortened(
                        f"{where}: the cost of {self.name!r} in {key} is {other.costs[key]!r}, but {self.costs[key]!r} is "
                        "stored. Use another store, or leave one of the two out of a merge."
                    )
                )
        return StoredRow(self.name, self.shape, self.content, self.weighting, self.costs | other.costs)


@annotated_class
class CostStore:
    """A file of costs that only grows: a line of settings, then a line for each finished row.

    A line is JSON with a checksum. It is flushed to the disk before the next one begins, so a process may be killed at
    any time. An incomplete last line is cut off when the store is opened again. Only one process at a time can have a
    store open.

    Parameters
    ----------
    path : str or path
        The file, which is created if there is none.
    settings : mapping of str to JSON values
        Settings that all costs of the store share.

    Raises
    ------
    StoreError
        If another process has the store open, it was made with other settings, a line is corrupt, or the file is not a
        store. Such a file is left as it is.
    InvalidArgumentError
        If the settings are not JSON values. In this case no file is created.

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
        from lqlora._documents import json_values  # noqa: PLC0415 - imports msgspec
        from lqlora.costs._schema import Head  # noqa: PLC0415

        # Settings are compared with those of the file in the form that JSON gives them. What cannot be written, or read
        # back, is refused before there is a file.
        own = json_values(settings, "settings", InvalidArgumentError)
        head = _line({"lqlora_costs": _SPEC, "numerics": NUMERICS, "settings": own}, Head)
        self.path = input_file(path, StoreError, is_optional=True)
        try:
            # Append mode writes at the end wherever the position is, so neither reading nor the cut below needs a seek
            # back. Without a buffer no half of a line waits in this process, to be written after an error.
            self._file = open_unshared(self.path, "a+b")
        except OSError as error:
            raise StoreError(shortened(f"{self.path} cannot be opened: {error}.")) from error
        try:
            _lock(self._file, self.path)
            data = _read_store(self._file, head, self.path)
            # Everything up to the last line break was flushed. The rest is a line that its process did not finish. It
            # must go before anything is appended, or the next line would continue it. The lock excludes other writers.
            # The whole lines are parsed first: a file that is not a store loses nothing.
            whole = _whole_lines(data)
            found, self.rows = _parsed(whole, self.path)
            if found is not None:
                _check_head(found, own, self.path)
            if len(whole) < len(data):
                self._cut(len(whole))
            self._write(head if found is None else whole[len(data) :])
        except BaseException:
            self._file.close()
            raise

    def append(self, row: StoredRow) -> None:
        """Append a row, and return when it is on the disk.

        Parameters
        ----------
        row : StoredRow
            Costs of a matrix. The store may hold other costs of the same matrix already.

        Raises
        ------
        StoreError
            If the costs contradict those in the store, or cannot be written.
        """
        from lqlora.costs._schema import StoredCosts  # noqa: PLC0415 - imports msgspec

        for key, cost in row.costs.items():  # a reader refuses the whole store for one cost that it cannot read
            if not isinstance(key, str) or type(cost) is not float or not math.isfinite(cost):
                raise StoreError(
                    shortened(f"costs of {row.name!r} must be finite floats by text, got {key!r}: {cost!r}.")
                )
        line = _line(_document(row), StoredCosts)
        # A contradiction is found before anything is written, and `rows` changes only after the line is on the disk. So
        # the file never holds two costs of one cell, and `rows` holds nothing that a crash could take back.
        known = self.rows.get(row.name)
        joined = row if known is None else known.joined(row, str(self.path))
        self._write(line)
        self.rows[row.name] = joined

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self, length: int) -> None:
        try:
            self._file.truncate(length)
        except OSError as error:
            raise StoreError(shortened(f"{self.path} cannot be written: {error}.")) from error

    def _write(self, line: bytes) -> None:
        if self._file.closed:
            raise StoreError(f"{self.path} is closed in this process. Open the store again.")
        rest, end = memoryview(line), os.fstat(self._file.fileno()).st_size
        try:
            while rest:  # a raw write may take only the first bytes
                rest = rest[self._file.write(rest) :]
            if line:
                os.fsync(self._file.fileno())
        except BaseException as error:  # such as a full disk, or Ctrl-C
            # The next line would continue this one. If the file cannot be cut either, no further line may be written.
            try:
                self._file.truncate(end)
            except OSError:
                self._file.close()
            if isinstance(error, OSError):
                raise StoreError(shortened(f"{self.path} cannot be written: {error}.")) from error
            raise

    @staticmethod
    @annotated
    def read(path: str | os.PathLike[str]) -> dict[str, StoredRow]:
        """Read the rows of a store, which another process may be writing.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        dict of str to StoredRow
            Rows by name of the matrix.

        Raises
        ------
        StoreError
            If there is no such file, or a line is corrupt.
        """
        return _read(path)[1]

    @staticmethod
    @annotated
    def merge(paths: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
        """Merge stores that several machines wrote.

        Parameters
        ----------
        paths : iterable of str or path
            Stores with the same settings.
        path : str or path
            Path of the merged store. There must be no file yet.

        Raises
        ------
        StoreError
            If settings differ, two stores disagree about a matrix, a line is corrupt, or there is a file already.
        """
        from lqlora.costs._schema import Head, StoredCosts  # noqa: PLC0415 - imports msgspec

        target, head, rows = input_file(path, StoreError, is_optional=True), None, dict[str, StoredRow]()
        for source in paths:
            own, found = _read(source)
            if head is not None and own is not None:
                _check_head(own, head.settings, source)
            head = own or head
            for name, row in found.items():
                rows[name] = rows[name].joined(row, str(source)) if name in rows else row
        if head is None:
            raise StoreError("paths must hold at least one store with settings, got none to merge.")
        try:
            with replace_file(target, may_exist=False) as beside:
                first = {"lqlora_costs": _SPEC, "numerics": head.numerics, "settings": head.settings}
                lines = (_line(_document(row), StoredCosts) for row in rows.values())
                beside.write_bytes(b"".join([_line(first, Head), *lines]))
        except CheckpointError as error:
            raise StoreError(shortened(str(error))) from error


def _read_store(file: io.FileIO, head: bytes, path: Path) -> bytes:
    """Return the contents of a store, or raise if the file does not begin like one; a model is not read as a whole."""
    file.seek(0)
    first = file.read(len(_BEGINNING))
    is_begun = head.startswith(first)  # a process was killed while it wrote the first line
    if first != _BEGINNING and not is_begun:
        raise StoreError(shortened(f"{path}, line 1, is not that of a store of costs. Choose another path."))
    data = first + file.read()
    if b"\n" not in data and not head.startswith(data):
        raise StoreError(
            shortened(f"{path}, line 1, is not that of a store of costs with these settings. Choose another path.")
        )
    return data


def _lock(file: io.FileIO, path: Path) -> None:
    """Lock an open file until it is closed, or raise if another process has locked it."""
    try:
        lock(file)
    except OSError as error:
        raise StoreError(
            shortened(f"{path} is in use by another process. Wait for it, or use another store.")
        ) from error


def _read(path: str | os.PathLike[str]) -> tuple[Head | None, dict[str, StoredRow]]:
    own = input_file(path, StoreError)
    try:
        data = own.read_bytes()
    except OSError as error:
        raise StoreError(shortened(f"{path} cannot be read: {error}.")) from error
    return _parsed(_whole_lines(data), own)


def _whole_lines(data: bytes) -> bytes:
    """Return the whole lines of a store; the last one needs no line break if its checksum is right."""
    # An editor may have removed the break, or the process was killed between the two. The row is finished all the same.
    whole = data.rfind(b"\n") + 1
    try:
        outer = json.loads(data[whole:])
        is_right = outer["sum"] == _checksum(json.dumps(outer["line"], allow_nan=False))
    except (KeyError, RecursionError, TypeError, ValueError):
        is_right = False
    return data + b"\n" if is_right else data[:whole]


def _document(row: StoredRow) -> dict[str, Any]:
    return {**vars(row), "shape": list(row.shape)}


def _line(document: dict[str, Any], schema: Any) -> bytes:
    """Return a document as a line with its checksum, or raise if it could not be read again."""
    from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec

    text = Reader("row must be one that can be read again", StoreError).write(document, schema)
    return _BEGINNING + f'{_checksum(text)}", "line": {text}}}\n'.encode()


def _checksum(text: str) -> str:
    # The sum is of the text of the document. A reader has only the parsed line, and writes it as text once more. That
    # gives the same text, since json keeps the order of keys and writes the shortest digits that restore a float.
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parsed(data: bytes, path: Path) -> tuple[Head | None, dict[str, StoredRow]]:
    """Return the first line of a store, if it has one, and its rows."""
    from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec
    from lqlora.costs._schema import Head, Line, StoredCosts, StoreVersion  # noqa: PLC0415

    head, rows = None, dict[str, StoredRow]()
    for number, text in enumerate(data.splitlines(), start=1):
        reader = Reader(f"{path}, line {number}, is corrupt", StoreError)
        line = reader.read(text, Line)
        if number == 1:
            if (version := reader.convert(line.line, StoreVersion, "line").lqlora_costs) != _SPEC:
                raise reader.fault(
                    "line.lqlora_costs", f"must be {_SPEC}, which this library reads, got {shown(version)}."
                )
            head = reader.convert(line.line, Head, "line")
            reader.check_depth(head.settings, "line.settings")
            _check_sum(line, reader)
            continue
        own = reader.convert(line.line, StoredCosts, "line")
        _check_sum(line, reader)
        row = StoredRow(own.name, own.shape, own.content, own.weighting, own.costs)
        rows[row.name] = rows[row.name].joined(row, f"{path}, line {number}") if row.name in rows else row
    return head, rows


def _check_sum(line: Line, reader: Reader) -> None:
    """Raise unless a line has the checksum of its document."""
    try:
        found = _checksum(json.dumps(line.line, allow_nan=False))
    except (RecursionError, ValueError) as error:  # of an unknown key, such as 1e999, which is infinite in float64
        raise reader.fault("line", f"must be a document that can be written again: {error}.") from None
    if line.sum != found:
        raise reader.fault("sum", f"must be the checksum of the line, {found}, got {shown(line.sum)}.")


def _check_head(found: Head, mine: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise if a store was made with other settings, and list the differences."""
    if found.numerics != NUMERICS:
        raise StoreError(
            shortened(
                f"{path} has costs of version {shown(found.numerics)} of the numerics, but this library computes version "
                f"{NUMERICS}. Use another store."
            )
        )
    others = found.settings
    different = sorted(key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key))
    if different:
        listed = ", ".join(f"{key} is {others.get(key)!r:.80}, not {mine.get(key)!r:.80}" for key in different)
        raise StoreError(shortened(f"{path} has costs of other settings: {listed[:300]}. Use another store."))
