"""Digests of matrices and weightings, and JSON of settings, by which a store recognizes the inputs of its costs."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora.codebooks import codebook_to_json
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lqlora._typing import Array
    from lqlora.costs.table import Configuration
    from lqlora.weighting import AbstractWeighting

__all__ = ["array_digest", "configuration_key", "format_key", "settings_as_json", "text_digest", "weighting_digest"]


def array_digest(array: Array) -> str:
    """Return a digest of the shape, the dtype and the entries of an array."""
    # The digest must not depend on the library, the device, or the strides of the array. Half precision is widened,
    # since NumPy has no bfloat16, and the entries are hashed in C order. Shape and dtype come first: the bytes alone
    # would be the same for a (2, 8) and a (4, 4) array. `host.data` cannot be taken of an array without entries.
    host = np.ascontiguousarray(np.asarray(ops.convert(ops.widen(array), np)))
    digest = hashlib.sha256(f"{host.dtype.name} {host.shape} ".encode())
    digest.update(host.data if host.size else b"")
    return digest.hexdigest()


def weighting_digest(weighting: AbstractWeighting | None) -> str:
    """Return a digest of the class of a weighting and of its arguments."""
    if weighting is None:
        return "none"
    if not dataclasses.is_dataclass(weighting):
        raise InvalidArgumentError(
            f"weighting must be a dataclass, whose fields can be compared with those of an earlier run, got {type(weighting).__name__}."
        )
    parts = [type(weighting).__qualname__]
    # Fields with init=False follow from the arguments, and may hold what was computed lazily.
    for field in dataclasses.fields(weighting):
        if field.init:
            value = getattr(weighting, field.name)
            parts.append(f"{field.name}={value!r}" if _is_plain(value) else f"{field.name}={array_digest(value)}")
    return text_digest("\n".join(parts))


def text_digest(text: str) -> str:
    """Return the SHA-256 digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def configuration_key(configuration: Configuration) -> str:
    """Return the key of a configuration in a store."""
    return f"{format_key(configuration.format)} rank {configuration.rank}"


def format_key(fmt: BlockFormat) -> str:
    """Return a format as text, with a digest of the levels if the codebook has no standard name."""
    # A name that is not standard may stand for other levels in the next run, so the levels are part of the key.
    own = codebook_to_json(fmt.codebook)
    if not own:
        return str(fmt)
    levels = f"{own['normalization']} {own['levels']}"
    return f"{fmt} {text_digest(levels)[:16]}"


def settings_as_json(settings: Mapping[str, Any], remedy: str = "Leave out store.") -> dict[str, Any]:
    """Return settings as values of JSON. If one cannot be written, the error ends with the remedy."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, BlockFormat):
            found[name] = format_key(value)
        elif _is_plain(value):
            found[name] = value
        else:
            raise InvalidArgumentError(
                f"{name} must be text, a number or a format, which a file can keep, got {value!r}. {remedy}"
            )
    return found


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)
