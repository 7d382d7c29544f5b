"""CUDA kernels for CuPy arrays, and for torch tensors on a CUDA device where CuPy is installed too.

The kernels are the ``.cu`` files in ``kernels/``. Each kernel is compiled through CuPy when it is first needed, and
kept on disk. ``docs/explanation/testing_cuda.md`` says how they are tested, and what is not known about them.
"""
