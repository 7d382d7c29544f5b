from __future__ import annotations

import importlib
import pkgutil

import pytest

import lqlora
from lqlora._optional import is_installed

CONTRACT = {
    "": ["normal_float", "NF4", "uniform", "Codebook", "BlockFormat", "Rotation", "ScaleFormat", "paper_grid", "quantize", "dequantize", "matmul",
         "decompose", "Decomposition", "QuantizedArray", "initializers", "weighting", "cost_table", "allocate", "Plan", "solvers",
         "backends", "forced", "nn", "recipes", "save", "load", "verify", "codebooks", "affine", "dynamic8", "fp4", "logarithmic", "small_float",
         "student_float", "testing", "Limit", "memory_budget", "pareto", "ties"],
    "codebooks": ["AF4", "FP4_BNB", "abnormal_float", "block_optimal", "by_name", "is_standard"],
    "initializers": ["lqlora", "loftq", "qlora"],
    "weighting": ["Uniform", "RowColumn", "Elementwise"],
    "recipes": ["compress", "fine_tune", "packaged_text", "perplexity", "read_text", "split_sequences", "token_sequences"],
    "backends": ["available", "explain", "capabilities", "register", "Takes", "Availability", "Capability"],
    "testing": ["strategies", "check_quantizer", "assert_quantizer_conforms", "Report", "Finding", "PROPERTIES",
                "check_solver", "assert_solver_conforms", "SOLVER_PROPERTIES",
                "check_backend", "assert_backend_conforms", "BACKEND_PROPERTIES"],
}  # fmt: skip


#: Modules that cannot be imported without a package.
NEED = {
    "torch": ("lqlora.nn", "lqlora.recipes", "lqlora.backends.cpu.torch", "lqlora.integrations.peft"),
    "peft": ("lqlora.integrations._peft_layers",),
}


def modules():
    """Every module of the package that can be imported here."""
    names = [module.name for module in pkgutil.walk_packages(lqlora.__path__, "lqlora.", onerror=lambda _: None)]
    return [
        name
        for name in names
        if all(is_installed(package) or not name.startswith(needing) for package, needing in NEED.items())
    ]


@pytest.mark.parametrize("module", CONTRACT, ids=lambda name: name or "lqlora")
def test_the_names_of_the_design_exist(module):
    owner = importlib.import_module(f"lqlora.{module}".rstrip("."))
    assert [name for name in CONTRACT[module] if name not in owner.__all__] == []


@pytest.mark.parametrize("name", ["lqlora", *modules()])
def test_every_public_name_resolves(name):
    module = importlib.import_module(name)
    missing = [public for public in module.__all__ if not hasattr(module, public)] if hasattr(module, "__all__") else []
    assert missing == []


@pytest.mark.parametrize("name", ["lqlora", *modules()])
def test_public_names_are_sorted_and_listed_once(name):
    listed = list(getattr(importlib.import_module(name), "__all__", ()))
    # Constants, then classes, then functions: as the linter sorts them.
    assert sorted(set(listed), key=lambda word: (not word.isupper(), not word[0].isupper(), word)) == listed


def test_public_names_are_all_that_dir_promises():
    assert set(lqlora.__all__) <= {*dir(lqlora), "decompose_checkpoint", "nn", "recipes", "testing"}


def test_unknown_attributes_are_refused_by_name():
    with pytest.raises(AttributeError, match=r"lqlora.*quantise"):
        _ = lqlora.quantise


def test_every_error_descends_from_one():
    from lqlora import errors

    named = [getattr(errors, name) for name in errors.__all__]
    classes = [cls for cls in named if not issubclass(cls, Warning)]
    assert all(issubclass(cls, errors.LQLoRAError) for cls in classes)
    assert all(len(cls.__mro__) > len(errors.LQLoRAError.__mro__) for cls in classes if cls is not errors.LQLoRAError)


def test_names_of_ops_are_functions_and_classes():
    # The page of backends lists them as such, and a constant makes a warning there.
    assert all(callable(getattr(lqlora.ops, name)) for name in lqlora.ops.__all__)
