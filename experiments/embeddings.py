"""Perplexity of SmolLM2-135M with a quantized embedding, which is also the output embedding. All other weights are dense.

Perplexity comes from 4,088 predictions on the last part of the packaged documentation of Python, as in ``experiments/smollm2.py``.
"""

import torch
from smollm2 import token_sequences

import lqlora as lq
from lqlora import recipes
from lqlora.integrations.gguf import load_llama, packaged_smollm2

#: Formats, and how scales are fitted.
FORMATS = (
    ("int8/64:float16", "absmax"),
    ("int6/64:u8/256:float32", "absmax"),
    ("nf4/64:u8/256:float32", "absmax"),
    ("nf4/64:u8/256:float32", "scale"),
)


def main():
    model, tokenizer = load_llama(packaged_smollm2())
    _, evaluation = token_sequences(tokenizer, None, None)
    table = model.get_input_embeddings().weight
    dense = table.detach().clone()
    print("| format | fit | MB | perplexity |\n|---|---|---|---|")
    print(f"| float32 | | {dense.nbytes / 1e6:.1f} | {recipes.perplexity(model, evaluation):.2f} |", flush=True)
    for text, fit in FORMATS:
        q = lq.quantize(dense, lq.BlockFormat.parse(text), fit=fit)
        with torch.no_grad():
            table.copy_(lq.dequantize(q))
        print(f"| {text} | {fit} | {q.nbytes / 1e6:.1f} | {recipes.perplexity(model, evaluation):.2f} |", flush=True)


if __name__ == "__main__":
    main()
