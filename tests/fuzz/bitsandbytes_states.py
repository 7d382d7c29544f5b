"""Fuzzer of 4-bit weights in state dicts of bitsandbytes: tensors, and the JSON that describes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

import lqlora as lq
from lqlora.integrations.bitsandbytes import find_bitsandbytes, from_bitsandbytes, to_bitsandbytes
from tests.fuzz.mutate import NAMES, Raw, changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same
from tests.oracles import bitsandbytes as oracle

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

__all__ = ["BitsandbytesStates"]

_STATE = ".quant_state.bitsandbytes__"
_FLOATS = (np.nan, np.inf, -np.inf, -0.0, -1.0, 3e38, -3e38, 1e-45, 0.0, 1.0)
_DTYPES = (np.int8, np.uint8, np.float16, np.float32, np.float64, np.int64, np.bool_, ml_dtypes.bfloat16, np.complex64)


@functools.cache
def states() -> tuple[dict[str, np.ndarray], ...]:
    """Return weights that bitsandbytes wrote, and weights of this library of few and of odd entries."""
    with np.load(Path(__file__).parents[1] / "data" / "bitsandbytes.npz") as file:
        found: dict[str, dict[str, np.ndarray]] = {}
        for key in file.files:
            case, _, name = key.partition("/")
            if name.startswith("weight"):
                found.setdefault(case, {})[name] = file[key]
    small = [own for own in found.values() if own["weight"].size < 400]
    rng = np.random.default_rng(0)
    for shape, fmt in (((3, 11), "nf4/32:float32"), ((5, 16), "fp4-bnb/32:d8/256:float32"), ((1,), "nf4/64:float32")):
        q = lq.quantize(rng.standard_normal(shape).astype(np.float32), lq.BlockFormat.parse(fmt))
        small.append(to_bitsandbytes(q, dtype="float16"))
    return tuple(small)


class BitsandbytesStates:
    """Mutated state dicts."""

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated state dict."""
        tensors, said = dict(rng.choice(states())), []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change = rng.choice((_change_state, _change_array, _change_names, _change_content, _change_content))
            said.append(change(rng, tensors))
        return _case(tensors, ", ".join(said))

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield weights that were once read wrong, or ended in an error of another library."""
        for tensors in states():
            yield _case(tensors, "unchanged", must="read")
        plain, nested = states()[-3], states()[-2]
        for tensors in (plain, nested):
            for value in (None, 5, "text", [1, 2], b"bytes", {}, np.float32(1), {"dtype": 1}):
                for key in tensors:
                    yield _case(tensors | {key: value}, f"{key} is {value!r}")
            text = _text(tensors)
            for field in json.loads(text):
                for value in (
                    None,
                    True,
                    -1,
                    2**62,
                    Raw("9" * 5000),
                    Raw("NaN"),
                    "\x1b[31m" * 200,
                    [],
                    Raw("1e400"),
                    {},
                ):
                    made = _described(tensors, changed(text, {field: value}))
                    yield _case(made, f"{field} is {str(value)[:9]!r}")
            for shape in (
                [2**31 - 1] * 2,
                [2**31 - 1] * 32,
                [0],
                [0, 2**30],
                [1] * 33,
                [True, 3],
                [3.0, 11],
                [-3, -11],
            ):
                yield _case(_described(tensors, changed(text, {"shape": shape})), f"shape {str(shape)[:20]}")
            for own in ("", "null", "5", "[" * 100_000, "\ufeff" + text, "{}", text + "x", '"\\ud800"', "\x00"):
                yield _case(_described(tensors, own), f"description {own[:9]!r}")
            yield _case(_described(tensors, text.encode("utf-16")), "description in UTF-16")
            yield _case(_described(tensors, b"\xff" + text.encode()), "description in no encoding")
            yield _case(tensors | {"weight.\x1b[2J\n" + "x" * 500: np.ones(1)}, "a tensor of a long name with escapes")
            both = {key.replace("nf4", "fp4"): array for key, array in tensors.items() if _STATE in key}
            yield _case(tensors | both | {f"weight{_STATE}\x1b[2J" * 20: np.ones(1)}, "several descriptions")
        for key, value in (("weight.absmax", np.nan), ("weight.absmax", -1.0), ("weight.quant_map", np.nan)):
            array = plain[key].copy()
            array[0] = value
            yield _case(plain | {key: array}, f"{key} has {value}")
        second = nested["weight.nested_absmax"].copy()
        second[0] = 3e38
        offset = _described(nested, changed(_text(nested), {"nested_offset": 3.4e38}))
        yield _case(offset | {"weight.nested_absmax": second}, "scales that overflow when they are decoded")


def _key(tensors: dict[str, Any]) -> str | None:
    """Return the key of the description of a weight."""
    return next((key for key in tensors if _STATE in key), None)


def _text(tensors: dict[str, Any]) -> str:
    return tensors[_key(tensors) or ""].tobytes().decode()


def _described(tensors: dict[str, Any], text: str | bytes) -> dict[str, Any]:
    """Return tensors with another description."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass")
    return tensors | {_key(tensors) or "": np.frombuffer(data, dtype=np.uint8)}


def _change_state(rng: random.Random, tensors: dict[str, Any]) -> str:
    key = _key(tensors)
    if key is None or not isinstance(tensors[key], np.ndarray) or tensors[key].dtype != np.uint8:
        return "nothing"
    data = tensors[key].tobytes()
    try:
        text, said = mutated_text(rng, data.decode())
        data = text.encode("utf-8", errors="surrogatepass")
    except (RecursionError, ValueError):  # it was mutated before
        data, said = mutated_bytes(rng, data)
    tensors[key] = np.frombuffer(data, dtype=np.uint8)
    return f"description: {said}"


def _change_array(rng: random.Random, tensors: dict[str, Any]) -> str:
    key = rng.choice(list(tensors))
    array = tensors[key]
    if not isinstance(array, np.ndarray) or not array.size:
        return "nothing"
    change = rng.choice(("entry", "bytes", "dtype", "shape", "length", "object", "order"))
    if change == "entry":
        array = array.copy()
        flat = array.reshape(-1)
        floats = array.dtype.kind == "f" and array.dtype != np.float16
        with np.errstate(all="ignore"):
            flat[rng.randrange(array.size)] = rng.choice(_FLOATS) if floats else rng.choice((0, 1, 100))
    elif change == "bytes":
        data = bytearray(array.tobytes())
        for _ in range(rng.choice((1, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        array = np.frombuffer(bytes(data), dtype=array.dtype).reshape(array.shape)
    elif change == "dtype":
        with np.errstate(all="ignore"):
            array = array.astype(rng.choice(_DTYPES))
    elif change == "shape":
        array = rng.choice(
            (array.reshape(-1), array[None], array.reshape(1, -1), array.reshape(-1, 1), array.reshape(-1)[0])
        )
    elif change == "length":
        flat = array.reshape(-1)
        array = rng.choice((flat[:-1], flat[:0], np.concatenate([flat, flat]), flat[::2], flat[:1]))
        array = array.reshape(-1, 1) if key == "weight" else array
    elif change == "object":
        array = rng.choice((None, 1, "text", [1], b"", object(), array.tolist(), array.astype(object), np.array(["a"])))
    else:
        array = rng.choice((array[::-1], array.astype(array.dtype.newbyteorder(">")), np.asfortranarray(array)))
    tensors[key] = array
    return f"{change} of {key}"


def _change_content(rng: random.Random, tensors: dict[str, Any]) -> str:
    """Change codes, scales, dtype or shape to others that a weight may have."""
    key, codes = _key(tensors), tensors.get("weight")
    names = ("weight.absmax", "weight.nested_absmax")
    arrays = [name for name in names if getattr(tensors.get(name), "dtype", None) in (np.uint8, np.float32)]
    change = rng.choice(("codes", "scales", "dtype", "shape"))
    if change == "codes" and isinstance(codes, np.ndarray) and codes.dtype == np.uint8:
        tensors["weight"] = np.frombuffer(rng.randbytes(codes.size), dtype=np.uint8).reshape(codes.shape)
    elif change == "scales" and arrays:
        name = rng.choice(arrays)
        factor = 3 if tensors[name].dtype == np.uint8 else rng.choice((0.0, 1e-30, 0.37, 1e6))
        with np.errstate(all="ignore"):
            tensors[name] = (tensors[name] * factor).astype(tensors[name].dtype)
    elif key is not None and isinstance(tensors[key], np.ndarray):
        text = tensors[key].tobytes()
        for dtype in (b"float32", b"bfloat16", b"float16"):
            text = text.replace(
                b'"dtype": "' + dtype, b'"dtype": "' + rng.choice((b"float32", b"bfloat16", b"float16"))
            )
        if change == "shape":
            text = text.replace(b'"shape": [', b'"shape": [1, ')
        tensors[key] = np.frombuffer(text, dtype=np.uint8)
    return f"other {change}"


def _change_names(rng: random.Random, tensors: dict[str, Any]) -> str:
    key, change = rng.choice(list(tensors)), rng.choice(("remove", "rename", "add", "exchange"))
    if change == "remove":
        del tensors[key]
    elif change == "rename":
        tensors[rng.choice((key + "x", "weight" + rng.choice(NAMES), key.replace("nf4", "fp4")))] = tensors.pop(key)
    elif change == "add":
        tensors["weight." + rng.choice(NAMES)] = np.ones(1, dtype=np.float32)
    else:
        other = rng.choice(list(tensors))
        tensors[key], tensors[other] = tensors[other], tensors[key]
    return f"{change} {key[:40]!r}"


def _case(tensors: dict[str, Any], made: str, must: Literal["", "read", "refuse"] = "") -> Case:
    size = sum(getattr(array, "nbytes", 0) for array in tensors.values())
    readers: dict[str, Callable[[], Any]] = {
        "from_bitsandbytes": lambda: from_bitsandbytes(tensors),
        "find_bitsandbytes": lambda: find_bitsandbytes(tensors),
    }
    return Case(made, size, ("tensors", "weight"), readers, functools.partial(_judge, tensors), must)


def _judge(tensors: dict[str, Any], results: dict[str, Any]) -> None:
    found = [key.partition(_STATE)[0] for key in tensors if key.endswith((f"{_STATE}nf4", f"{_STATE}fp4"))]
    same("names of weights", results["find_bitsandbytes"], list(dict.fromkeys(filter(None, found))))
    if "from_bitsandbytes" not in results:
        return
    weight = results["from_bitsandbytes"]
    with np.errstate(all="ignore"):
        expected = oracle.decode(tensors)
        dense = lq.dequantize(weight.quantized)
    same("shape", dense.shape, expected.shape)
    # bitsandbytes decodes the second zero of FP4 to either sign.
    same("decoded weights", (dense + np.float32(0)).tobytes(), (expected + np.float32(0)).tobytes())
    assert np.isfinite(dense).all(), "decoded weights are not finite"
    state = oracle.state_of(tensors)
    same("dtype", weight.dtype, state["dtype"])
    written = to_bitsandbytes(weight.quantized, dtype=weight.dtype)
    same("names of what is written", sorted(written), sorted(key for key in tensors if key in written or _is_own(key)))
    key = _key(written) or ""
    same("description", json.loads(written[key].tobytes()), state | _rounded(state))
    for name in written.keys() - {key}:
        given = tensors[name].astype(tensors[name].dtype.newbyteorder("="))  # other byte orders are read, too
        same(name, (written[name].shape, written[name].tobytes()), (given.shape, given.tobytes()))


def _is_own(key: str) -> bool:
    return key == "weight" or key.startswith("weight.")


def _rounded(state: dict[str, Any]) -> dict[str, float]:
    return {"nested_offset": float(np.float32(state["nested_offset"]))} if "nested_offset" in state else {}
