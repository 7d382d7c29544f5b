"""Conformance suites for quantizers, solvers and backends, and Hypothesis strategies for weights and formats."""

from __future__ import annotations

from lqlora._optional import require

require("hypothesis", "testing", "lqlora.testing")

from lqlora.testing import strategies  # noqa: E402 - after the check for Hypothesis
from lqlora.testing.backends.suite import BACKEND_PROPERTIES, assert_backend_conforms, check_backend  # noqa: E402
from lqlora.testing.quantizers.suite import PROPERTIES, assert_quantizer_conforms, check_quantizer  # noqa: E402
from lqlora.testing.report import Finding, Report  # noqa: E402
from lqlora.testing.solvers.suite import SOLVER_PROPERTIES, assert_solver_conforms, check_solver  # noqa: E402

__all__ = [
    "BACKEND_PROPERTIES",
    "PROPERTIES",
    "SOLVER_PROPERTIES",
    "Finding",
    "Report",
    "assert_backend_conforms",
    "assert_quantizer_conforms",
    "assert_solver_conforms",
    "check_backend",
    "check_quantizer",
    "check_solver",
    "strategies",
]
