"""What identifies the input of a cost: digests of matrices and weightings, and settings as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora.codebooks import is_standard
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lqlora._typing import Array
    from lqlora.costs.table import Configuration
    from lqlora.weighting import AbstractWeighting

__all__ = ["array_digest", "configuration_key", "settings_as_json", "text_digest", "weighting_digest"]


def array_digest(array: Array) -> str:
    """Digest an array by shape, dtype and entries in their logical order, whatever library it is of."""
    host = np.ascontiguousarray(np.asarray(ops.convert(ops.widen(array), np)))
    digest = hashlib.sha256(f"{host.dtype.name} {host.shape} ".encode())
    digest.update(host.data if host.size else b"")
    return digest.hexdigest()


def weighting_digest(weighting: AbstractWeighting | None) -> str:
    """Digest a weighting by its class and what it was made of."""
    if weighting is None:
        return "none"
    if not dataclasses.is_dataclass(weighting):
        raise InvalidArgumentError(
            f"{type(weighting).__name__} is no dataclass, and a store cannot tell what it is made of."
        )
    parts = [type(weighting).__qualname__]
    for field in dataclasses.fields(weighting):
        if field.init:
            value = getattr(weighting, field.name)
            parts.append(f"{field.name}={value!r}" if _is_plain(value) else f"{field.name}={array_digest(value)}")
    return text_digest("\n".join(parts))


def text_digest(text: str) -> str:
    """Digest a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def configuration_key(configuration: Configuration) -> str:
    """Return the spelling of a configuration in a store."""
    return f"{_format_key(configuration.format)} rank {configuration.rank}"


def _format_key(fmt: BlockFormat) -> str:
    """Return the spelling of a format; with a digest of the levels where the name does not say what they are."""
    if is_standard(fmt.codebook):
        return str(fmt)
    levels = f"{fmt.codebook.normalization} {fmt.codebook.levels.tolist()}"
    return f"{fmt} {text_digest(levels)[:16]}"


def settings_as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON holds them."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, BlockFormat):
            found[name] = _format_key(value)
        elif _is_plain(value):
            found[name] = value
        else:
            raise InvalidArgumentError(f"A store cannot tell one {name} from another: {value!r} is no text or number.")
    return found


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)
