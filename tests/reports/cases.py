"""Shared cases of reports: names of a mixture of experts."""

from __future__ import annotations

EXPERTS = [f"h.{layer}.experts.{expert}.up" for layer in range(2) for expert in range(3)] + ["h.0.q", "h.1.q"]
