"""Runs the Python blocks of README.md as tests. Without torch, what needs it to be imported is not collected."""

from importlib.util import find_spec

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

_NEED_TORCH = (
    "lqlora/backends/cupy/tensors.py",
    "lqlora/backends/torch.py",
    "lqlora/cli/*",
    "lqlora/nn/*",
    "tests/data/*",
    "tests/test_docstrings.py",
    "tests/tiny_gguf.py",
)

if find_spec("torch"):
    pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md"]).pytest()
else:
    collect_ignore_glob = list(_NEED_TORCH)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the blocks of README.md come first: each builds on those before, and processes take from the end of others' tests."""
    items.sort(key=lambda item: item.path.name != "README.md")
