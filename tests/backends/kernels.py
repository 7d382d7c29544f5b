"""Names of every kernel of the CUDA backend: the instances of the templates that compiler and emulator make."""

from __future__ import annotations

__all__ = ["EXACT", "KERNELS", "MATMUL_SAMPLE", "TENSOR_SAMPLE"]

_BITS = range(1, 9)
_FLOATS = ("float", "Float16", "BFloat16")

#: Modules whose results are the bytes of the reference: products and sums in them must not be fused.
EXACT = {
    "blocks": [
        f"block_statistics<{value}, {extremes}>" for value in (*_FLOATS, "double") for extremes in ("false", "true")
    ],
    "decode": [f"decode<{bits}, {value}>" for bits in _BITS for value in _FLOATS],
    "encode": [
        *(f"encode_packed<{bits}, {value}>" for bits in _BITS for value in (*_FLOATS, "double")),
        "nearest_codes<float>",
        "nearest_codes<double>",
    ],
    "packing": [f"{name}<{bits}>" for name in ("pack_codes", "unpack_codes") for bits in _BITS],
    "search": [f"best_ratios<{bits}>" for bits in _BITS],
    "trellis": [f"decode_trellis<{value}>" for value in _FLOATS],
    "sums": [
        *(f"{name}<{value}>" for name in ("row_sums", "halve_rows") for value in ("float", "double")),
        *("bin_maximum<double>", "bin_sums<double>", "in_units<double>"),
        *(f"{name}<{weighted}>" for name in ("level_maxima", "level_sums") for weighted in ("false", "true")),
    ],
}

#: Dtypes of rows of inputs, each with a dtype of the low-rank factors.
_FACTORS = [(value, factor) for value in _FLOATS for factor in dict.fromkeys((value, "float"))]

KERNELS = {
    **EXACT,
    "lowrank": [
        f"{name}<{value}, {factor}, {most}>"
        for name in ("low_rank_inner", "low_rank_outer")
        for value, factor in _FACTORS
        for most in (1, 4)
    ],
    "matmul": [
        *(f"matmul_packed<{bits}, {value}, {most}>" for bits in _BITS for value in _FLOATS for most in (1, 4)),
        *(f"matmul_packed<{bits}, float, 16>" for bits in _BITS),
    ],
    "trellis_matmul": [f"matmul_trellis<{value}, {most}>" for value in _FLOATS for most in (1, 4, 16)],
    "tensor": [f"matmul_tensor<{bits}, {value}>" for bits in _BITS for value in ("Float16", "BFloat16")],
}

#: Matrix products for a short test: codes of 3, 4 and 8 bits, each dtype, and each number of inputs.
MATMUL_SAMPLE = [
    "matmul_packed<3, float, 4>",
    "matmul_packed<4, float, 1>",
    "matmul_packed<4, Float16, 1>",
    "matmul_packed<4, BFloat16, 4>",
    "matmul_packed<8, float, 16>",
]

TENSOR_SAMPLE = ["matmul_tensor<4, Float16>", "matmul_tensor<3, BFloat16>"]
