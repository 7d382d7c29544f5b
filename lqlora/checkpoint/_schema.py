"""Schemas of the JSON documents of checkpoints, of files of factors, and of files of scales."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from lqlora._documents import Length, Number, Text
from lqlora.codebooks.codebook import StoredNormalization

__all__ = ["Content", "FactorContent", "FactorRow", "FolderContent", "Matrix", "ScaleContent", "ScaleRow", "Version"]


class Version(Struct):
    """The one field of a document that is the same in all versions."""

    spec: int


class Matrix(Struct, frozen=True):
    """Description of a quantized matrix."""

    format: Text
    shape: tuple[Length, Length]
    scaling: Number
    normalization: StoredNormalization | UnsetType = UNSET


class Content(Struct, frozen=True):
    """The document. Other keys are not refused: the fingerprint covers them."""

    spec: int
    matrices: dict[Text, Matrix]
    metadata: dict[str, Any]
    sha256: Text | UnsetType = UNSET


class FolderContent(Struct, frozen=True):
    """The document of a folder of shards."""

    spec: int
    shards: dict[Text, Text]
    metadata: dict[str, Any]
    sha256: Text


class FactorRow(Struct, frozen=True):
    """Description of the factors of one layer."""

    scaling: Number
    base: Text


class FactorContent(Struct, frozen=True):
    """The document of a file of factors."""

    spec: int
    factors: dict[Text, FactorRow]
    metadata: dict[str, Any]
    sha256: Text


class RunContent(Struct, frozen=True):
    """The document of a file of an interrupted run."""

    spec: int
    run: Text
    metadata: dict[str, Any]
    sha256: Text


class ScaleRow(Struct, frozen=True):
    """Description of the scales of one layer. A scaling means that the file has the factors of the layer."""

    base: Text
    scaling: Number | UnsetType = UNSET


class ScaleContent(Struct, frozen=True):
    """The document of a file of scales."""

    spec: int
    scales: dict[Text, ScaleRow]
    metadata: dict[str, Any]
    sha256: Text
