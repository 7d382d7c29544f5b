"""Spellings of formats with one text for one meaning, to compare what a reader found with what a file says."""

from __future__ import annotations

import re

__all__ = ["canonical"]


def canonical(text: str) -> str:
    """Return the spelling of a format without leading zeros, and without what its defaults say."""
    text = re.sub(r"(?<![\w.-])(-?)0+(?=[0-9])|(?<=fit)0+(?=[0-9])", r"\1", text.strip())
    head, *scales = text.split(":")
    scales = [re.sub(r"^(u)0*([0-9]+)\+min", r"\1\2", part) for part in scales or ["float32"]]
    scales = [re.sub(r"^(d)0*([0-9]+)\+mean", r"\1\2", part) for part in scales]
    scales = [re.sub(r"^([il])0*([0-9]+)\+none", r"\1\2", part) for part in scales]
    head = re.sub(r"^af4-64(?=[+/])", "af4", head)  # the published table
    return ":".join([head, *(re.sub(r"^([udil])0+(?=[0-9])", r"\1", part) for part in scales)])
