"""Overhead of the torch operators over the functions they run: as registered, and as ``custom_op`` would register them.

Run by ``scripts/bench`` on one thread. Prints microseconds of CPU time per call, least of 15 runs: for a row times a
matrix so small that little else takes time, and for layers of the sizes of SmolLM2-135M, with and without the kernel that
multiplies by a weight and its factors in one call.
"""

import time

import torch
from torch.library import custom_op
from torch.nn import functional

import lqlora as lq
from lqlora.nn import LQLinear, from_operands, operands
from lqlora.nn.operator_arguments import described

CALLS, RUNS = 300, 15
SIZE = 64
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
FORMATS = ("nf4/64:float32", "nf4/64:u8/256:float32")


@custom_op(
    "benchmark::matmul", mutates_args=(), schema="(Tensor x, Tensor[] weight, str fmt, SymInt[] shape) -> Tensor"
)
def plain(x, weight, fmt, shape):
    return lq.matmul(x, from_operands(weight, fmt, shape))


def keep(ctx, inputs, output):  # noqa: ARG001 - given by keyword
    ctx.save_for_backward(*inputs[1])
    ctx.rest = inputs[2:]


def transpose(ctx, grad):
    weight = list(ctx.saved_tensors)
    return torch.ops.lqlora.matmul(grad, weight, *ctx.rest, adjoint=True), [None] * len(weight), None, None


plain.register_autograd(transpose, setup_context=keep)


def microseconds(calls):
    """Return the least time of each call; runs take turns, so that a busy minute strikes all of them."""
    least = [float("inf")] * len(calls)
    for _ in range(RUNS):
        for index, call in enumerate(calls):
            start = time.process_time()
            for _ in range(CALLS):
                call()
            least[index] = min(least[index], 1e6 * (time.process_time() - start) / CALLS)
    return least


def row(text):
    generator = torch.Generator().manual_seed(0)
    q = lq.quantize(torch.randn(SIZE, SIZE, generator=generator), lq.BlockFormat.parse(text))
    layer = LQLinear(q, torch.randn(8, SIZE, generator=generator), torch.zeros(SIZE, 8))
    x = torch.randn(1, SIZE, generator=generator)
    wants = x.clone().requires_grad_()
    three = operands(q)[:3]
    function, *operators, whole = microseconds(
        [
            lambda: lq.matmul(x, q),
            lambda: torch.ops.lqlora.matmul(x, *three),
            lambda: torch.ops.lqlora.matmul(wants, *three),
            lambda: torch.ops.benchmark.matmul(x, *three),
            lambda: torch.ops.benchmark.matmul(wants, *three),
            lambda: layer(x),
        ]
    )
    with torch.inference_mode():
        (inferred,) = microseconds([lambda: layer(x)])
    return [function, *(time - function for time in operators), whole, inferred]


class Dense(torch.nn.Module):
    """Dense layer with factors."""

    def __init__(self, weight, lora_A, lora_B):
        super().__init__()
        self.weight, self.lora_A, self.lora_B = map(torch.nn.Parameter, (weight, lora_A, lora_B))

    def forward(self, x):
        """Return the sum of both parts."""
        return functional.linear(x, self.weight) + functional.linear(functional.linear(x, self.lora_A), self.lora_B)


def layer_row(shape, dtype, text):
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    w, a, b, x = (torch.randn(*own, generator=generator) for own in (shape, (16, columns), (rows, 16), (1, 1, columns)))
    layer = LQLinear(lq.quantize(w, lq.BlockFormat.parse(text)), a, b).to(dtype)
    dense, bare, x = Dense(w, a, b).to(dtype), Dense(w, a, b).to(dtype), x.to(dtype)
    bare.forward = lambda x: functional.linear(x, bare.weight)

    description = described(*layer.quantized.operands)
    plan, known = description.linear, vars(description)

    def by_operations():
        known["linear"] = None
        layer(x)
        known["linear"] = plan

    with torch.inference_mode():
        return microseconds([lambda: bare(x), lambda: dense(x), by_operations, lambda: layer(x)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    operators = "operator adds | with gradient | custom_op adds | with gradient"
    print(f"| format | lq.matmul | {operators} | LQLinear | in inference mode |")
    print("|---|---|---|---|---|---|---|---|")
    for text in FORMATS:
        print(f"| {text} | {' | '.join(f'{time:.0f}' for time in row(text))} |")
    print(
        "\n| layer | format | dense | dense with factors | LQLinear by operations | LQLinear |\n|---|---|---|---|---|---|"
    )
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for text in FORMATS:
                times = " | ".join(f"{time:.0f}" for time in layer_row(shape, dtype, text))
                print(f"| {shape[0]} x {shape[1]}, {str(dtype)[6:]} | {text} | {times} |")
