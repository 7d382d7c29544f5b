"""Kernels compiled for the CPU when the package was installed: overrides for NumPy, which torch's views take too.

The kernels (``kernels.cpp``, and a header for each kind of them) are compiled for several instruction sets; the best one
of the machine is chosen when the library is loaded. Where the package was installed without a compiler nothing is
registered, and NumPy does the work.
"""

from __future__ import annotations

from lqlora.backends.native import overrides
from lqlora.backends.native.library import instruction_sets, status, using
from lqlora.backends.native.overrides import FEW_ROWS, PIECE

__all__ = ["FEW_ROWS", "PIECE", "instruction_sets", "status", "using"]

overrides.register()
