"""Headers of GGUF files: settings, and type, shape and place of each tensor, all compared with the size of the file.

A GGUF file has little-endian numbers, without padding up to the tensors::

    magic "GGUF", version (uint32), number of tensors (uint64), number of settings (uint64)
    settings:   key (string), type (uint32), value
    tensors:    name (string), dimensions (uint32), lengths from the innermost (uint64), type (uint32), offset (uint64)
    values of the tensors, each at a multiple of the setting "general.alignment"

A string is its length (uint64) and UTF-8. The value of an array is the type of its elements (uint32), their number
(uint64), and the elements.

References
----------
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lqlora._messages import about_file, shown
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Elements", "Header", "Setting", "StoredTensor", "read_header"]

_VERSIONS = (2, 3)
_KEPT = ("general.", "llama.", "split.")
_MOST_TENSORS, _MOST_SETTINGS = 2**15, 2**12
_LONGEST_NAME = 2**16 - 1
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
#: Lengths, type and offset of a tensor, by the number of dimensions.
_PLACES = [struct.Struct(f"<{dimensions}QIQ") for dimensions in range(_MOST_DIMENSIONS + 1)]
_STRING, _ARRAY = 8, 9
_SCALARS = {
    code: struct.Struct(f"<{letter}")
    for code, letter in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}


@dataclass(frozen=True)
class Elements:
    """Number of elements of an array among the settings. The elements are not read."""

    count: int

    def __repr__(self) -> str:
        return f"a list of {self.count}"


Setting: TypeAlias = int | float | str | Elements


class StoredTensor(NamedTuple):
    """Place of a tensor in a file.

    Parameters
    ----------
    kind : int
        Number of the type.
    shape : tuple of int
        Lengths from the outermost dimension to the innermost.
    offset, nbytes : int
        Position of the first byte in the file, and number of bytes.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """Content of a header.

    Parameters
    ----------
    settings : dict
        Settings whose key begins with ``general.``, ``llama.`` or ``split.``.
    tensors : dict of str to StoredTensor
        Tensors in the order of the file. Each lies within the file, and no two overlap.
    """

    settings: dict[str, Setting]
    tensors: dict[str, StoredTensor]


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> Header:
    """Read the header of a GGUF file. It takes O(n log n) time for n tensors, and reads none of them.

    Parameters
    ----------
    path : Path
        The file.
    sizes : mapping of int to tuple of int
        Number of weights in a block, and of its bytes, by type: ``gguf.GGML_QUANT_SIZES``.

    Returns
    -------
    Header
        Settings and tensors.

    Raises
    ------
    CheckpointError
        If the file cannot be read or its header is not valid.
    """
    try:
        if not path.is_file():
            raise CheckpointError(about_file(path, "is not a file." if path.exists() else "does not exist."))
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Scan(path, data).header(sizes)
    except (OSError, ValueError) as error:  # ValueError: an empty file, or a path with a zero byte
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(about_file(path, f"is not a readable GGUF file: {error}.")) from error


class _Scan:
    """Cursor over the bytes of a file. It compares each length with the bytes that are left, before it uses it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0
        self._where: tuple[str, str | int] | None = None

    def header(self, sizes: Mapping[int, tuple[int, int]]) -> Header:
        tensor_count, setting_count = self._counts()
        settings = self._settings(setting_count)
        alignment = settings.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._fault(f"general.alignment must be a power of two, got {shown(alignment)}")
        tensors = self._tensors(tensor_count, sizes, alignment)
        return Header(settings, tensors)

    def _counts(self) -> tuple[int, int]:
        if self._bytes(4) != b"GGUF":
            raise CheckpointError(about_file(self._path, "is not a GGUF file: it does not begin with 'GGUF'."))
        version = self._number(_U32)
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(
                about_file(
                    self._path, "is a big-endian GGUF file, which is not supported. Convert it to little-endian."
                )
            )
        if version not in _VERSIONS:
            raise CheckpointError(
                about_file(self._path, f"has version {version} of GGUF; versions 2 and 3 are supported.")
            )
        counts = self._number(_U64), self._number(_U64)
        limits = (("tensors", 24, _MOST_TENSORS), ("settings", 13, _MOST_SETTINGS))  # with the bytes of the shortest
        for count, (what, shortest, most) in zip(counts, limits, strict=True):
            if count > most or count * shortest > self._left:
                raise CheckpointError(
                    about_file(
                        self._path,
                        f"states {count} {what}, but at most {min(most, self._left // shortest)} are read of a file of "
                        f"{len(self._data)} bytes.",
                    )
                )
        return counts

    def _settings(self, count: int) -> dict[str, Setting]:
        settings: dict[str, Setting] = {}
        seen = set()
        for index in range(count):
            self._where = ("setting", index)
            key = self._name()
            self._where = ("setting", key)
            if key in seen:
                raise self._fault("the key is used twice")
            seen.add(key)
            value = self._value(self._number(_U32))
            if key.startswith(_KEPT):
                settings[key] = value
        return settings

    def _value(self, kind: int) -> Setting:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            value: int | float = self._number(_SCALARS[kind])
            return value
        if kind != _ARRAY:
            raise self._fault(f"the type of the value must be from 0 to 12, got {kind}")
        kind, count = self._number(_U32), self._number(_U64)
        if kind == _STRING:
            self._skip_strings(count)
        elif kind in _SCALARS:
            self._skip(count * _SCALARS[kind].size)
        else:
            raise self._fault(f"the elements of a list must be numbers or strings, got type {kind}")
        return Elements(count)

    def _skip_strings(self, count: int) -> None:
        if 8 * count > self._left:
            raise self._fault(f"a list of {count} strings does not fit into the {self._left} bytes that are left")
        # Vocabularies have 10^5 strings. Lengths are not negative, so a position beyond the end stays beyond it, and one
        # comparison at the end suffices; until then unpack_from refuses to read there.
        at, data, unpack_from = self._at, self._data, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack_from(data, at)[0]
        except (struct.error, OverflowError):
            at = len(data) + 1
        if at > len(data):
            raise self._fault("the strings of the list end beyond the file")
        self._at = at

    def _tensors(self, count: int, sizes: Mapping[int, tuple[int, int]], alignment: int) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for index in range(count):
            self._where = ("tensor", index)
            name = self._name()
            self._where = ("tensor", name)
            if name in found:
                raise self._fault("the name is used twice")
            found[name] = self._tensor(sizes, alignment)
        # Offsets count from the first multiple of the alignment behind the header.
        start = -(-self._at // alignment) * alignment
        found = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in found.items()}
        self._check_places(found)
        return found

    def _tensor(self, sizes: Mapping[int, tuple[int, int]], alignment: int) -> StoredTensor:
        dimensions = self._number(_U32)
        if dimensions > _MOST_DIMENSIONS:
            raise self._fault(f"the number of dimensions must be at most {_MOST_DIMENSIONS}, got {dimensions}")
        layout = _PLACES[dimensions]
        *lengths, kind, offset = layout.unpack_from(self._data, self._skip(layout.size))
        if 0 in lengths:
            raise self._fault(f"lengths must be at least 1, got {lengths}")
        if kind not in sizes:
            raise self._fault(f"type {kind} is unknown to the installed gguf. A newer gguf may know it")
        per_block, block_bytes = sizes[kind]
        if lengths and lengths[0] % per_block:
            raise self._fault(f"rows of type {kind} must have a multiple of {per_block} weights, got {lengths[0]}")
        if offset % alignment:
            raise self._fault(f"the offset must be a multiple of {alignment}, got {offset}")
        return StoredTensor(kind, tuple(reversed(lengths)), offset, prod(lengths) // per_block * block_bytes)

    def _check_places(self, tensors: Mapping[str, StoredTensor]) -> None:
        size = len(self._data)
        ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
        for name, tensor in ordered:
            if tensor.offset + tensor.nbytes > size:
                self._where = ("tensor", name)
                raise self._fault(
                    f"{tensor.nbytes} bytes at offset {tensor.offset} end beyond the file of {size} bytes"
                )
        # Tensors that share bytes would let a small file decode to many times its size.
        for (_, before), (name, after) in itertools.pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                self._where = ("tensor", name)
                raise self._fault(f"the bytes at offset {after.offset} belong to another tensor, too")

    @property
    def _left(self) -> int:
        return len(self._data) - self._at

    def _skip(self, size: int) -> int:
        """Move behind the next bytes, and return where they begin."""
        if size > self._left:
            raise self._fault(f"{size} bytes at offset {self._at} end beyond the file of {len(self._data)} bytes")
        self._at += size
        return self._at - size

    def _bytes(self, size: int) -> bytes:
        begin = self._skip(size)
        return self._data[begin : begin + size]

    def _number(self, layout: struct.Struct) -> int:
        number: int = layout.unpack_from(self._data, self._skip(layout.size))[0]
        return number

    def _name(self) -> str:
        length = self._number(_U64)
        if length > _LONGEST_NAME:
            raise self._fault(f"the name must have at most {_LONGEST_NAME} bytes, got {length}")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._fault("the name is not UTF-8") from None

    def _text(self) -> str:
        # Values that are compared are short; of a longer text the begin is enough to tell that it differs.
        length = self._number(_U64)
        begin = self._skip(length)
        return self._data[begin : begin + min(length, 200)].decode(errors="replace")

    def _fault(self, problem: str) -> CheckpointError:
        where = f"{self._where[0]} {shown(self._where[1])}: " if self._where else ""
        return CheckpointError(about_file(self._path, f"is not a valid GGUF file: {where}{problem}."))
