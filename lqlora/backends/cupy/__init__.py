"""CUDA kernels for CuPy arrays, and for torch tensors on a CUDA device where CuPy is installed too.

The kernels are the ``.cu`` files beside this one. CuPy compiles each of them when it is first needed and keeps the result
on disk. ``docs/explanation/testing_cuda.md`` says how they are tested, and what is not known of them: no one has run them
on a GPU yet.
"""

from __future__ import annotations

from lqlora.backends.cupy import cuda, memory

__all__: list[str] = []

cuda.register(memory.CuPyMemory())
