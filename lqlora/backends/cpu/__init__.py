"""Overrides for arrays in host memory: compiled kernels, NumPy code, and torch tensors as views of NumPy arrays.

The kernels (``kernels/kernels.cpp`` and its headers) are compiled for several instruction sets when the package is
installed. The first call chooses the best set that the machine has. Without a compiler, the overrides in NumPy run.
"""
