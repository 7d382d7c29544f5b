"""Checkpoints for PEFT: the quantized part as a model of other libraries, and the low-rank factors as an adapter over it."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._messages import shortened, shown
from lqlora._optional import require
from lqlora._options import require_choice, require_integer
from lqlora._patterns import EMBEDDINGS, predicate_of_any
from lqlora.checkpoint.factors import base_fingerprint
from lqlora.errors import FormatError, InvalidArgumentError
from lqlora.integrations._gguf_files import Encoded, write_gguf
from lqlora.integrations._model_folders import join, open_parts, rounded, write_model
from lqlora.integrations.bitsandbytes import layout_fault, to_bitsandbytes
from lqlora.integrations.compressed_tensors import compressed_bytes, compressed_fault, to_compressed_tensors
from lqlora.integrations.gguf_blocks import block_type, gguf_fault, to_gguf_blocks
from lqlora.integrations.gptq import gptq_bytes, gptq_fault, to_gptq
from lqlora.quantized import dequantize

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from lqlora._typing import FloatName
    from lqlora.checkpoint import StoredMatrix
    from lqlora.formats import BlockFormat
    from lqlora.integrations._model_folders import ModelParts, Origin
    from lqlora.integrations.gptq import CheckpointFormat
    from lqlora.quantized import QuantizedArray

__all__ = ["Base", "adapter_fault", "can_export", "export_checkpoint"]

Base: TypeAlias = Literal["bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq"]

_BASES = ("bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq")

#: Names of experts' matrices in files that have them one by one.
_EXPERT = re.compile(r"\.experts\.[0-9]+\.([^.]+)(?:\.weight)?$")

#: Functions of format and shape that return the bytes of a matrix.
_SIZES: dict[Base, Callable[[BlockFormat, tuple[int, ...]], int]] = {
    "compressed-tensors": compressed_bytes,
    "gptq": gptq_bytes,
}


@annotated
def can_export(path: str | os.PathLike[str], base: Base) -> dict[str, str]:
    """Say which matrices of a checkpoint :func:`export_checkpoint` would refuse, before any work.

    Parameters
    ----------
    path : path-like
        Checkpoint, a file or a folder.
    base : {"bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq"}
        See :func:`export_checkpoint`.

    Returns
    -------
    dict of str to str
        A sentence for each matrix that cannot be exported; empty if all can.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read.
    """
    require_choice(base, "base", _BASES)
    parts, origins = open_parts(Path(path).absolute())
    return _faults(parts, origins, base)


#: Functions that say why a layout cannot hold an array.
_LAYOUTS: dict[Base, Callable[[QuantizedArray], str]] = {
    "bitsandbytes": layout_fault,
    "compressed-tensors": compressed_fault,
    "gguf": gguf_fault,
    "gptq": functools.partial(gptq_fault, checkpoint_format="gptq_v2"),
}


def adapter_fault(name: str, origin: Origin, rank: int) -> str:
    """Return why PEFT cannot have the low-rank factors of a matrix in an adapter; nothing if it can.

    Parameters
    ----------
    name : str
        Name of the matrix.
    origin : Origin
        How the dense model holds it.
    rank : int
        Rank of its factors.

    Returns
    -------
    str
        A sentence.
    """
    if origin.is_stack:
        return "It is one of an array of experts, for which PEFT has no adapters of linear layers."
    if rank and predicate_of_any(EMBEDDINGS, ())(name):
        return "It is an embedding, for which adapters have factors of another kind. Decompose it with rank 0."
    return ""


def _keys_of_experts(parts: ModelParts) -> set[str]:
    """Return the last parts of the names of experts' matrices, such as ``up_proj``, if the files have them one by one."""
    found = (_EXPERT.search(name) for name in (*parts.matrices, *parts.tensors))
    return {match[1] for match in found if match}


def _faults(parts: ModelParts, origins: Mapping[str, Origin], base: Base) -> dict[str, str]:
    found: dict[str, str] = {}
    kinds: dict[BlockFormat, str] = {}
    keys = _keys_of_experts(parts)
    for tensor, own in origins.items():
        for name in own.matrices:
            matrix = parts.matrix(name)
            fmt = matrix.quantized.format
            if fault := adapter_fault(name, own, len(matrix.lora_A)):
                found[name] = fault
            elif len(matrix.lora_A) and name.rpartition(".")[2] in keys:
                found[name] = (
                    "PEFT joins adapters of experts, and of other layers of the same names, and loses some. Decompose it with rank 0, or merge."
                )
            elif base != "dense" and not tensor.endswith(".weight"):
                found[name] = f"Its tensor {shown(tensor)} is not the weight of a layer."
            elif base != "dense" and own.is_transposed:
                found[name] = f"The model stores it transposed, and {base} has no such layer."
            elif base != "dense" and (fault := _LAYOUTS[base](parts.matrix(name).quantized)):
                found[name] = fault
            elif base == "bitsandbytes":
                kinds.setdefault(fmt, name)
    settings = {(fmt.codebook.name, str(fmt.scales)): name for fmt, name in kinds.items()}
    if len(settings) > 1:
        first, second = [*settings.values()][:2]
        found[second] = (
            f"Its codebook or scales are not those of {shown(first)}, and the configuration of bitsandbytes has one for all."
        )
    return found


@annotated
def export_checkpoint(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    base: Base,
    *,
    like: str | os.PathLike[str] | None = None,
    adapter: str = "adapter",
    dtype: FloatName = "bfloat16",
    shard_bytes: int = 2**32,
    progress: bool | Callable[[int, int], None] = True,
) -> dict[str, int]:
    """Write a checkpoint as a base model and an adapter over it, which run and train without this library.

    Load the folder with transformers, and then ``PeftModel.from_pretrained(model, f"{folder}/adapter", is_trainable=True)``. The sum of both
    is the model of the checkpoint. The adapter belongs to this base: over the original weights it is wrong. Without low-rank factors there is
    no adapter, and the base is the model. llama.cpp reads ``model.gguf`` and ``adapter.gguf`` of the base ``"gguf"``.

    Parameters
    ----------
    path : path-like
        Folder of :func:`lqlora.decompose_checkpoint`. Or a file of :func:`lqlora.save`: then a matrix ``m`` is the tensor ``m.weight``.
    folder : path-like
        Folder to write, which must not exist or be empty. It appears when it is complete.
    base : {"bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq"}
        ``"bitsandbytes"``: the quantized part in the 4-bit layout of bitsandbytes, with the same codes and scales. All matrices must have
        the codebook ``nf4`` or ``fp4-bnb``, blocks of 32, 64, … 4096 along the rows, and scales ``float32`` or ``d8/256:float32``.
        ``"compressed-tensors"``: the quantized part as compressed-tensors and vLLM read it, with the same codes and zero points. Matrices may
        have different codebooks ``affine1`` to ``affine8`` and block sizes, which transformers 5.23 does not read; see :mod:`lqlora.integrations.compressed_tensors`.
        ``"dense"``: the decoded quantized part, for every format.
        ``"gguf"``: the quantized part in block types of llama.cpp, for Llama models; see :mod:`lqlora.integrations.gguf_blocks`. Other tensors
        have their dtypes in the checkpoint.
        ``"gptq"``: the quantized part as GPTQModel, vLLM and SGLang read it. Matrices may have different codebooks ``affine2``, ``affine3``,
        ``affine4`` and ``affine8`` and block sizes, with scales that float16 holds; see :mod:`lqlora.integrations.gptq`.
    like : path-like, optional
        GGUF file of the dense model in any type, whose settings and vocabulary are taken, for ``"gguf"`` alone.
    adapter : str, default "adapter"
        Name of the subfolder of the adapter. Models of LoftQ are dense bases with adapters in ``"loftq_init"``. GGUF has no use for it.
    dtype : {"bfloat16", "float16", "float32"}
        Dtype of decoded matrices, and the one that the model computes in. GGUF has no use for it.
    shard_bytes : int
        Largest number of bytes of tensors of one file; one file is in memory while it is written. A GGUF file is always one.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts tensors.

    Returns
    -------
    dict of str to int
        Bytes of each file with tensors of the base; for GGUF those of the adapter, too.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, or the folder cannot be written or is not empty.
    FormatError
        If :func:`can_export` names a matrix.
    InvalidArgumentError
        If ``dtype`` cannot hold a matrix, a dense base has no low-rank factors beside it, or ``like`` is missing, not used, or a file of another
        model.
    MissingDependencyError
        If torch is not installed, or gguf for GGUF.

    Examples
    --------
    >>> import numpy as np, lqlora as lq, tempfile
    >>> w = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    >>> d = lq.decompose(w, lq.BlockFormat.parse("nf4/64:float32"), rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lq.save(f"{folder}/small.safetensors", {"up": d})
    ...     sizes = export_checkpoint(f"{folder}/small.safetensors", f"{folder}/base", "bitsandbytes")
    >>> list(sizes)
    ['model.safetensors']
    """
    require_choice(base, "base", _BASES)
    require_choice(dtype, "dtype", ("bfloat16", "float16", "float32"))
    require_integer(shard_bytes, "shard_bytes", 1)
    if re.fullmatch("[A-Za-z0-9_-]+", adapter) is None:  # no path, and no name of a file
        raise InvalidArgumentError(f"adapter must be a name of letters, digits, - and _, got {shown(adapter)}.")
    if (like is None) == (base == "gguf"):
        raise InvalidArgumentError(
            "like must be a GGUF file of the dense model for base='gguf', and is not used for others."
        )
    if base != "gguf":
        require("torch", "peft", "Writing adapters of PEFT")
    own = Path(path).absolute()
    parts, origins = open_parts(own)
    if faults := _faults(parts, origins, base):
        name, reason = next(iter(faults.items()))
        raise FormatError(shortened(f"{path} cannot be exported: {shown(name)} ({len(faults)} in all). {reason}"))
    factors = {name: parts.matrix(name) for name in parts.matrices}
    factors = {name: matrix for name, matrix in factors.items() if len(matrix.lora_A)}
    if not factors and base == "dense":
        raise InvalidArgumentError(
            "path must have low-rank factors for an adapter, got ranks of 0. Use merge_checkpoint."
        )

    if like is not None:
        return write_gguf(
            parts,
            origins,
            Path(folder).absolute(),
            Path(like),
            _blocks_of,
            factors=factors,
            copies_tables=True,
            title="Exporting",
            progress=progress,
        )

    def size_of(matrix: StoredMatrix) -> int:
        """Return about the bytes of the tensors of a matrix."""
        count = math.prod(matrix.quantized.shape)
        if base in _SIZES:
            return _SIZES[base](matrix.quantized.format, matrix.quantized.shape)
        return matrix.quantized.nbytes + 2048 if base == "bitsandbytes" else (4 if dtype == "float32" else 2) * count

    kind = _gptq_format(parts) if base == "gptq" else "gptq"
    is_transposed = any(origin.is_transposed for origin in origins.values())
    return write_model(
        own, Path(folder).absolute(), "Exporting", functools.partial(_tensors_of, parts, origins, base, dtype, kind), size_of, dtype=dtype, shard_bytes=int(shard_bytes), progress=progress,
        quantization_config=_configuration(parts, base, dtype, kind),
        finish=lambda beside: _write_adapter(beside / adapter, parts, factors, is_transposed=is_transposed) if factors else None,
    )  # fmt: skip


def _tensors_of(
    parts: ModelParts,
    origins: Mapping[str, Origin],
    base: Base,
    dtype: FloatName,
    checkpoint_format: CheckpointFormat,
    name: str,
) -> Mapping[str, npt.NDArray[Any]]:
    """Return the tensors that stand for the dense tensor of a name."""
    origin = origins[name]
    if base == "bitsandbytes":
        return to_bitsandbytes(parts.matrix(origin.matrices[0]).quantized, name, dtype)
    if base == "compressed-tensors":
        return to_compressed_tensors(parts.matrix(origin.matrices[0]).quantized, name)
    if base == "gptq":
        layer = name.removesuffix(".weight")
        return to_gptq(parts.matrix(origin.matrices[0]).quantized, layer, checkpoint_format=checkpoint_format)
    dense = [rounded(np.asarray(dequantize(parts.matrix(own).quantized)), own, dtype) for own in origin.matrices]
    return {name: join(name, origin, dense)}


def _blocks_of(matrix: StoredMatrix, _: str) -> Encoded:
    """Return the quantized part of a matrix in a block type of GGUF."""
    return Encoded(block_type(matrix.quantized), matrix.quantized.shape, lambda: to_gguf_blocks(matrix.quantized))


def _configuration(
    parts: ModelParts, base: Base, dtype: FloatName, checkpoint_format: CheckpointFormat
) -> dict[str, Any] | None:
    """Return the entry of ``config.json`` with which transformers makes layers of other libraries."""
    # All other linear layers stay dense. Names of tensors that do not belong to one are harmless.
    others = {
        name.removesuffix(".weight")
        for name in parts.tensors
        if name.endswith(".weight") and parts.tensor(name).ndim == 2
    }
    dense = sorted({*others, "lm_head"} - parts.matrices.keys())
    if base == "compressed-tensors":
        groups: dict[tuple[int, int], list[str]] = {}
        for name in parts.matrices:
            fmt = parts.matrix(name).quantized.format
            groups.setdefault((fmt.codebook.bits, fmt.block_size), []).append(name)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": dense,
            "config_groups": {
                f"group_{number}": {"targets": sorted(names), "weights": _scheme(*kind)}
                for number, (kind, names) in enumerate(sorted(groups.items()))
            },
        }
    if base == "dense":
        return None
    if base == "gptq":
        return _gptq_configuration(parts, dense, checkpoint_format)
    fmt = parts.matrix(next(iter(parts.matrices))).quantized.format
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4" if fmt.codebook.name == "nf4" else "fp4",
        "bnb_4bit_use_double_quant": str(fmt.scales) != "float32",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def _gptq_format(parts: ModelParts) -> CheckpointFormat:
    """Return the format of zero points that holds those of all matrices; the one that more programs read, if it does."""
    fits = not any(gptq_fault(parts.matrix(name).quantized, checkpoint_format="gptq") for name in parts.matrices)
    return "gptq" if fits else "gptq_v2"


def _gptq_configuration(parts: ModelParts, dense: list[str], checkpoint_format: CheckpointFormat) -> dict[str, Any]:
    """Return the settings of GPTQ: those of most matrices, and by name those of others and of dense layers."""
    kinds = {}
    for name in parts.matrices:
        fmt = parts.matrix(name).quantized.format
        kinds[name] = (fmt.codebook.bits, fmt.block_size)
    bits, group = Counter(kinds.values()).most_common(1)[0][0]
    others = {
        f"+:^{re.escape(name)}$": {"bits": own[0], "group_size": own[1]}
        for name, own in kinds.items()
        if own != (bits, group)
    }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": False,
        "lm_head": "lm_head" in kinds,
        "checkpoint_format": checkpoint_format,
        "dynamic": others | {f"-:^{re.escape(name)}$": {} for name in dense},
    }


def _scheme(bits: int, group: int) -> dict[str, Any]:
    """Return the settings of compressed-tensors for codes of some bits in groups along the rows."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }


def _write_adapter(
    folder: Path, parts: ModelParts, factors: Mapping[str, StoredMatrix], *, is_transposed: bool
) -> None:
    """Write the low-rank factors as an adapter of PEFT."""
    import torch  # noqa: PLC0415 - optional

    from lqlora.integrations._adapter_files import adapter_settings, write_adapter  # noqa: PLC0415 - imports torch
    from lqlora.nn.adapters import Factors  # noqa: PLC0415

    names = {*parts.matrices, *(name.rpartition(".")[0] for name in parts.tensors)}
    settings = adapter_settings(factors, sorted(names), None, None) | {"fan_in_fan_out": is_transposed}
    found = {
        name: Factors(ops.convert(np.array(own.lora_A), torch), ops.convert(np.array(own.lora_B), torch), own.scaling)
        for name, own in factors.items()
    }
    write_adapter(folder, found, settings, {name: base_fingerprint(own.quantized) for name, own in factors.items()})
