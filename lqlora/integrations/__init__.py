"""Bridges to other libraries and file formats."""

from __future__ import annotations
