"""Valid calls of the public functions that take arrays, and kinds of arrays to replace the arguments of a call with."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

import lqlora as lq
from lqlora import ops
from lqlora._dispatch import Operation, array_library
from lqlora.decomposition import decompose_stack
from lqlora.integrations.bitsandbytes import described_shape, from_bitsandbytes, read_bitsandbytes, to_bitsandbytes
from lqlora.testing.backends._cases import Blocks, Product
from lqlora.weighting import Elementwise, InputGram, Kronecker, RowColumn, Uniform

MODULES = (
    "lqlora", "lqlora.ops", "lqlora.codebooks", "lqlora.quantized", "lqlora.decomposition", "lqlora.weighting", "lqlora.costs",
    "lqlora.initializers", "lqlora.integrations.bitsandbytes", "lqlora.checkpoint", "lqlora.nn",
)  # fmt: skip

#: Classes that hold what they are given, and compute nothing.
RECORDS = {
    "BitsandbytesWeight", "Checkpoint", "Factors", "Decomposition", "DecompositionStack", "LowRank", "LowRankStep", "Operands",
    "PackedBlocks", "PackedTrellis", "QuantizedArray", "Scales", "StoredMatrix", "AbstractWeighting", "ScaledWeighting", "Quantizer",
    "TeacherOutputs",
}  # fmt: skip

#: Called by torch, which checks their arguments itself.
OF_TORCH = {"LQLinear.forward", "PEQALinear.forward", "QuantizedEmbedding.forward", "QuantizedHead.forward"}

_ARRAYS = re.compile(r"\bArray\b|NDArray|torch\.Tensor|npt\.ArrayLike")


def takes_arrays(function):
    """Whether a parameter of a function is annotated as an array."""
    annotations = getattr(getattr(function, "reference", function), "__annotations__", {})
    return any(
        _ARRAYS.search(re.sub(r"Callable\[.*\]", "", str(text)))
        for name, text in annotations.items()
        if name != "return"
    )


def public_functions():
    """Names of the public functions, constructors and methods that take arrays, without the module."""
    names = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing):
                if callable(thing) and takes_arrays(thing):
                    names[name] = thing
                continue
            methods = {f"{name}.{key}": getattr(thing, key) for key in dir(thing) if not key.startswith("_")}
            if name not in RECORDS:
                methods[name] = thing.__init__
            methods = {key: own for key, own in methods.items() if getattr(own, "__module__", "").startswith("lqlora")}
            if not inspect.isabstract(thing):
                names |= {key: own for key, own in methods.items() if callable(own) and takes_arrays(own)}
    return {name: own for name, own in names.items() if name not in OF_TORCH}


# Calls: a name, the arrays by argument, and a function of them


FORMAT = lq.BlockFormat.parse("nf4/16:float32")
_RNG = np.random.default_rng(16)
W = _RNG.standard_normal((8, 16)).astype(np.float32)
IMPORTANCE = _RNG.random((8, 16)).astype(np.float32) + np.float32(0.5)
GRAM = (W.T @ W + np.eye(16)).astype(np.float32)
OUTPUT_GRAM = (W @ W.T + np.eye(8)).astype(np.float32)
X = _RNG.standard_normal((3, 16)).astype(np.float32)
LORA_A, LORA_B = W[:2, :].copy(), W[:, :2].copy()
ROWS, SETS = W.copy(), np.array([0, 1] * 4)
LEVELS = np.sort(_RNG.standard_normal((2, 8)).astype(np.float32), axis=1)
CODES = (np.arange(128).reshape(8, 16) % 8).astype(np.uint8)
RATIOS = np.linspace(0.5, 1.5, 8, dtype=np.float32)
Q = lq.quantize(W, FORMAT)
FLAT = W.reshape(-1).copy()


def beside(array):
    """The quantized weight in the library of an array, whatever kind it is."""
    return Q.to(importlib.import_module("torch")) if array_library(array) == "torch" else Q


def _saved(**arrays):
    with tempfile.TemporaryDirectory() as folder:
        lq.save(Path(folder, "w.safetensors"), {}, arrays)
        return lq.load(Path(folder, "w.safetensors")).tensors["x"]


def _put(array, values):
    torch = sys.modules.get("torch")
    with torch.no_grad() if torch else contextlib.nullcontext():
        ops.put_flat(array, 3, values)
    return array


def _from_bitsandbytes(**parts):
    return from_bitsandbytes({key.replace("_DOT_", "."): part for key, part in parts.items()}).quantized


def _read_bitsandbytes(**parts):
    return next(read_bitsandbytes({key.replace("_DOT_", "."): part for key, part in parts.items()}))[1].quantized


def _layer(**arrays):
    layer = lq.nn.LQLinear(Q, **arrays)
    return [part.detach() for part in (layer.lora_A, layer.lora_B, layer.bias) if part is not None]


def _exchanged(**arrays):
    torch = importlib.import_module("torch")
    model = torch.nn.Sequential(lq.nn.LQLinear(Q, LORA_A, LORA_B))
    given = {"0": lq.nn.Factors(**arrays, scaling=1.0)}
    with lq.nn.using_factors(model, given):
        inside = model[0].lora_A + 0
    lq.nn.set_factors(model, given)
    return [inside, model[0].lora_A.detach(), model[0].lora_B.detach()]


def _switched(values):
    torch = importlib.import_module("torch")
    model = torch.nn.Sequential(lq.nn.PEQALinear(Q))
    given = {"0": lq.nn.Scales(values)}
    with lq.nn.using_scales(model, given):
        inside = model[0].quantized.scales.detach() + 0
    lq.nn.set_scales(model, given)
    summed = lq.nn.combine_scales(given, {"task": given}, {"task": 1})["0"].values
    return [inside, model[0].quantized.scales.detach(), summed]


def _requantized(original):
    torch = importlib.import_module("torch")
    model = torch.nn.Sequential(lq.nn.LQLinear(Q, LORA_A, LORA_B))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(lq.nn.requantize_model(model, {"0": original})["0"].error_before)


def _with_q(function, **arrays):
    return function(q=beside(next(iter(arrays.values()))), **arrays)


_BNB = {
    key.replace(".", "_DOT_"): part for key, part in to_bitsandbytes(lq.quantize(W, lq.BlockFormat(lq.NF4, 32))).items()
}
_DECOMPOSE = partial(lq.decompose, fmt=FORMAT, rank=2, max_iter=2)
_DECOMPOSED = _DECOMPOSE(W)
_INITIALIZE = {"fmt": FORMAT, "rank": 2}
_WEIGHTINGS = {
    "Uniform": lambda _: Uniform(),
    "RowColumn": lambda put: RowColumn(put(IMPORTANCE[:, 0]), put(IMPORTANCE[0])),
    "Elementwise": lambda put: Elementwise(put(IMPORTANCE)),
    "InputGram": lambda put: InputGram(put(GRAM)),
    "Kronecker": lambda put: Kronecker(put(OUTPUT_GRAM), put(GRAM)),
}


def _norm(make, method, residual):
    is_tensor = array_library(residual) == "torch"
    put = importlib.import_module("torch").from_numpy if is_tensor else np.asarray
    weighting = make(lambda array: put(array.copy()))
    if method == "low_rank":
        return weighting.low_rank(residual, 2)[:2]
    return weighting.squared_norm(residual) if method == "squared_norm" else weighting.measured(residual)[1:]


CALLS = {
    "quantize": ({"w": W, "weights": IMPORTANCE}, partial(lq.quantize, fmt=FORMAT, fit="scale")),
    "dequantize": ({"out": np.zeros_like(W)}, partial(_with_q, lq.dequantize)),
    "matmul": ({"x": X, "lora_A": LORA_A, "lora_B": LORA_B}, partial(_with_q, lq.matmul)),
    "gptq": ({"w": W, "gram": GRAM}, partial(lq.gptq, fmt=FORMAT)),
    "decompose": (
        {"w": W, "lora_B": LORA_B, "lora_A": LORA_A},
        lambda w, lora_B, lora_A: _DECOMPOSE(w, start=(lora_B, lora_A)),
    ),
    "relative_error": (
        {"w": W, "approximation": IMPORTANCE, "gram": GRAM},
        lambda w, approximation, gram: lq.relative_error(w, approximation, InputGram(gram)),
    ),
    "decompose_stack": ({"w": np.stack([W, 2 * W])}, partial(decompose_stack, fmt=FORMAT, rank=2, max_iter=1)),
    "cost_table": ({"w": W}, lambda w: lq.cost_table({"w": w}, [FORMAT], rank=2).costs),
    "CostTable": (
        {"costs": np.ones((1, 2)), "sizes": np.ones((1, 2), np.int64), "factor_sizes": np.ones((1, 2), np.int64)},
        lambda **own: lq.CostTable(("w",), ((8, 16),), tuple(lq.costs.Configuration(FORMAT, k) for k in (1, 2)), **own).costs,
    ),
    "save": ({"x": W}, _saved),
    "QuantizedArray.from_arrays": (
        dict(Q.to_arrays()),
        lambda **arrays: lq.QuantizedArray.from_arrays(arrays, FORMAT, (8, 16)),
    ),
    "Codebook": ({"levels": LEVELS[0]}, lambda levels: lq.Codebook(levels).levels),
    "from_bitsandbytes": (_BNB, _from_bitsandbytes),
    "described_shape": (
        {"description": _BNB["weight_DOT_quant_state_DOT_bitsandbytes__nf4"]}, lambda description: np.array(described_shape(description)),
    ),
    "read_bitsandbytes": (_BNB, _read_bitsandbytes),
    "find_bitsandbytes": ({"w": W}, lambda w: lq.integrations.bitsandbytes.find_bitsandbytes({"w": w})),
    "RowColumn": ({"row": IMPORTANCE[:, 0].copy(), "col": IMPORTANCE[0].copy()}, lambda **own: RowColumn(**own).row),
    "RowColumn.from_fisher": ({"fisher": IMPORTANCE}, lambda fisher: RowColumn.from_fisher(fisher).row),
    "Elementwise": ({"weights": IMPORTANCE}, lambda weights: Elementwise(weights).weights),
    "InputGram": ({"gram": GRAM}, lambda gram: InputGram(gram).gram),
    "Kronecker": ({"output_gram": OUTPUT_GRAM, "input_gram": GRAM}, lambda **own: Kronecker(**own).input_gram),
    **{
        f"{name}.{method}": ({"residual": W}, partial(_norm, make, method))
        for name, make in _WEIGHTINGS.items()
        for method in ("squared_norm", "measured", "low_rank")
    },
    "lqlora": ({"w": W, "fisher": IMPORTANCE}, partial(lq.initializers.lqlora, **_INITIALIZE, max_iter=2)),
    **{
        name: ({"w": W}, partial(getattr(lq.initializers, name), **_INITIALIZE))
        for name in ("loftq", "lorc", "pissa", "qlora")
    },
    **{
        name: ({"w": W, "gram": GRAM}, partial(getattr(lq.initializers, name), **_INITIALIZE)) for name in ("cloq", "qera")
    },
    "QuantizedHead": ({"bias": W[:, 0].copy()}, lambda bias: lq.nn.QuantizedHead(lq.nn.QuantizedWeight(Q), bias).bias),
    "LQLinear": ({"lora_A": LORA_A, "lora_B": LORA_B, "bias": W[:, 0].copy()}, _layer),
    "PEQALinear": (
        {"bias": W[:, 0].copy()},
        lambda bias: [(layer := lq.nn.PEQALinear(Q, bias=bias)).bias, layer.quantized.dequantize()],
    ),
    "PEQALinear.from_decomposition": (
        {"bias": W[:, 0].copy()},
        lambda bias: lq.nn.PEQALinear.from_decomposition(_DECOMPOSED, bias).bias,
    ),
    "LQLinear.from_decomposition": (
        {"bias": W[:, 0].copy()},
        lambda bias: lq.nn.LQLinear.from_decomposition(_DECOMPOSED, bias).bias,
    ),
    "using_factors": ({"lora_A": LORA_A, "lora_B": LORA_B}, _exchanged),
    "using_scales": ({"values": Q.scales}, _switched),
    "requantize_model": ({"original": W}, _requantized),
    "from_operands": (
        dict(zip(("codes", "scales"), Q.to_arrays().values(), strict=True)),
        lambda codes, scales: lq.dequantize(lq.nn.from_operands([codes, scales], str(FORMAT), (8, 16))),
    ),
    # Operations without overrides
    "boundaries_by_set": ({"levels": LEVELS}, ops.boundaries_by_set),
    "convert": ({"array": W}, partial(ops.convert, xp=np)),
    "dtype_name": ({"array": W}, ops.dtype_name),
    "exact_svd": ({"matrix": W}, partial(ops.exact_svd, rank=2)),
    "factor_dtype": ({"x": W}, ops.factor_dtype),
    "from_blocks": ({"blocks": W}, partial(ops.from_blocks, count=120)),
    "is_contiguous": ({"array": W}, ops.is_contiguous),
    "is_finite": ({"array": W}, ops.is_finite),
    "is_on_host": ({"array": W}, ops.is_on_host),
    "least_squares": ({"rows": ROWS, "weights": IMPORTANCE, "values": W, "ratios": RATIOS}, ops.least_squares),
    "low_rank_product": ({"lora_B": LORA_B, "lora_A": LORA_A}, ops.low_rank_product),
    "matmul_dense": ({"x": X, "weight": W}, ops.matmul_dense),
    "native_dtype": ({"array": W}, lambda array: str(ops.native_dtype(array, "float16")).rpartition(".")[2]),
    "nearest_codes_by_row": ({"values": W, "boundaries": LEVELS, "sets": SETS}, ops.nearest_codes_by_row),
    "normalize": ({"blocks": W, "scales": RATIOS, "zero_points": CODES[:, 1].copy()}, ops.normalize),
    "pick": ({"array": W, "index": SETS}, ops.pick),
    "put_flat": ({"array": W.copy(), "values": FLAT[:9].copy()}, _put),
    "require_finite": ({"array": W}, partial(ops.require_finite, what="array")),
    "require_float": ({"array": W}, partial(ops.require_float, what="array")),
    "rotate": ({"array": W}, partial(ops.rotate, seed=1)),
    "rotate_rows": ({"x": W}, partial(ops.rotate_rows, seed=1)),
    "rotated_importance": ({"importance": IMPORTANCE}, ops.rotated_importance),
    "rotated_moment": ({"gram": GRAM}, partial(ops.rotated_moment, seed=1)),
    "search_ratios": (
        {"rows": ROWS, "weights": IMPORTANCE},
        partial(ops.search_ratios, nearest=lambda rows: 2 * rows, grid=(1.0, 0.5), refinements=1),
    ),
    "squared_errors": ({"rows": ROWS, "weights": IMPORTANCE, "ratios": RATIOS, "values": W}, ops.squared_errors),
    "storage_cast": ({"array": W}, partial(ops.storage_cast, dtype="float64")),
    "stored_bytes": ({"array": W}, ops.stored_bytes),
    "subspace_svd": (
        {"matrix": np.pad(W, ((0, 16), (0, 16))), "start": np.eye(32, 12, dtype=np.float32)},
        partial(ops.subspace_svd, rank=2),
    ),
    "sum_of_squares": ({"array": W, "weights": IMPORTANCE}, ops.sum_of_squares),
    "symmetric_moment": ({"gram": GRAM}, partial(ops.symmetric_moment, what="gram")),
    "table_beside": ({"array": W}, lambda array: np.asarray(ops.table_beside(LEVELS, array))),
    "take_flat": ({"array": W}, partial(ops.take_flat, start=3, stop=120)),
    "to_blocks": ({"flat": FLAT}, partial(ops.to_blocks, block_size=16)),
    "values_by_row": ({"codes": CODES, "levels": LEVELS, "sets": SETS}, ops.values_by_row),
    "wide_errors": ({"rows": ROWS, "weights": IMPORTANCE, "values": W}, ops.wide_errors),
    "widen": ({"array": W}, partial(ops.widen, what="array")),
}  # fmt: skip

#: Functions that move entries, and take dtypes that lqlora does not compute with.
MOVES = {
    "Codebook", "convert", "copy_across", "from_blocks", "pick", "put_flat", "save", "stored_bytes", "take_flat", "to_blocks", "LQLinear",
    "LQLinear.from_decomposition", "PEQALinear", "PEQALinear.from_decomposition", "QuantizedHead",
}  # fmt: skip

#: Functions that describe an array without its entries.
DESCRIBES = {"dtype_name", "factor_dtype", "find_bitsandbytes", "is_contiguous", "is_on_host", "table_beside"}

#: Arguments of operations that are NumPy arrays for every library.
TABLES = ("levels", "boundaries")


def calls():
    """All calls by name: those above, and one of each operation, made from its examples."""
    found = dict(CALLS)
    for name in ops.__all__:
        operation = getattr(ops, name)
        if isinstance(operation, Operation):
            make, problem = (
                (operation.products, Product(seed=1))
                if operation.examples is None
                else (operation.examples, Blocks(seed=1))
            )
            flat = dict(zip(operation.arguments.flat, operation.arguments.flatten(make(problem)), strict=True))
            arrays = {key: value for key, value in flat.items() if isinstance(value, np.ndarray)}
            found[name] = arrays, _call_of(operation, flat)
    return found


def _call_of(operation, flat):
    return lambda **arrays: operation(*operation.arguments.unflatten(tuple({**flat, **arrays}.values())))


# Kinds: a name, and a function of an array that returns one of that kind, or None where there is none


class Plain(np.ndarray):
    """A subclass without any behavior of its own."""


class Doubling(np.ndarray):
    """A subclass whose arithmetic is of its own, as that of numbers with units."""

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        raise RuntimeError("arithmetic of a subclass")

    def __getitem__(self, index):
        return 2 * np.asarray(self)[index]


class Frame:
    """A table of another library: it converts itself, and is no array."""

    def __init__(self, array):
        self._array = array
        self.shape = array.shape

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype=dtype)


def _memmap(array):
    with tempfile.NamedTemporaryFile() as file:
        mapped = np.memmap(file, dtype=array.dtype, mode="w+", shape=array.shape or (1,))
    mapped[...] = array
    return mapped


def _every_second(array):
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), dtype=array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def _read_only(array):
    kept = array.copy()
    kept.flags.writeable = False
    return kept


def _structured(array):
    return np.zeros(array.shape, dtype=[("a", np.float32)])


#: Kinds of the same entries: the result is that of the plain array, or the kind is refused.
SAME = {
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else None,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")) if a.itemsize > 1 and a.dtype.kind in "iuf" else None,
    "subclass": lambda a: a.view(Plain),
    "memmap": _memmap,
    "read-only": _read_only,
    "every second": _every_second,
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "columns first": lambda a: np.asfortranarray(a) if a.ndim > 1 else None,
}

#: Kinds of numbers that are moved, but not computed with.
NUMBERS = {
    "longdouble": lambda a: a.astype(np.longdouble),
    "complex": lambda a: a.astype(np.complex64),
    "float8": lambda a: a.astype(ml_dtypes.float8_e4m3fn),
    "bool": lambda a: a > 0,
}

#: Kinds that no function computes with.
REFUSED = {
    "masked": lambda a: np.ma.masked_array(a, mask=np.arange(a.size).reshape(a.shape) == 1),
    "without a mask": np.ma.masked_array,
    "object": lambda a: a.astype(object),
    "structured": _structured,
    "strings": lambda a: np.full(a.shape, "1.0"),
    "datetime": lambda a: np.zeros(a.shape, dtype="M8[s]"),
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(a.tolist()),
    "frame": Frame,
    "number": lambda _: 1.5,
    "text": lambda _: "w",
    "bytes": lambda _: b"w",
    "module": lambda _: np,
}

#: Kinds that say something else than the plain array. They may be valid, and must not end in an error of a library.
OTHER = {
    "zero-dimensional": lambda a: a.reshape(-1)[1].reshape(()),
    "scalar": lambda a: a.reshape(-1)[1],
    "empty": lambda a: a[:0],
    "None": lambda _: None,
    "another shape": lambda a: np.concatenate([a, a]),
    "one entry": lambda a: a.reshape(-1)[:1],
    "broadcast": lambda a: np.broadcast_to(a.reshape(-1)[:1], a.shape),
}


def torch_kinds(torch):
    """Kinds of tensors: those with the same entries, those that are moved only, those that are refused, and others."""

    class Named(torch.Tensor):
        """A subclass without any behavior of its own."""

    class Hiding(torch.Tensor):
        """A subclass that answers every operation itself."""

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise RuntimeError("hidden")

    def negated(t):
        return torch._neg_view(-t) if t.is_floating_point() else None

    def imaginary(t):
        return torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype == torch.float32 else None

    def fake(t):
        return importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode().from_tensor(t)

    def quantized(t):
        return torch.quantize_per_tensor(t, 0.1, 3, torch.qint8) if t.dtype == torch.float32 else None

    def floating(convert):
        return lambda t: convert(t) if t.dtype == torch.float32 else None

    same = {
        "negated": negated,
        "imaginary": imaginary,
        "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=t.is_floating_point()),
        "frozen parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
        "buffer": lambda t: torch.nn.Buffer(t.clone()),
        "tracked": lambda t: t.clone().requires_grad_() if t.is_floating_point() else None,
        "subclass": lambda t: t.as_subclass(Named),
        "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0],
        "columns first": lambda t: t.T.contiguous().T if t.ndim == 2 else None,
    }
    numbers = {
        "complex": lambda t: t.to(torch.complex64),
        "float8": floating(lambda t: t.to(torch.float8_e4m3fn)),
        "bool": lambda t: t > 0,
        "meta": lambda t: t.to("meta"),
    }
    refused = {
        "sparse": lambda t: t.to_sparse(),
        "sparse rows": lambda t: t.to_sparse_csr() if t.ndim == 2 else None,
        "nested": lambda t: torch.nested.nested_tensor(list(t)) if t.ndim > 1 else None,
        "jagged": floating(lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged) if t.ndim > 1 else None),
        "fake": fake,
        "mkldnn": floating(lambda t: t.to_mkldnn()),
        "quantized": quantized,
        "hiding": lambda t: t.as_subclass(Hiding),
        "list": lambda t: t.tolist(),
        "number": lambda _: 1.5,
    }
    other = {
        "zero-dimensional": lambda t: t.reshape(-1)[1],
        "empty": lambda t: t[:0],
        "None": lambda _: None,
        "expanded": lambda t: t.reshape(-1)[:1].expand(t.shape),
        "NumPy": lambda t: t.numpy(),
    }
    return same, numbers, refused, other
