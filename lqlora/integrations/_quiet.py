"""Bars of transformers, which are hidden while this library shows its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from lqlora._optional import require

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["without_bars"]


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the bars of transformers, and show them again at the end if they were shown.

    Yields
    ------
    None
        Once.
    """
    logging = require("transformers.utils.logging", "demo", "Reading models")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
