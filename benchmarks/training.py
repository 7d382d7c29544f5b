"""Forward and backward passes of layers that train, against dense frozen layers with factors of the same rank.

Run by ``scripts/bench`` on one thread. Prints CPU milliseconds, medians of runs that took turns, and ratios within a run.
If bitsandbytes and PEFT are installed, a last row of each group is theirs.
"""

import copy
import importlib.util
import statistics
import time
from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

import lqlora as lq

#: Processors without units for bfloat16 take half a minute for a dense pass of 256 rows.
RUNS = {torch.float32: 7, torch.bfloat16: 3}
SIZE, RANK = 4096, 16
EXPERTS, TOKENS, FEW, WIDTH, INNER = 8, 256, 16, 1024, 2048
NF4 = "nf4/64:float32"
FORMATS = (NF4, "nf4/64:u8/256:float32", "nf3/64:float32")


class Dense(nn.Module):
    """Frozen dense layer with trainable factors."""

    def __init__(self, weight, dtype):
        super().__init__()
        rows, columns = weight.shape
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.lora_B = nn.Parameter(torch.randn(rows, RANK) / RANK**0.5)

    def forward(self, x):
        """Return the sum of both parts."""
        low_rank = functional.linear(functional.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return functional.linear(x, self.weight) + low_rank


def milliseconds(modules, *inputs):
    """Return the median time of a forward and backward pass of each module."""
    found = [[] for _ in modules]
    for _ in range(RUNS[inputs[0].dtype]):
        for module, times in zip(modules, found, strict=True):
            start = time.process_time()
            module(*inputs).float().square().sum().backward()
            times.append(1e3 * (time.process_time() - start))
    return [statistics.median(times) for times in found]


def peers(weight, dtype):
    """Return the layer of bitsandbytes with the factors of PEFT, by name, if both are installed."""
    if not all(map(importlib.util.find_spec, ("bitsandbytes", "peft"))):
        return {}
    import bitsandbytes as bnb
    import peft

    layer = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4")
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["base"], init_lora_weights=False)
    adapted = peft.get_peft_model(nn.Sequential(OrderedDict(base=layer.to("cpu"))), config)
    return {f"nf4, blocks of 64, bitsandbytes {bnb.__version__} and PEFT {peft.__version__}": adapted}


def linear_rows():
    weight = torch.randn(SIZE, SIZE) / SIZE**0.5
    for dtype in (torch.float32, torch.bfloat16):
        dense = Dense(weight, dtype)
        factors = dense.lora_A.detach(), dense.lora_B.detach()
        quantized = {text: lq.quantize(weight, lq.BlockFormat.parse(text)) for text in FORMATS}
        layers = {text: lq.nn.LQLinear(q, *factors) for text, q in quantized.items()}
        layers |= {f"{NF4}, scales train": lq.nn.PEQALinear(quantized[NF4])}
        layers |= peers(weight, dtype)
        for rows in (16, 256):
            x = torch.randn(rows, SIZE, dtype=dtype, requires_grad=True)
            base, *others = milliseconds([dense, *layers.values()], x)
            for name, own in zip(layers, others, strict=True):
                yield f"{SIZE} x {SIZE}, {rows} rows, {str(dtype)[6:]}", name, base, own


class Experts(nn.Module):
    """Experts that see equal shares of the tokens, as transformers stores and runs them."""

    is_concatenated = True

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(_experts_implementation_internal="eager")
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / WIDTH**0.5, requires_grad=False)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5, requires_grad=False)

    def forward(self, x):
        """Give each expert an equal share of the rows."""
        return torch.cat([self._one(rows, index) for index, rows in enumerate(x.chunk(EXPERTS))])

    forward.__wrapped__ = forward  # what the decorator of transformers does

    def _one(self, rows, index):
        gate, up = functional.linear(rows, self.gate_up_proj[index]).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down_proj[index])


class DenseExperts(Experts):
    """The same with dense matrices and factors."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterDict()
        for key in ("gate_up_proj", "down_proj"):
            for index, matrix in enumerate(getattr(self, key)):
                rows, columns = matrix.shape
                self.factors[f"{key}_{index}_A"] = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
                self.factors[f"{key}_{index}_B"] = nn.Parameter(torch.randn(rows, RANK) / RANK**0.5)

    def _product(self, rows, key, index):
        lora_A, lora_B = (self.factors[f"{key}_{index}_{own}"] for own in "AB")
        low_rank = functional.linear(functional.linear(rows, lora_A), lora_B)
        return functional.linear(rows, getattr(self, key)[index]) + low_rank

    def _one(self, rows, index):
        gate, up = self._product(rows, "gate_up_proj", index).chunk(2, dim=-1)
        return self._product(functional.silu(gate) * up, "down_proj", index)


class GroupedExperts(Experts):
    """The same with dense matrices and factors, as grouped products of all experts."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterDict()
        for key in ("gate_up_proj", "down_proj"):
            _, rows, columns = getattr(self, key).shape
            self.factors[f"{key}_A"] = nn.Parameter(torch.randn(EXPERTS, RANK, columns) / columns**0.5)
            self.factors[f"{key}_B"] = nn.Parameter(torch.randn(EXPERTS, rows, RANK) / RANK**0.5)

    def forward(self, x):
        """Multiply rows that are sorted by expert, as they are here."""
        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (len(x) // EXPERTS)
        gate, up = self._product(x, "gate_up_proj", ends).chunk(2, dim=-1)
        return self._product(functional.silu(gate) * up, "down_proj", ends)

    def _product(self, rows, key, ends):
        lora_A, lora_B = (self.factors[f"{key}_{own}"].mT for own in "AB")
        low_rank = functional.grouped_mm(functional.grouped_mm(rows, lora_A, offs=ends), lora_B, offs=ends)
        return functional.grouped_mm(rows, getattr(self, key).mT, offs=ends) + low_rank


def expert_rows():
    model = nn.Sequential(Experts())
    quantized = copy.deepcopy(model)
    lq.nn.quantize_model(quantized, lq.BlockFormat.parse(NF4), rank=RANK, max_iter=1)
    for tokens in (TOKENS, FEW):
        x = torch.randn(EXPERTS * tokens, WIDTH, requires_grad=True)
        looped, grouped, own = milliseconds([DenseExperts(), GroupedExperts(), quantized], x)
        layer = f"{EXPERTS} experts, {tokens} tokens each, {WIDTH} to {INNER}, float32"
        yield f"{layer}, against dense experts one by one", NF4, looped, own
        yield f"{layer}, against dense grouped products", NF4, grouped, own


def main():
    torch.manual_seed(0)
    print("| layer | format | dense, ms | quantized, ms | ratio |")
    print("|---|---|---|---|---|")
    for rows in (linear_rows(), expert_rows()):
        for layer, name, base, own in rows:
            print(f"| {layer} | {name} | {base:.0f} | {own:.0f} | {own / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
