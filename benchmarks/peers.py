"""NF4 in blocks of 64 on one thread of a CPU: this library on NumPy arrays against bitsandbytes and torchao.

A peer that is not installed gets one line instead of rows. torchao quantizes the scales too, which it always does.
"""

import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time

import numpy as np
import torch

import lqlora as lq

SHAPE = (4096, 4096)
REPEATS = 9


def interleaved_ms(calls):
    """Medians of several calls that take turns, so that a slow moment of the machine hits all of them."""
    times = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def lqlora_calls(weight):
    fmt = lq.BlockFormat(lq.NF4, 64)
    quantized = lq.quantize(weight, fmt)
    return {"quantize": lambda: lq.quantize(weight, fmt), "dequantize": lambda: lq.dequantize(quantized)}


def bitsandbytes_calls(weight):
    from bitsandbytes import functional

    tensor = torch.from_numpy(weight)
    codes, state = functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    return {
        "quantize": lambda: functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4"),
        "dequantize": lambda: functional.dequantize_4bit(codes, state),
    }


def torchao_calls(weight):
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    tensor = torch.from_numpy(weight)
    quantized = to_nf4(tensor, block_size=64)
    return {"quantize": lambda: to_nf4(tensor, block_size=64), "dequantize": quantized.get_original_weight}


PEERS = {"bitsandbytes": bitsandbytes_calls, "torchao": torchao_calls}


def main():
    torch.set_num_threads(1)
    installed = [peer for peer in PEERS if importlib.util.find_spec(peer)]
    weight = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch", *installed)]
    threads = f"{torch.get_num_threads()} thread, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    print(f"{SHAPE[0]} x {SHAPE[1]} float32, NF4 in blocks of 64, medians of {REPEATS} turns; {threads};")
    print(f"{', '.join(versions)}, Python {sys.version.split()[0]}, {torch.backends.cpu.get_cpu_capability()}\n")
    for peer in PEERS:
        if peer not in installed:
            print(f"{peer} is not installed.\n")
    theirs = {peer: PEERS[peer](weight) for peer in installed}
    print("| operation | lqlora, ms | peer | peer, ms | times faster |\n|---|---|---|---|---|")
    for verb, call in lqlora_calls(weight).items():
        medians = interleaved_ms({"lqlora": call} | {peer: calls[verb] for peer, calls in theirs.items()})
        own = medians.pop("lqlora")
        for peer, median in medians.items():
            print(f"| {verb} | {own:.1f} | {peer} | {median:.1f} | {median / own:.2f} |")


if __name__ == "__main__":
    main()
