"""Source text of the CUDA kernels, and the options of their compiler."""

from __future__ import annotations

import functools
from importlib import resources

__all__ = ["MODULES", "OPTIONS", "source"]

#: Products and sums are not fused, and divisions are rounded correctly: kernels return the bytes of the reference.
OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")

#: Files of kernels. The compiler gets the text of the shared files and then that of one of these, as one program.
MODULES = (
    "blocks",
    "decode",
    "encode",
    "lowrank",
    "matmul",
    "packing",
    "search",
    "sums",
    "tensor",
    "trellis",
    "trellis_matmul",
)

_SHARED = ("numbers.cuh", "groups.cuh", "halving.cuh", "states.cuh")


@functools.cache
def source(module: str) -> str:
    """Return the CUDA C++ text of a file of kernels, which includes no header.

    Parameters
    ----------
    module : str
        One of :data:`MODULES`.

    Returns
    -------
    str
        Source text. Line directives make the compiler's errors name file and line.

    Examples
    --------
    >>> "block_statistics" in source("blocks")
    True
    """
    folder = resources.files(__package__) / "kernels"
    names = (*_SHARED, f"{module}.cu")
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in names)
