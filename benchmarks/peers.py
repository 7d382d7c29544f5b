"""Speed of NF4 in blocks of 64 on one CPU thread: this library on NumPy arrays against bitsandbytes and torchao.

A peer that is not installed is named and left out. torchao always quantizes the scales, too, and multiplies in bfloat16
only. With ``--record`` the tables go into the documentation.
"""

import importlib.util
import statistics
import time

import numpy as np
import torch
from records import Record

import lqlora as lq

SHAPE = (4096, 4096)
REPEATS = 9
BATCHES = (1, 16, 256)


def interleaved_ms(calls):
    """Return medians of calls that take turns, so that a slow moment of the machine affects all of them."""
    times = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def inputs(weight, batch):
    return np.random.default_rng(batch).standard_normal((batch, weight.shape[1]), dtype=np.float32)


def products_of(batch):
    return f"{batch} row(s) times the weight"


def lqlora_calls(weight):
    fmt = lq.BlockFormat(lq.NF4, 64)
    quantized = lq.quantize(weight, fmt)
    rows = {batch: inputs(weight, batch) for batch in BATCHES}
    return {
        "quantize": lambda: lq.quantize(weight, fmt),
        "dequantize": lambda: lq.dequantize(quantized),
        **{products_of(batch): lambda x=x: lq.matmul(x, quantized) for batch, x in rows.items()},
    }


def bitsandbytes_calls(weight):
    from bitsandbytes import functional, matmul_4bit

    tensor = torch.from_numpy(weight)
    rows = {batch: torch.from_numpy(inputs(weight, batch)) for batch in BATCHES}
    codes, state = functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    return {
        "quantize": lambda: functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4"),
        "dequantize": lambda: functional.dequantize_4bit(codes, state),
        **{products_of(batch): lambda x=x: matmul_4bit(x, codes.t(), state) for batch, x in rows.items()},
    }


def torchao_calls(weight):
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    tensor = torch.from_numpy(weight)
    quantized = to_nf4(tensor, block_size=64)
    return {"quantize": lambda: to_nf4(tensor, block_size=64), "dequantize": quantized.get_original_weight}


PEERS = {"bitsandbytes": bitsandbytes_calls, "torchao": torchao_calls}


def rows_of(weight, installed):
    theirs = {peer: PEERS[peer](weight) for peer in installed}
    for verb, call in lqlora_calls(weight).items():
        medians = interleaved_ms(
            {"lqlora": call} | {peer: calls[verb] for peer, calls in theirs.items() if verb in calls}
        )
        own = medians.pop("lqlora")
        for peer, median in medians.items():
            yield verb, f"{own:.1f}", peer, f"{median:.1f}", f"{median / own:.2f}"


def main():
    torch.set_num_threads(1)
    installed = [peer for peer in PEERS if importlib.util.find_spec(peer)]
    weight = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    record = Record("peers", ("numpy", "torch", *PEERS))
    for peer in PEERS:
        if peer not in installed:
            print(f"{peer} is not installed.\n")
    record.table(
        f"{SHAPE[0]} x {SHAPE[1]} float32, NF4 in blocks of 64, one thread, medians of the wall time of {REPEATS} turns",
        ("operation", "lqlora, ms", "peer", "peer, ms", "times faster"),
        rows_of(weight, installed),
    )


if __name__ == "__main__":
    main()
