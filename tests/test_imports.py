"""What ``import lqlora`` does not import. A fresh interpreter each time: this one has imported everything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lqlora._optional import is_installed
from tests.requirements import require_or_skip

OPTIONAL = (
    "torch", "cupy", "transformers", "gguf", "matplotlib", "rich", "typer", "hypothesis",
    "highspy", "cylp", "pyscipopt", "gurobipy", "ortools",
)  # fmt: skip


def imported_by(code):
    """Names of the optional packages that are imported after ``code`` has run."""
    report = f"import sys; print(*[name for name in {OPTIONAL!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_the_check_can_fail():
    package = next(name for name in ("highspy", "rich", "matplotlib", "torch") if is_installed(name))
    assert package in imported_by(f"import {package}")


@pytest.mark.parametrize("module", ["lqlora", "lqlora.cli"])
def test_importing_imports_nothing_optional(module):
    assert imported_by(f"import {module}") == set()


def test_quantizing_numpy_arrays_imports_nothing_optional():
    code = """
import numpy as np, lqlora as lq
q = lq.quantize(np.ones((8, 8)), lq.BlockFormat(lq.NF4))
lq.decompose(np.ones((8, 8)), q.format, rank=2)
lq.backends.available()
"""
    assert imported_by(code) == set()


def test_the_bridge_to_torch_is_imported_at_first_use():
    require_or_skip("torch", is_installed("torch"))
    assert "torch" in imported_by("import lqlora; lqlora.nn")
