"""Tiny models with random weights, quantized: of transformers, and plain ones."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import lqlora as lq

#: 3 bits, with scales that are quantized themselves.
FORMAT = lq.BlockFormat.parse("nf3/16:u8/256:float32")

VOCABULARY = 64


def llama(**options):
    """A Llama of two layers, quantized."""
    return quantized(dense_llama, **options)


def dense_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    return LlamaForCausalLM(config).eval()


def gpt2(**options):
    """A GPT-2 of two layers, quantized. Its layers have biases and stored the transposed matrix."""
    return quantized(dense_gpt2, **options)


def dense_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    return model


def quantized(make, **options):
    return copy.deepcopy(_quantized_once(make)) if not options else _quantized(make, options)


@functools.cache
def _quantized_once(make):
    return _quantized(make, {})


def _quantized(make, options):
    model = make()
    lq.nn.quantize_model(model, FORMAT, **{"rank": 4, **options})
    return model


def tokens(rows=4, seed=1):
    return torch.randint(0, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(seed))


def examples(count=16):
    """Data set for a Trainer."""
    return [{"input_ids": row, "labels": row} for row in tokens(count)]


def low_rank_model(ranks=(3, 2, 0), scalings=(1.0, 0.3, 1.0)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 8))
    names = ("0", "1", "2")
    rank, scaling = dict(zip(names, ranks, strict=True)), dict(zip(names, scalings, strict=True))
    lq.nn.quantize_model(model, lq.BlockFormat.parse("nf3/4:float32"), rank=rank, scaling=scaling)
    return model.eval()


def without_factors(model):
    """The quantized part of a model, with factors of rank 0."""
    found = copy.deepcopy(model)
    old = lq.nn.factors(found)
    lq.nn.set_factors(found, {name: lq.nn.Factors(f.lora_A[:0], f.lora_B[:, :0], 1.0) for name, f in old.items()})
    return found


def dense_nested_model():
    """Two layers, of which one has a name that the name of the other ends with."""
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(8, 8), "b": nn.ModuleDict({"q": nn.Linear(8, 8)})})


def nested_model():
    """The same, quantized. The layer with the longer name has no factors."""
    model = dense_nested_model()
    fmt = lq.BlockFormat.parse("nf4/8:float32")
    lq.nn.quantize_model(model, fmt, rank={"q": 3, "b.q": 0}, scaling={"q": 0.5})
    return model
