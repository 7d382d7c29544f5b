"""NVIDIA's compiler takes every kernel for every architecture, spills no register and fuses nothing that must be exact."""

from __future__ import annotations

import re

import pytest

from lqlora.backends.cuda.kernel_text import OPTIONS, source
from tests.backends import nvrtc
from tests.backends.kernels import EXACT, KERNELS, MATMUL_SAMPLE, TENSOR_SAMPLE
from tests.requirements import require_or_skip

#: Architectures from the oldest one that CUDA 13 compiles for.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

#: The oldest architecture of files of kernels that older devices do not run.
OLDEST = {"tensor": 80}

#: Registers of a thread; 128 in other files. A multiprocessor of any architecture has 65,536 of them: enough for two
#: blocks of 256 threads, for two of 512 in search and sums, and for three of 128 in matmul.
MOST_REGISTERS = {"matmul": 168, "search": 64, "sums": 64}

#: Kernels of each module for a short test.
SAMPLE = {
    "blocks": ["block_statistics<Float16, false>", "block_statistics<float, true>"],
    "decode": ["decode<3, Float16>", "decode<4, float>"],
    "encode": ["encode_packed<4, float>", "nearest_codes<double>"],
    "packing": ["pack_codes<3>", "unpack_codes<4>"],
    "search": ["best_ratios<4>"],
    "sums": ["row_sums<double>", "level_sums<true>"],
    "lowrank": ["low_rank_inner<Float16, float, 4>", "low_rank_outer<float, float, 4>"],
    "matmul": MATMUL_SAMPLE[1:2],
    "tensor": TENSOR_SAMPLE[:1],
    "trellis": ["decode_trellis<Float16>"],
    "trellis_matmul": ["matmul_trellis<float, 1>", "matmul_trellis<BFloat16, 16>"],
}


def compiled(architecture: int, module: str, names: list[str]) -> nvrtc.Compiled:
    require_or_skip("nvrtc", nvrtc.is_available())
    return nvrtc.compile_for(architecture, source(module), OPTIONS, names)


def check(architecture: int, module: str, names: list[str]) -> None:
    if architecture < OLDEST.get(module, 0):
        pytest.skip(f"No kernel of {module} is compiled for that.")
    found = compiled(architecture, module, names)
    assert sorted(found.usage) == sorted(names)
    for name, usage in found.usage.items():
        assert usage.spilled == 0, name
        assert usage.stack <= 16, name  # divisions of float64 are calls
        assert usage.registers <= MOST_REGISTERS.get(module, 128), name
    if module in EXACT:
        assert not re.search(r"\bfma\.", found.ptx)
    assert not re.search(r"\.approx|\.ftz|\bdiv\.full", found.ptx)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("module", SAMPLE)
@pytest.mark.parametrize("architecture", [75, 90])
def test_a_sample_of_the_kernels_compiles(architecture, module):
    check(architecture, module, SAMPLE[module])


@pytest.mark.slow
@pytest.mark.parametrize("module", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_spills_or_products_that_are_fused(architecture, module):
    # Each kernel for one of the architectures: registers.py compiles all for all, and takes minutes.
    check(architecture, module, KERNELS[module][ARCHITECTURES.index(architecture) :: len(ARCHITECTURES)])


@pytest.mark.parametrize("module", ["decode", "encode", "blocks"])
def test_numbers_that_lie_aligned_are_read_and_written_sixteen_bytes_at_a_time(module):
    ptx = compiled(80, module, SAMPLE[module]).ptx
    assert re.search(r"\b(ld|st)\.global[.\w]*\.v4\.", ptx)


def test_the_options_are_what_keeps_products_unfused():
    text = "template <class T> __global__ void both(T* x) { x[0] = x[1] * x[2] + x[3]; }"
    require_or_skip("nvrtc", nvrtc.is_available())
    names = ["both<float>", "both<double>"]
    assert "fma.rn" not in nvrtc.compile_for(80, text, OPTIONS, names).ptx
    assert "fma.rn.f32" in nvrtc.compile_for(80, text, ("--std=c++17",), names).ptx


def test_spilled_registers_would_be_seen():
    text = """template <int n> __global__ void __launch_bounds__(1024, 2) many(float* x) {
      float y[n]; for (int i = 0; i < n; ++i) y[i] = x[i * threadIdx.x];
      for (int i = 0; i < n; ++i) for (int k = 0; k < n; ++k) y[i] += y[k] * x[i + k];
      for (int i = 0; i < n; ++i) x[i] = y[i]; }"""
    require_or_skip("nvrtc", nvrtc.is_available())
    usage = nvrtc.compile_for(80, text, OPTIONS, ["many<60>"]).usage["many<60>"]
    assert usage.spilled > 0


def test_a_kernel_that_is_wrong_fails_with_the_line():
    require_or_skip("nvrtc", nvrtc.is_available())
    with pytest.raises(AssertionError, match=r"packing\.cu\(\d+\): error"):
        nvrtc.compile_for(80, source("packing").replace("code_in<8>", "no_such_function"), OPTIONS, ["pack_codes<4>"])


def test_no_kernel_needs_a_header():
    for module in KERNELS:
        assert "#include" not in source(module)
