"""Options take every kind of object: the call works, or is refused in one sentence of ours.

The functions are those of every public ``__all__``, so an option that is added without a check is found.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
from fractions import Fraction

import numpy as np
import pytest
import safetensors.numpy

import lqlora as lq
from lqlora._annotations import _fits
from lqlora.errors import InvalidArgumentError, LQLoRAError
from lqlora.integrations.bitsandbytes import (
    described_shape,
    from_bitsandbytes,
    layout_fault,
    list_parts,
    read_bitsandbytes,
    to_bitsandbytes,
)
from lqlora.integrations.comparison import compare_checkpoint
from lqlora.integrations.compressed_tensors import compressed_fault, from_compressed_tensors, to_compressed_tensors
from lqlora.integrations.exporting import can_export, export_checkpoint
from lqlora.integrations.gguf_blocks import block_type, from_gguf_blocks, gguf_fault, to_gguf_blocks
from lqlora.integrations.gptq import decode_gptq, from_gptq, gptq_fault, to_gptq
from lqlora.integrations.merging import merge_checkpoint
from lqlora.integrations.peft import convert_adapter, load_adapter, save_adapter
from lqlora.integrations.statistics import open_statistics, write_document, write_inputs
from lqlora.integrations.transformers import quantize_on_load
from lqlora.solvers import Budget, Problem, SolveOptions
from lqlora.weighting import Elementwise, InputGram, Kronecker, RowColumn
from tests.arguments import FORMAT, GRAM, IMPORTANCE, LORA_A, LORA_B, OUTPUT_GRAM, Q, W, X
from tests.requirements import require_module
from tests.test_arguments import check_sentence

torch = require_module("torch")
from tests.nn.structures import InBlocks  # noqa: E402 - needs torch

nn = importlib.import_module("lqlora.nn")

pytestmark = pytest.mark.filterwarnings("ignore")

#: Public modules. The operations of ``lqlora.ops`` have the table of tests/test_arguments.py.
MODULES = (
    "lqlora", "lqlora.codebooks", "lqlora.weighting", "lqlora.costs", "lqlora.allocation", "lqlora.initializers", "lqlora.checkpoint",
    "lqlora.quantized", "lqlora.decomposition", "lqlora.solvers", "lqlora.backends", "lqlora.reports", "lqlora.nn", "lqlora.recipes",
    "lqlora.testing", "lqlora.integrations.bitsandbytes", "lqlora.integrations.gguf", "lqlora.integrations.sources", "lqlora.integrations.peft",
    "lqlora.integrations.language_models", "lqlora.integrations.streaming", "lqlora.integrations.comparison", "lqlora.integrations.compressed_tensors", "lqlora.integrations.gguf_blocks", "lqlora.integrations.gptq", "lqlora.integrations.merging", "lqlora.integrations.exporting", "lqlora.integrations.calibration", "lqlora.integrations.statistics", "lqlora.integrations.transformers",
)  # fmt: skip

#: What has no row in the table, by the reason.
LEFT_OUT = {
    "holds what lqlora puts into it": {
        "Availability", "BitsandbytesWeight", "Capability", "Checkpoint", "CompressionReport", "Configuration", "Decomposition", "DecompositionStack",
        "DensePart", "DistillationReport", "Factors", "Finding", "Grid", "Kind", "License", "LimitUse", "LowRankStep", "MeasuredNorm", "Operands", "ParetoPoint",
        "Plan", "PlannedMatrix", "QuantizationReport", "QuantizedArray", "QuantizedLayer", "QuantizedTable", "RawResult", "Reduced", "Report",
        "RequantizedLayer", "Scales", "Selection", "Solution", "Split", "Statistics", "StoredMatrix", "StoredRow", "TeacherOutputs",
    },
    "is called by lqlora, with arguments that are checked": {
        "CostStore.append", "Limit.in_bits", "LQLinear.forward", "PEQALinear.forward", "QuantizedEmbedding.forward",
        "QuantizedHead.forward", "Reduced.assignment", "Reduced.chosen", "Reduced.vector",
        "adapter_fault", "compressed_bytes", "gguf_bytes", "gptq_bytes", "norms_for", "read_entries", "write_document", "write_gradients", "write_inputs",
        "StoredRow.joined", "check_work", "reduce_problem", "select", "relative_gap",
        "Elementwise.low_rank", "Elementwise.measured", "Elementwise.squared_norm", "ScaledWeighting.low_rank", "ScaledWeighting.measured",
        "ScaledWeighting.squared_norm",
        *(f"{name}.rotated_element_weights" for name in ("AbstractWeighting", "InputGram", "Kronecker")),
        *(f"{name}.check" for name in ("Elementwise", "InputGram", "Kronecker", "RowColumn", "Uniform")),
    },
    "is a protocol, abstract or an enumeration": {
        "Adapter.solve", "Status", "StopReason",
        *(f"AbstractWeighting.{method}" for method in ("check", "low_rank", "measured", "squared_norm")),
    },
    "registers plug-ins for the process": {"register"},
    "reads documents, which tests/fuzz damages": {"codebook_from_json", "codebook_from_text", "CostTable.from_json", "Plan.from_json"},
    "draws with matplotlib": {"plot", "plot_pareto"},
    "needs a language model": {"divergence", "mark_quantized", "calibrate_checkpoint", "compress", "compress_checkpoint", "load_language_model", "load_causal_model", "load_tokenizer", "fine_tune", "perplexity", "token_sequences", "load_llama", "open_llama", "linear_weights", "quantized_weights", "causal_lm_loss"},
    "tests a plug-in for seconds": {
        "assert_backend_conforms", "assert_quantizer_conforms", "assert_solver_conforms", "check_backend", "check_solver",
    },
}  # fmt: skip

TABLE = lq.cost_table({"a": W, "b": 2 * W}, [FORMAT, lq.BlockFormat.parse("nf2/16:float32")], rank=1)
PLAN = lq.allocate(TABLE, bits_per_weight=5.0)
OWN = {"fmt": FORMAT, "rank": 1}
DECOMPOSED = lq.decompose(W, **OWN, max_iter=1)
PARTS = to_bitsandbytes(lq.quantize(W, lq.BlockFormat(lq.NF4, 32)))
AFFINE = lq.quantize(np.tile(W, 4), lq.BlockFormat.parse("affine4/16:float32"))
SIGNED = lq.quantize(np.tile(W, 4), lq.BlockFormat.parse("int4s/32:float16"))
WORDS = lq.quantize(np.tile(W, (16, 4)), lq.BlockFormat.parse("affine4/16:float16"))
OPERANDS = nn.operands(Q.to(torch))
PROBLEM = Problem(np.ones((2, 2)), np.ones((2, 2), np.int64))
ROWS = [torch.ones(2, 16)]


def dense():
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))


def converted():
    return torch.nn.Sequential(nn.LQLinear(Q, LORA_A, LORA_B))


def collecting():
    return {"model": dense(), "batches": ROWS, "loss": lambda model, batch: model(batch).square().sum(-1)}


def saved(path="file.safetensors"):
    lq.save(path, {"0": DECOMPOSED})
    return path


def saved_model():
    nn.save_model("model.safetensors", converted())
    return {"path": "model.safetensors", "model": torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))}


def saved_factors():
    nn.save_factors("factors.safetensors", converted())
    return {"path": "factors.safetensors", "model": converted()}


def scaled():
    return torch.nn.Sequential(nn.PEQALinear(Q))


def saved_scales():
    nn.save_scales("scales.safetensors", scaled())
    return {"path": "scales.safetensors", "model": scaled()}


def saved_adapter():
    save_adapter("adapter", converted())
    return {"folder": "adapter", "model": converted()}


def distilling():
    model = dense()
    nn.quantize_model(model, FORMAT, rank=1)
    return {"model": model, "teacher": dense(), "batches": ROWS}


def stores():
    for name in ("one.json", "two.json"):
        lq.cost_table({name: W}, [FORMAT], rank=1, store=name)
    return {"paths": ["one.json", "two.json"], "path": "both.json"}


def store():
    stores()
    return {"path": "one.json"}


def text_file():
    with open("text.txt", "w") as file:  # noqa: PTH123 - two names
        file.write("words")
    return {"path": "text.txt"}


def using(model, given):
    with nn.using_factors(model, given):
        pass


def using_task(model, given):
    with nn.using_scales(model, given):
        pass


def statistics():
    folder = tempfile.mkdtemp(dir=".")
    entries = write_inputs(f"{folder}/inputs-00001.safetensors", {"up": ((4, 2), np.eye(2, dtype=np.float32))})
    write_document(folder, entries, examples=1)
    return folder


def saved_layer():
    lq.save("layer.safetensors", {"layers.0": lq.decompose(W, **OWN, max_iter=1)})
    return "layer.safetensors"


def fresh():
    return tempfile.mkdtemp() + "/small"


def opened(**own):
    safetensors.numpy.save_file({"layers.0.weight": W}, "plain.safetensors")
    return own


#: Functions with valid arguments, or with a function that returns them where a call changes them or needs files.
CALLS = {
    "quantize": (lq.quantize, {"w": W, "fmt": FORMAT}),
    "dequantize": (lq.dequantize, {"q": Q}),
    "matmul": (lq.matmul, {"x": X, "q": Q, "lora_A": LORA_A, "lora_B": LORA_B}),
    "gptq": (lq.gptq, {"w": W, "fmt": FORMAT, "gram": GRAM}),
    "relative_error": (lq.relative_error, {"w": W, "approximation": Q}),
    "BlockTuning": (nn.BlockTuning, {}),
    "decompose": (lq.decompose, {"w": W, **OWN, "max_iter": 1}),
    "decompose_stack": (lq.decompose_stack, {"w": np.stack([W, W]), **OWN, "max_iter": 1}),
    "decompose_checkpoint": (lq.decompose_checkpoint, lambda: opened(source="plain.safetensors", folder=fresh(), formats=FORMAT, rank=1)),
    "can_export": (can_export, lambda: {"path": saved_layer(), "base": "dense"}),
    "export_checkpoint": (export_checkpoint, lambda: {"path": saved_layer(), "folder": fresh(), "base": "dense"}),
    "layout_fault": (layout_fault, {"q": Q}),
    "merge_checkpoint": (merge_checkpoint, lambda: {"path": saved_layer(), "folder": fresh()}),
    "compare_checkpoint": (compare_checkpoint, lambda: opened(path=saved_layer(), source="plain.safetensors")),
    "convert_adapter": (convert_adapter, lambda: {"checkpoint": saved_model()["path"], "adapter": saved_adapter()["folder"], "folder": fresh()}),
    "open_statistics": (open_statistics, lambda: {"path": statistics()}),
    "Statistics.weighting": (lambda **own: open_statistics(statistics()).weighting(**own), {}),
    "quantize_on_load": (quantize_on_load, {"format": "nf4/64", "rank": 1}),
    "to_gguf_blocks": (to_gguf_blocks, {"q": SIGNED}),
    "block_type": (block_type, {"q": SIGNED}),
    "gguf_fault": (gguf_fault, {"q": SIGNED}),
    "from_gguf_blocks": (from_gguf_blocks, {"blocks": to_gguf_blocks(SIGNED), "kind": "Q4_0"}),
    "to_gptq": (to_gptq, {"q": WORDS, "checkpoint_format": "gptq_v2"}),
    "gptq_fault": (gptq_fault, {"q": WORDS}),
    "from_gptq": (from_gptq, {"tensors": to_gptq(WORDS, checkpoint_format="gptq_v2"), "checkpoint_format": "gptq_v2"}),
    "decode_gptq": (decode_gptq, {"tensors": to_gptq(WORDS, checkpoint_format="gptq_v2"), "checkpoint_format": "gptq_v2"}),
    "to_compressed_tensors": (to_compressed_tensors, {"q": AFFINE}),
    "compressed_fault": (compressed_fault, {"q": Q}),
    "from_compressed_tensors": (from_compressed_tensors, {"tensors": to_compressed_tensors(AFFINE)}),
    "described_shape": (described_shape, {"description": PARTS["weight.quant_state.bitsandbytes__nf4"]}),
    "cost_table": (lq.cost_table, {"weights": {"a": W}, "formats": [FORMAT], "rank": 1, "max_iter": 1}),
    "CostTable": (lq.CostTable, {
        "names": ("w",), "shapes": ((8, 16),), "configurations": (lq.Configuration(FORMAT, 1),), "costs": np.ones((1, 1)),
        "sizes": np.ones((1, 1), np.int64), "factor_sizes": np.ones((1, 1), np.int64),
    }),
    "CostStore.read": (lq.CostStore.read, store),
    "CostStore.merge": (lq.CostStore.merge, stores),
    "CostStore": (lambda **own: lq.CostStore(**own).close(), lambda: {"path": "new.json", "settings": {}}),
    "allocate": (lq.allocate, {"table": TABLE, "bits_per_weight": 5.0}),
    "pareto": (lq.pareto, {"table": TABLE, "budgets": [4.0, 5.0]}),
    "cache_bytes": (lq.cache_bytes, {"layers": 2, "kv_heads": 2, "head_size": 8, "length": 16}),
    "memory_budget": (lq.memory_budget, {"device_bytes": 1000}),
    "Limit": (lq.Limit, {"include": "a", "bits_per_weight": 3.0}),
    "BlockFormat": (lq.BlockFormat, {"codebook": lq.NF4, "block_size": 16}),
    **{f"BlockFormat.{name}": (getattr(FORMAT, name), {"shape": (8, 16)}) for name in ("blocks", "level_sets", "lines", "storage_bits")},
    "BlockFormat.stored_arrays": (FORMAT.stored_arrays, {"shape": (8, 16), "batch": (2,)}),
    "BlockFormat.parse": (lq.BlockFormat.parse, {"text": "nf4/16:float32"}),
    "Rotation": (lq.Rotation, {"side": "both", "seed": 3}),
    "ScaleFormat": (lq.ScaleFormat, {"bits": 8, "block_size": 16}),
    "Codebook": (lq.Codebook, {"levels": [-1.0, 1.0]}),
    "QuantizedArray.stack": (lq.QuantizedArray.stack, {"parts": [Q, Q], "batch_shape": (2,)}),
    "QuantizedArray.from_arrays": (lq.QuantizedArray.from_arrays, {"arrays": Q.to_arrays(), "fmt": FORMAT, "shape": (8, 16)}),
    "QuantizedArray.rows": (Q.rows, {"start": 1, "stop": 3}),
    "QuantizedArray.to": (Q.to, {"xp": np}),
    "save": (lq.save, {"path": "new.safetensors", "matrices": {"0": DECOMPOSED}}),
    "load": (lq.load, lambda: {"path": saved()}),
    "verify": (lq.verify, lambda: {"path": saved()}),
    "forced": (lambda **own: lq.forced(**own).__enter__() and None, {"implementation": "reference"}),
    "paper_grid": (lq.paper_grid, {}),
    "dynamic8": (lq.dynamic8, {}),
    "normal_float": (lq.normal_float, {"bits": 4}),
    "Trellis": (lq.codebooks.Trellis, {"bits": 2, "state_bits": 8}),
    "trellis_code": (lq.codebooks.trellis_code, {"bits": 2, "state_bits": 8}),
    "student_float": (lq.student_float, {"bits": 4}),
    "affine": (lq.affine, {"bits": 4}),
    "uniform": (lq.uniform, {"bits": 4}),
    "logarithmic": (lq.logarithmic, {"bits": 4}),
    "small_float": (lq.small_float, {"exponent_bits": 2, "mantissa_bits": 1}),
    "abnormal_float": (lq.codebooks.abnormal_float, {"bits": 4, "block_size": 64}),
    "block_optimal": (lq.codebooks.block_optimal, {"bits": 4, "block_size": 64}),
    "by_name": (lq.codebooks.by_name, {"name": "nf4"}),
    "is_standard": (lq.codebooks.is_standard, {"codebook": lq.NF4}),
    "codebook_to_json": (lq.codebooks.codebook_to_json, {"codebook": lq.NF4}),
    "codebook_to_text": (lq.codebooks.codebook_to_text, {"codebook": lq.NF4}),
    "Elementwise": (Elementwise, {"weights": IMPORTANCE}),
    "InputGram": (InputGram, {"gram": GRAM}),
    "Kronecker": (Kronecker, {"output_gram": OUTPUT_GRAM, "input_gram": GRAM}),
    "RowColumn": (RowColumn, {"row": IMPORTANCE[:, 0], "col": IMPORTANCE[0]}),
    "RowColumn.from_fisher": (RowColumn.from_fisher, {"fisher": IMPORTANCE}),
    **{
        name: (getattr(lq.initializers, name), {"w": W, **OWN, **extra})
        for name, extra in {
            "cloq": {"gram": GRAM}, "loftq": {}, "lorc": {}, "lqlora": {"fisher": IMPORTANCE, "max_iter": 1}, "pissa": {},
            "qera": {"gram": GRAM}, "qlora": {},
        }.items()
    },
    "Budget": (Budget, {"upper": 3}),
    "Problem": (Problem, {"cost": np.ones((2, 2)), "size": np.ones((2, 2), np.int64)}),
    "SolveOptions": (SolveOptions, {}),
    "check_license": (lq.solvers.check_license, {"name": "mckp"}),
    "evaluate": (lq.solvers.evaluate, {"problem": PROBLEM, "assignment": np.array([0, 1])}),
    "solve": (lq.solvers.solve, {"problem": PROBLEM}),
    "set_num_threads": (lq.backends.set_num_threads, {"count": None}),
    "explain": (lambda operation: lq.backends.explain(operation, np.zeros(4, np.uint8), 4), {"operation": "pack_codes"}),
    "Takes": (lq.backends.Takes, {"dtypes": ("uint8",)}),
    **{
        name: (getattr(lq.reports, name), {"plan": PLAN})
        for name in ("bits_by_layer", "by_kind", "error_by_layer", "ranks_by_layer", "table")
    },
    "pareto_points": (lq.reports.pareto_points, {"plans": [PLAN]}),
    **{name: (getattr(nn, name), collecting) for name in ("collect_fisher", "collect_gram", "collect_kronecker")},
    "collect_outputs": (nn.collect_outputs, lambda: {"teacher": dense(), "batches": ROWS}),
    "distill": (nn.distill, distilling),
    "dequantize_model": (nn.dequantize_model, lambda: {"model": converted()}),
    "factors": (nn.factors, lambda: {"model": converted()}),
    "from_operands": (nn.from_operands, {"tensors": [*map(torch.from_numpy, Q.to_arrays().values())], "fmt": str(FORMAT), "shape": (8, 16)}),
    "load_factors": (nn.load_factors, saved_factors),
    "load_model": (nn.load_model, saved_model),
    "offload_model": (nn.offload_model, lambda: {"model": converted(), "path": "codes.safetensors"}),
    "make_shardable": (nn.make_shardable, lambda: {"model": converted()}),
    "onload_model": (nn.onload_model, lambda: {"model": converted()}),
    "merged_weight": (nn.merged_weight, lambda: {"layer": converted()[0]}),
    "LQLinear": (nn.LQLinear, {"quantized": Q, "lora_A": LORA_A, "lora_B": LORA_B}),
    "LQLinear.from_decomposition": (nn.LQLinear.from_decomposition, {"decomposition": DECOMPOSED}),
    "PEQALinear": (nn.PEQALinear, {"quantized": Q}),
    "QuantizedTensor": (nn.QuantizedTensor, {
        "weight": OPERANDS, "lora_A": torch.from_numpy(LORA_A), "lora_B": torch.from_numpy(LORA_B),
    }),
    "QuantizedEmbedding": (nn.QuantizedEmbedding, {"quantized": Q, "padding_idx": 0, "scale": 2.0}),
    "QuantizedHead": (nn.QuantizedHead, {"quantized": nn.QuantizedWeight(Q)}),
    "QuantizedWeight": (nn.QuantizedWeight, {"quantized": Q}),
    "QuantizedWeight.dequantize": (nn.QuantizedWeight(Q).dequantize, {}),
    "combine_scales": (nn.combine_scales, lambda: {"start": nn.scales(scaled()), "tasks": {"a": nn.scales(scaled())}, "weights": {"a": 1.0}}),
    "freeze_scales": (nn.freeze_scales, lambda: {"model": scaled(), "scales": "float16"}),
    "load_scales": (nn.load_scales, saved_scales),
    "peqa_model": (nn.peqa_model, lambda: {"model": dense(), "formats": FORMAT}),
    "save_scales": (nn.save_scales, lambda: {"path": "new.safetensors", "model": scaled()}),
    "scales": (nn.scales, lambda: {"model": scaled()}),
    "set_scales": (nn.set_scales, lambda: {"model": scaled(), "given": nn.scales(scaled())}),
    "train_scales": (nn.train_scales, lambda: {"model": converted()}),
    "using_scales": (using_task, lambda: {"model": scaled(), "given": nn.scales(scaled())}),
    "load_adapter": (load_adapter, saved_adapter),
    "save_adapter": (save_adapter, lambda: {"folder": "adapter", "model": converted()}),
    "operands": (nn.operands, {"quantized": Q.to(torch)}),
    "quantize_blocks": (nn.quantize_blocks, lambda: {"model": InBlocks(), "formats": FORMAT, "batches": ROWS, "rank": 1, "max_iter": 1}),
    "quantize_model": (
        nn.quantize_model,
        lambda: {"model": torch.nn.Sequential(torch.nn.Embedding(4, 16), *dense()), "formats": FORMAT, "rank": 1, "max_iter": 1, "embeddings": FORMAT},
    ),
    "requantize_model": (nn.requantize_model, lambda: {"model": converted(), "originals": {"0": W}}),
    "save_factors": (nn.save_factors, lambda: {"path": "new.safetensors", "model": converted()}),
    "save_model": (nn.save_model, lambda: {"path": "new.safetensors", "model": converted()}),
    "select_linears": (nn.select_linears, lambda: {"model": dense()}),
    "set_factors": (nn.set_factors, lambda: {"model": converted(), "given": nn.factors(converted())}),
    "using_factors": (using, lambda: {"model": converted(), "given": nn.factors(converted())}),
    "weight_arrays": (nn.weight_arrays, lambda: {"layers": {"0": dense()[0]}}),
    "read_text": (lq.recipes.read_text, text_file),
    "split_sequences": (lq.recipes.split_sequences, {
        "sequences": np.zeros((6, 4), np.int64), "calibration": 1, "training": 2, "evaluation": 1,
    }),
    "check_quantizer": (lq.testing.check_quantizer, {
        "quantize": lambda w: w, "dequantize": lambda w: w, "only": ["zeros"], "max_examples": 1, "derandomize": True,
    }),
    "from_bitsandbytes": (from_bitsandbytes, {"tensors": PARTS}),
    "find_bitsandbytes": (lq.integrations.bitsandbytes.find_bitsandbytes, {"tensors": PARTS}),
    "list_parts": (list_parts, {"tensors": PARTS, "name": ""}),
    "read_bitsandbytes": (lambda **own: list(read_bitsandbytes(**own)), {"tensors": PARTS}),
    "to_bitsandbytes": (to_bitsandbytes, {"q": lq.quantize(W, lq.BlockFormat(lq.NF4, 32))}),
    "open_model": (importlib.import_module("lqlora.integrations.sources").open_model, lambda: opened(path="plain.safetensors")),
    "open_weights": (importlib.import_module("lqlora.integrations.sources").open_weights, lambda: opened(path="plain.safetensors")),
}  # fmt: skip

#: Arrays have a table of their own, in tests/test_arguments.py. Batches are passed to functions of the caller.
ARRAYS = {
    "batches", "held_out", "sequences", "w", "x", "gram", "out", "weights", "levels", "lora_A", "lora_B", "bias", "row", "col", "fisher", "output_gram", "input_gram",
}  # fmt: skip

#: Options that say how long to go on.
LENGTHS = {"iterations", "max_examples", "max_iter", "rounds", "sweeps"}


class Object:
    """Nothing that any function knows."""


WRONG = {
    "text": "a",
    "bytes": b"a",
    "list": [1],
    "dict": {},
    "array": np.ones(2),
    "array of one": np.ones(1),
    "complex": 1j,
    "object": Object(),
    "none": None,
    "nan": float("nan"),
    "infinite": float("inf"),
    "half": 0.5,
    "fraction": Fraction(1, 3),
    "negative": -1,
    "true": True,
    "number of NumPy": np.int64(2),
    "long": 10**5000,
}

#: Kinds that every suite tries; the others are tried where slow tests run.
FEW = ("text", "array", "object", "none", "nan", "long")


def options(thing):
    """The parameters of a function or constructor."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        own.name for own in parameters if own.kind not in (own.VAR_KEYWORD, own.VAR_POSITIONAL) and own.name != "self"
    ]


def public():
    """The public functions, constructors and methods that take options, by name."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) and not issubclass(thing, Exception):
                methods = {f"{name}.{key}": getattr(thing, key) for key in vars(thing) if not key.startswith("_")}
                found |= {key: own for key, own in methods.items() if inspect.isroutine(own)}
            if (
                (inspect.isclass(thing) or inspect.isroutine(thing))
                and thing.__module__.startswith("lqlora")
                and options(thing)
            ):
                found[name] = thing
    return {name: thing for name, thing in found.items() if options(thing)}


def test_every_public_function_is_in_the_table_or_left_out_for_a_reason():
    left = set().union(*LEFT_OUT.values())
    found = public().keys()
    assert sorted(found - CALLS.keys() - left) == []
    assert sorted(CALLS.keys() & left) == []
    assert sorted(CALLS.keys() - found) == []
    assert sorted(left - found) == []


def faults(name, function, valid, kinds):
    names = options(public()[name]) if name in public() else []
    for option in names:
        if option in ARRAYS or (option == "name" and "w" in names):
            continue
        for kind in kinds:
            if option in LENGTHS and kind in ("infinite", "long"):
                continue
            try:
                function(**{**(valid() if callable(valid) else valid), option: WRONG[kind]})
            except LQLoRAError as error:
                try:
                    check_sentence(str(error), "")
                except AssertionError:
                    yield f"{option} {kind}: says {error}"
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the fault that is looked for
                yield f"{option} {kind}: {type(error).__name__}: {str(error)[:200]}"


@pytest.mark.parametrize(
    ("value", "text", "fits"),
    [
        (1, "int", True), (True, "int", False), (1, "float | None", True), (None, "float | None", True), (None, "float", False),
        ([FORMAT], "Sequence[BlockFormat]", True), ([1], "Sequence[BlockFormat]", False), ("ab", "Sequence[BlockFormat]", False),
        ("ab", "Sequence[str]", True), ({"a": 1}, "Mapping[str, int] | str", True), ({"a": "b"}, "Mapping[str, int]", False),
        ((1, 2), "tuple[int, int]", True), ((1,), "tuple[int, int]", False), ((1, 2, 3), "tuple[int, ...]", True),
        ("a", "Literal['a', 'b']", True), ("c", "Literal['a', 'b']", False), ("c", "FloatName", True), (W, "Array", True),
        (len, "Callable[[int, int], None] | None", True), (3, "Callable[[int, int], None]", False), ("a", "str | os.PathLike[str]", True),
        (torch.nn.Linear(2, 2), "nn.Module", True), (1, "nn.Module", False), (np.array(1.0), "Sequence[float]", False),
    ],
)  # fmt: skip
def test_values_are_compared_with_annotations(value, text, fits):
    assert _fits(value, text) == fits


def test_an_error_of_a_function_of_the_caller_stays_as_it_is():
    def loss(model, batch):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        nn.collect_fisher(**{**collecting(), "loss": loss})


def test_a_body_of_a_context_manager_may_raise():
    with pytest.raises(ValueError, match="inside"), lq.forced("reference"):
        raise ValueError("inside")


@pytest.fixture(autouse=True)
def _threads():
    yield
    lq.backends.set_num_threads(None)


@pytest.mark.parametrize(
    "kinds",
    [pytest.param(FEW, id="few"), pytest.param(sorted(WRONG.keys() - FEW), id="others", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", CALLS)
def test_every_option_works_or_is_refused_in_our_words(name, kinds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text is a path, too
    function, valid = CALLS[name]
    function(**(valid() if callable(valid) else valid))
    assert list(faults(name, function, valid, kinds)) == []


@pytest.mark.parametrize("shape", [(1.5, 2), (-1, 2), ("a", 2)])
def test_lengths_of_a_shape_are_integers(shape):
    with pytest.raises(InvalidArgumentError, match=r"^shape must have integer"):
        FORMAT.storage_bits(shape)


@pytest.mark.parametrize("scaling", ["a", None, float("nan")])
def test_the_scaling_of_a_layer_is_a_finite_number(scaling):
    with pytest.raises(InvalidArgumentError, match=r"^scaling must be "):
        nn.LQLinear(Q, LORA_A, LORA_B, scaling)


def test_a_refused_name_leaves_an_older_adapter(tmp_path):
    save_adapter(tmp_path, converted())
    with pytest.raises(InvalidArgumentError, match=r"^base_model must be a text"):
        save_adapter(tmp_path, converted(), base_model=1)
    load_adapter(tmp_path, converted())
