"""Optional packages that ``import lqlora`` does not import, and names of modules that functions do not take.

Imports are watched in a fresh interpreter, because this one has imported everything.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lqlora
from lqlora._optional import is_installed
from tests.requirements import require_or_skip

OPTIONAL = (
    "torch", "cupy", "transformers", "gguf", "matplotlib", "peft", "rich", "tqdm", "typer", "hypothesis",
    "highspy", "msgspec", "cylp", "pyscipopt", "gurobipy", "ortools",
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


def test_no_function_shadows_the_module_of_its_name():
    """``from lqlora.room import name`` must return the module where ``lqlora/room/name.py`` is a file."""
    root = Path(lqlora.__file__).parent
    shadowed = []
    for init in root.rglob("__init__.py"):
        package = ".".join(("lqlora", *init.parent.relative_to(root).parts))
        for node in ast.parse(init.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module != package:
                names = [alias.asname or alias.name for alias in node.names]
                shadowed += [f"{package}.{name}" for name in names if (init.parent / f"{name}.py").exists()]
    assert shadowed == []
