"""Runs the Python blocks of README.md as tests. Without torch, what needs it to be imported is not collected."""

import gc
import re
import sys
from collections.abc import Generator
from importlib.util import find_spec

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

_NEED_TORCH = (
    "lqlora/backends/cpu/torch.py",
    "lqlora/backends/cuda/torch.py",
    "lqlora/cli/*",
    "lqlora/integrations/peft.py",
    "lqlora/nn/*",
    "lqlora/recipes/*",
    "tests/data/*",
    "tests/fuzz/adapters.py",
    "tests/integrations/tiny_models.py",
    "tests/nn/large_offload.py",
    "tests/nn/offloading.py",
    "tests/nn/structures.py",
    "tests/nn/two_processes.py",
    "tests/test_docstrings.py",
    "tests/tiny_gguf.py",
)

#: Not collected here, because what they need to be imported is not installed.
collect_ignore_glob = [] if find_spec("peft") else ["lqlora/integrations/_peft_layers.py"]

if find_spec("torch"):
    pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md"]).pytest()
else:
    collect_ignore_glob += _NEED_TORCH


#: Tests, with the examples of docstrings, of what pyproject.toml counts the coverage of.
_COUNTED = re.compile(r"(tests|lqlora)/(codebooks/|ops/|quantized/|(test_)?formats\.py)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the blocks of README.md come first: each builds on those before, and processes take from the end of others' tests."""
    items.sort(key=lambda item: item.path.name != "README.md")


def pytest_collection_finish() -> None:
    """Leave the thousands of collected tests out of garbage collections, which would walk through all of them each time."""
    gc.collect()
    gc.freeze()


#: Tests without coverage since the last one with it.
_uncounted: list[str] = []


def _forget_uncounted() -> None:
    """Empty the caches of the modules that coverage is counted of, if tests without coverage may have filled them."""
    if not _uncounted:
        return
    _uncounted.clear()
    for name, module in list(sys.modules.items()):
        if _COUNTED.match(name.replace(".", "/") + ("/" if hasattr(module, "__path__") else ".py")):
            for function in list(vars(module).values()):
                if callable(clear := getattr(function, "cache_clear", None)):
                    clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Count coverage in the tests of what it is counted of only: a test takes twice as long while it is counted.

    The marker no_cover of pytest-cov does that in one process, but not in those of pytest-xdist. What tests before a
    counted one left in caches is forgotten, or the lines that computed it would never be counted.
    """
    tracer = sys.gettrace()
    if not type(tracer).__module__.startswith("coverage"):
        return (yield)
    if _COUNTED.match(item.nodeid):
        _forget_uncounted()
        return (yield)
    _uncounted.append(item.nodeid)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
