"""Oracle of the 4-bit layout of bitsandbytes: one code at a time, with the levels in the file."""

from __future__ import annotations

import json
from math import prod

import numpy as np


def state_of(tensors: dict[str, np.ndarray]) -> dict:
    (key,) = (key for key in tensors if "quant_state" in key)
    return json.loads(tensors[key].tobytes())


def scales_of(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the scales: level times second-level scale, rounded to float32, plus the offset, rounded again."""
    state, absmax = state_of(tensors), tensors["weight.absmax"]
    if "nested_offset" not in state:
        return absmax
    levels, second = tensors["weight.nested_quant_map"], tensors["weight.nested_absmax"]
    products = [levels[code] * second[i // state["nested_blocksize"]] for i, code in enumerate(absmax.tolist())]
    return np.array([product + np.float32(state["nested_offset"]) for product in products], dtype=np.float32)


def codes_of(tensors: dict[str, np.ndarray]) -> list[int]:
    packed = tensors["weight"].reshape(-1).tolist()
    return [code for byte in packed for code in (byte >> 4, byte & 15)][: prod(state_of(tensors)["shape"])]


def decode(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the decoded weight of the tensors named ``weight``, as float32."""
    state, scales, levels = state_of(tensors), scales_of(tensors), tensors["weight.quant_map"]
    values = [levels[code] * scales[i // state["blocksize"]] for i, code in enumerate(codes_of(tensors))]
    return np.array(values, dtype=np.float32).reshape(state["shape"])
