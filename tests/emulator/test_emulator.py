"""The emulator runs correct kernels, and finds each kind of planted fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import build as emulator
from tests.emulator.build import EmulationError, Range, build
from tests.requirements import require_or_skip

SCHEDULES = (0, 1, 7, 1001)

#: Kernels of one array of floats each, compiled together.
KERNELS = {
    "one_returns_before_a_barrier": "if (threadIdx.x == 5) return;\n__syncthreads();",
    "one_returns_while_others_wait": "if (threadIdx.x != 63) __syncthreads();",
    "two_barriers": "if (threadIdx.x < 32) __syncthreads();\nelse __syncthreads();",
    "barrier_and_shuffle": "if (threadIdx.x < 32) __syncthreads();\nelse x[0] = __shfl_xor_sync(~0u, 1.0f, 1);\n__syncthreads();",
    "half_a_warp": "if (threadIdx.x & 1) return;\nx[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 2);",
    "not_in_its_mask": "x[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);",
    "from_outside_the_mask": "if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_down_sync(0xffffu, x[threadIdx.x], 1);",
    "overlapping_masks": "x[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 < 16 ? ~0u : 0xffff0000u, 1.0f, 1);",
    "two_shuffles": "if (threadIdx.x & 1) x[0] = __shfl_xor_sync(~0u, 1.0f, 1);\nelse x[0] = __shfl_xor_sync(~0u, 2.0f, 1);",
    "no_barrier": "__shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x]; x[threadIdx.x] = s[63 - threadIdx.x];",
    "no_second_barrier": """__shared__ float s; for (int i = 0; i < 3; ++i) {
        if (threadIdx.x == i) s = x[i]; __syncthreads(); x[threadIdx.x] += s; }""",
    "lost_update": "x[0] += 1.0f;",
    "blocks_share": "if (threadIdx.x == 0) x[0] = 1.0f;",
    "shuffle_for_a_barrier": """__shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x];
        const float y = __shfl_xor_sync(~0u, 1.0f, 1); x[threadIdx.x] = y + s[threadIdx.x ^ 1];""",
    "atomic_and_plain": "atomicMax((unsigned*)x, threadIdx.x); if (threadIdx.x == 3) x[1] = x[0];",
    "reads_beyond": "if (threadIdx.x == 63) x[0] = x[threadIdx.x + 1];",
    "writes_before": "x[(long long)threadIdx.x - 1] = 0.0f;",
    "shared_beyond": "__shared__ float s[64]; s[threadIdx.x * 4096] = 0.0f; __syncthreads(); x[threadIdx.x] = s[threadIdx.x];",
    "misaligned": "if (threadIdx.x == 0) *(float4*)(x + 1) = float4{1, 2, 3, 4};",
    "misaligned_word": "if (threadIdx.x == 0) *(unsigned long long*)(x + 1) = 0;",
    "shared_just_beyond": "__shared__ float s[63]; s[threadIdx.x] = 0; __syncthreads(); x[threadIdx.x] = s[0];",
    "never_written": "__shared__ float s[64]; if (threadIdx.x) s[threadIdx.x] = 0; __syncthreads(); x[threadIdx.x] = s[0];",
    "null": "*(float*)(threadIdx.x * 4ll) = 0;",
    "right_reversal": """__shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x]; __syncthreads();
        x[threadIdx.x] = s[63 - threadIdx.x];""",
    "right_sum": """__shared__ float s[2]; float sum = x[threadIdx.x];
        for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = sum;
        __syncthreads(); x[threadIdx.x] = s[0] + s[1];""",
    "right_within_a_warp": """__shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x]; __syncwarp();
        x[threadIdx.x] = s[threadIdx.x ^ 1];""",
    "right_by_halves": "x[threadIdx.x] = __shfl_xor_sync(threadIdx.x & 16 ? 0xffff0000u : 0xffffu, x[threadIdx.x], 15);",
    "right_down": "x[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 1);",
    "right_broadcast": "x[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], 3);",
    "right_maximum": "atomicMax((unsigned*)x, __float_as_uint((float)threadIdx.x));",
    "right_count": """__shared__ unsigned long long s; if (threadIdx.x == 0) s = 0; __syncthreads();
        atomicAdd(&s, (1ull << 40) + threadIdx.x); __syncthreads(); x[threadIdx.x] = (float)(s - (64ull << 40));""",
    "order": "if (threadIdx.x < 64) x[threadIdx.x + 1] = atomicMax((unsigned*)x, threadIdx.x + 1);",
}  # fmt: skip


def kernel(name: str):
    require_or_skip("g++", emulator.is_available())
    text = "".join(f"__global__ void {name}(float* x) {{\n{body}\n}}\n" for name, body in KERNELS.items())
    return build(text, tuple(KERNELS))[name]


def run(name: str, x: np.ndarray, blocks: int = 1, schedule: int = 0) -> np.ndarray:
    x = x.copy()
    address = x.ctypes.data
    kernel(name).launch(
        (blocks,), (64,), [address.to_bytes(8, sys.byteorder)], [Range(address, address + x.nbytes)], schedule
    )
    return x


def numbers(count: int = 64) -> np.ndarray:
    return np.arange(count, dtype=np.float32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_returns_before_a_barrier", "returned"),
        ("one_returns_while_others_wait", "returned"),
        ("two_barriers", "__syncthreads in line .* while other threads are at that in line"),
        ("barrier_and_shuffle", "deadlock|__syncthreads in line"),
        ("half_a_warp", "names lanes that returned|while lanes of mask ffffffff wait for it"),
        ("not_in_its_mask", "not in its own mask 0000ffff"),
        ("from_outside_the_mask", "reads lane 16, which is not in mask 0000ffff"),
        ("overlapping_masks", "overlap"),
        ("two_shuffles", "lanes of mask ffffffff are at line"),
    ],
)
def test_threads_that_wait_for_others_in_vain_are_found(name, message, schedule):
    with pytest.raises(EmulationError, match=message):
        run(name, numbers(), schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        ("no_barrier", 1, "shared memory"),
        ("no_second_barrier", 1, "shared memory: it writes what another thread reads"),
        ("lost_update", 1, "an array: the thread (reads|writes) what another thread"),
        ("blocks_share", 2, "writes what another thread wrote"),
        ("shuffle_for_a_barrier", 1, "shared memory"),
        ("atomic_and_plain", 1, "reads what another thread wrote|writes what another thread reads"),
        ("never_written", 1, "shared memory that no thread of the block has written"),
    ],
)
def test_races_are_found(name, blocks, message, schedule):
    with pytest.raises(EmulationError, match=message):
        run(name, numbers(), blocks, schedule)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_beyond", "block 0, thread 63: read of 4 bytes out of bounds"),
        ("writes_before", "block 0, thread 0: write of 4 bytes out of bounds"),
        ("shared_beyond", "write of 4 bytes out of bounds"),
        ("misaligned_word", "8 bytes at an address that is not a multiple of 8"),
        ("misaligned", "16 bytes at an address that is not a multiple of 16"),
        ("null", "write of 4 bytes out of bounds"),
    ],
)
def test_accesses_to_memory_of_others_are_found(name, message):
    with pytest.raises(EmulationError, match=message):
        run(name, numbers())


def test_one_block_of_those_that_share_is_no_race():
    assert run("blocks_share", numbers())[0] == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("right")])
def test_right_kernels_give_what_they_should_in_every_order(name, schedule):
    x, place = numbers(), np.arange(64)
    expected = {
        "right_reversal": x[::-1],
        "right_sum": np.full(64, x.sum()),
        "right_within_a_warp": x[place ^ 1],
        "right_by_halves": x[place ^ 15],
        "right_down": x[np.where(place % 32 == 31, place, place + 1).clip(max=63)],
        "right_broadcast": x[place // 32 * 32 + 3],
        "right_count": np.full(64, x.sum()),
        "right_maximum": np.maximum(x, np.where(place == 0, 63, 0)),
    }[name]
    assert run(name, x, schedule=schedule).tolist() == expected.tolist()


def test_schedules_are_different_orders():
    found = {run("order", numbers(65) * 0, schedule=schedule).tobytes() for schedule in SCHEDULES}
    assert len(found) == len(SCHEDULES)


def test_every_block_runs_its_own_part():
    text = """template <class Value> __global__ void scale(const Value* x, Value* y, Value factor, int count) {
        const int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < count) y[i] = x[i] * factor; }"""
    require_or_skip("g++", emulator.is_available())
    found = build(text, ("scale<double>", "scale<float>"))["scale<double>"]
    assert found.parameters == ["p8", "p8", "f8", "i4"]
    x, y = np.arange(100.0), np.zeros(100)
    ranges = [Range(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (x, y)]
    pointers = [array.ctypes.data.to_bytes(8, sys.byteorder) for array in (x, y)]
    found.launch((4,), (32,), [*pointers, np.float64(3).tobytes(), np.int32(100).tobytes()], ranges)
    assert y.tolist() == (x * 3).tolist()


def test_text_that_does_not_compile_is_refused_with_what_the_compiler_says():
    require_or_skip("g++", emulator.is_available())
    with pytest.raises(EmulationError, match="no_such_function"):
        build("__global__ void wrong(float* x) { no_such_function(x); }", ("wrong",))


def again(mode: str, *arguments: str, preload: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python with another kind of emulation, which is chosen once per process."""
    environment = {**os.environ, emulator.VARIABLE: mode, "LD_PRELOAD": preload}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "HYPOTHESIS_PROFILE": "quick"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


@pytest.mark.slow
def test_portable_fibers_find_the_same():
    require_or_skip("g++", emulator.is_available())
    done = again("portable", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def sanitizer() -> str:
    require_or_skip("g++", emulator.is_available())
    return subprocess.run(
        ["g++", "-print-file-name=libasan.so"], text=True, capture_output=True, check=True
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_beyond", "heap-buffer-overflow"),
        ("writes_before", "heap-buffer-overflow"),
        ("shared_just_beyond", "global-buffer-overflow"),
    ],
)
def test_addresses_beyond_arrays_are_found_by_the_sanitizer_too(name, message):
    code = f"from tests.emulator.test_emulator import *; run({name!r}, numbers())"
    done = again("addresses", "-c", code, preload=sanitizer())
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
    assert message in done.stderr


@pytest.mark.slow
def test_the_sanitizer_has_nothing_to_say_of_the_kernels_of_the_backend():
    tests = [str(Path(__file__).parents[1] / "backends" / name) for name in ("test_cuda.py", "test_cuda_fits.py")]
    done = again(
        "addresses", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "stand-in", *tests, preload=sanitizer()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
