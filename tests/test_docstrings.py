"""Every public name has a docstring that states its parameters and what it returns."""

import enum
import importlib
import inspect
import pkgutil
import typing

import pytest
from numpydoc.validate import validate

import lqlora

CHECKS = {"GL08", "SS01", "PR01", "PR02", "PR03", "RT01"}
PRIVATE_ROOMS = ("cli", "backends.cpu", "backends.cuda")


def public_modules():
    names = [m.name for m in pkgutil.walk_packages(lqlora.__path__, "lqlora.")]
    return [n for n in names if not any(part.startswith("_") for part in n.split(".")[1:])]


def public_objects():
    for module in public_modules():
        if module.removeprefix("lqlora.").startswith(PRIVATE_ROOMS):
            continue
        for name in getattr(importlib.import_module(module), "__all__", ()):
            yield f"{module}.{name}"


def own_methods(cls):
    for name, member in vars(cls).items():
        documented_above = any(hasattr(base, name) for base in cls.__mro__[1:])
        callable_member = inspect.isfunction(member) or isinstance(member, classmethod | property)
        if not name.startswith("_") and callable_member and not documented_above:
            yield name


def documented(path):
    module, _, name = path.rpartition(".")
    member = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(member) or callable(member)) or isinstance(member, lqlora.Codebook):
        return []
    if typing.get_origin(member) is not None:  # an alias of a type
        return []
    if inspect.isclass(member) and (issubclass(member, enum.Enum) or getattr(member, "_is_protocol", False)):
        return [f"{path}.{method}" for method in own_methods(member)]  # nobody calls these classes
    if inspect.isclass(member):
        return [path, *(f"{path}.{method}" for method in own_methods(member))]
    return [path]


@pytest.mark.parametrize("path", sorted(set(public_objects())))
def test_docstring_states_parameters_and_returns(path):
    faults = [
        f"{name}: {code} {text}"
        for name in documented(path)
        for code, text in validate(name)["errors"]
        if code in CHECKS
    ]
    assert not faults


def test_there_are_public_objects():
    assert len(list(public_objects())) > 50
