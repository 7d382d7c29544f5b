"""Type aliases that several subpackages use."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

__all__ = ["Array", "FloatName", "Namespace"]

#: An array of NumPy, torch, CuPy or any library that follows the array API standard. The standard has no common base
#: class, so static checkers see ``Any``; shapes and dtypes are stated in each docstring and checked at run time.
Array: TypeAlias = Any

#: An array API namespace, such as ``array_api_compat.numpy``.
Namespace: TypeAlias = Any

#: Storage dtypes of scales.
FloatName: TypeAlias = Literal["float32", "float16", "bfloat16"]
