"""Overrides for arrays in host memory: compiled kernels, NumPy code, and torch tensors as views of NumPy arrays.

The kernels (``kernels/kernels.cpp`` and its headers) are compiled when the package is installed, for several instruction
sets. The best one that the machine has is chosen when the library is loaded. Without a compiler, NumPy does the work.
"""
