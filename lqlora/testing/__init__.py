"""Hypothesis strategies for weights and formats, and a suite of properties for anybody's quantizer."""

from __future__ import annotations

from lqlora._optional import require

require("hypothesis", "testing", "lqlora.testing")

from lqlora.testing import strategies  # noqa: E402 - after the check
from lqlora.testing.quantizers import PROPERTIES, assert_quantizer_conforms, check_quantizer  # noqa: E402
from lqlora.testing.report import Finding, Report  # noqa: E402

__all__ = ["PROPERTIES", "Finding", "Report", "assert_quantizer_conforms", "check_quantizer", "strategies"]
