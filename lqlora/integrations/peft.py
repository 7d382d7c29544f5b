"""PEFT on top of quantized models, and low-rank factors as adapter folders of PEFT.

:func:`register` lets PEFT put LoRA, DoRA and IA3 over :class:`lqlora.nn.LQLinear`, and prompts before quantized embeddings. :func:`save_adapter` and
:func:`load_adapter` write and read the folders of PEFT's ``save_pretrained``, and work without PEFT.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._messages import shortened, shown
from lqlora._optional import require
from lqlora._options import require_kind
from lqlora.checkpoint.factors import base_fingerprint
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError, LQLoRAError
from lqlora.integrations._adapter_files import ROOT, adapter_settings, check_bases, read_adapter, write_adapter
from lqlora.integrations._model_folders import open_parts
from lqlora.integrations.exporting import adapter_fault
from lqlora.nn.adapters import Factors, factors, set_factors
from lqlora.nn.model import quantized_layers

if TYPE_CHECKING:
    import os

    from torch import nn

    from lqlora.checkpoint import StoredMatrix

__all__ = ["convert_adapter", "load_adapter", "register", "save_adapter"]


def register() -> None:
    """Let PEFT put LoRA, DoRA and IA3 over quantized layers, and prompts before quantized embeddings.

    Call it once in a process, before ``get_peft_model``, ``PeftModel.from_pretrained`` or a trainer that takes a
    configuration of PEFT. Calls after the first change nothing. Models without quantized layers work as before.

    Raises
    ------
    MissingDependencyError
        If PEFT is not installed.

    Notes
    -----
    ``get_peft_model`` freezes the model below, factors of :class:`lqlora.nn.LQLinear` included. Set ``requires_grad`` afterwards
    to train them, too, and keep them with :func:`lqlora.nn.save_factors`: ``save_pretrained`` writes only PEFT's adapters.

    ``merge_adapter`` and ``merge_and_unload`` put a ``torch.nn.Linear``, or the transposed ``Conv1D`` of GPT-2, in the place of
    each layer that has an adapter. It holds the sum of all parts, in the dtype of the rest of the model. ``unmerge_adapter`` puts the quantized layer back, bit for bit.
    Starts that subtract a part of the weight, such as PiSSA, are refused, and quantized embeddings in ``modules_to_save``.

    ``target_parameters`` of ``LoraConfig`` may name arrays of experts that were quantized, and ``target_modules`` may name them
    or single experts. Each expert gets an adapter of its own. Such adapters are products of two factors: DoRA, dropout, IA3 and
    batches with several adapters are refused for experts.
    """
    require("peft", "peft", "lqlora.integrations.peft.register")
    from lqlora.integrations._peft_layers import register_tuners  # noqa: PLC0415 - imports PEFT

    register_tuners()


@annotated
def save_adapter(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the low-rank factors of a model as a LoRA adapter of PEFT.

    The adapter belongs to the quantized part alone: ``Q + scaling * lora_B @ lora_A``. Load it over the same codes and scales
    with factors of rank 0, or over a dense model with the decoded values. Over the original weights it is wrong, because
    the factors stand for a part of them.

    Parameters
    ----------
    folder : path-like
        Folder for ``adapter_config.json`` and ``adapter_model.safetensors``. It is made if it does not exist. Files of an
        older adapter are replaced.
    model : torch.nn.Module
        A model with quantized layers. Layers of rank 0 are left out.
    base_model : str, optional
        Name or folder of the model with the quantized part, for ``base_model_name_or_path``.
    task_type : str, optional
        PEFT's name of the task, such as ``"CAUSAL_LM"``.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer with a rank, or is wrapped by PEFT.
    CheckpointError
        If a file cannot be written.

    Notes
    -----
    Each layer keeps its rank and scaling, in ``rank_pattern`` and ``alpha_pattern`` where they differ from those of most
    layers. PEFT computes the scaling as alpha / rank in float64, so it may differ in the last of its 53 bits. Dropout is
    not written.
    """
    for option, text in (("base_model", base_model), ("task_type", task_type)):
        require_kind(text, option, (str, type(None)), "a text")  # before the old settings are removed
    all_factors = factors(model)
    if wrapped := next((name for name in all_factors if name.endswith(".base_layer") or name.startswith(ROOT)), None):
        raise InvalidArgumentError(
            f"model must not be wrapped by PEFT, got the layer {shown(wrapped)}. Save the model that PEFT wraps."
        )
    found = {name: own for name, own in all_factors.items() if len(own.lora_A)}
    if not found:
        raise InvalidArgumentError("model must have a quantized layer with a rank above 0, got ranks of 0 only.")
    names = [name for name, _ in model.named_modules()]
    layers = quantized_layers(model)
    bases = {name: base_fingerprint(layers[name].quantized.array) for name in found}
    write_adapter(folder, found, adapter_settings(found, names, base_model, task_type), bases)


@annotated
def load_adapter(folder: str | os.PathLike[str], model: nn.Module, *, other_base: bool = False) -> None:
    """Load a LoRA adapter of PEFT into the low-rank factors of a model, in place of those that it has.

    Parameters
    ----------
    folder : path-like
        Folder of :func:`save_adapter` or of PEFT's ``save_pretrained``.
    model : torch.nn.Module
        A model with quantized layers. It is changed only after the folder was checked. Layers without an adapter
        get rank 0. :func:`lqlora.nn.set_factors` says what happens to parameters.
    other_base : bool, default False
        Take an adapter that says that it belongs to other codes and scales. :func:`save_adapter` writes their fingerprints, and PEFT does
        not.

    Raises
    ------
    CheckpointError
        If the folder is not a LoRA adapter or is damaged, does not fit the model, belongs to other codes and scales, or has what factors cannot stand for:
        DoRA, biases, other modules, patterns that are not names, and starts such as PiSSA that change the weight below.
    InvalidArgumentError
        If the model has no quantized layer, or is one itself.
    """
    require_kind(other_base, "other_base", (bool,), "True or False")
    old, given = factors(model), read_adapter(folder)
    if left := sorted(given.keys() - old.keys()):
        raise CheckpointError(
            shortened(
                f"{folder} does not fit the model, which has no quantized layer {shown(left[0])} ({len(left)} in all)."
            )
        )
    if not other_base:
        layers = quantized_layers(model)
        bases = {name: base_fingerprint(layers[name].quantized.array) for name in given}
        check_bases(folder, bases, "Load the model that it was saved from, or pass other_base=True.")
    try:
        set_factors(
            model,
            {
                name: given.get(name, Factors(own.lora_A[:0], own.lora_B[:, :0], own.scaling))
                for name, own in old.items()
            },
        )
    except LQLoRAError as error:
        raise CheckpointError(shortened(f"{folder} does not fit the model: {error}")) from None


@annotated
def convert_adapter(
    checkpoint: str | os.PathLike[str], adapter: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> None:
    """Turn an adapter that was trained over the quantized part of a checkpoint into one for the original weights.

    With the factors ``B0`` and ``A0`` of the checkpoint and those of the adapter, training has changed the sum of both parts by
    ``B @ A - B0 @ A0``. This is the product of ``[B, -B0]`` and ``[A; A0]``, a LoRA of at most twice the rank. Over the original weights
    it gives what training has learned, without the error of quantization. Nothing is rounded if both have the same scaling.

    Parameters
    ----------
    checkpoint : path-like
        Folder of :func:`lqlora.decompose_checkpoint`, or file of :func:`lqlora.save`, that training started from.
    adapter : path-like
        Folder of the trained adapter, as PEFT wrote it over the base of
        :func:`export_checkpoint <lqlora.integrations.exporting.export_checkpoint>`, or :func:`save_adapter`. Layers of the checkpoint that
        it does not have lost their low-rank part.
    folder : path-like
        Folder to write for PEFT, which must not exist or be empty.

    Raises
    ------
    CheckpointError
        If a file cannot be read or written, or the adapter does not fit the checkpoint.
    FormatError
        If PEFT cannot have the factors of a matrix in an adapter, as those of embeddings and arrays of experts.

    Examples
    --------
    >>> import numpy as np, lqlora as lq, tempfile, torch
    >>> w = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(32, 16, bias=False)})
    >>> _ = model.up.weight.data.copy_(torch.from_numpy(w))
    >>> _ = lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/32:float32"), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lq.nn.save_model(f"{folder}/start.safetensors", model)
    ...     _ = model.up.lora_B.data.add_(1)  # training
    ...     save_adapter(f"{folder}/trained", model)
    ...     convert_adapter(f"{folder}/start.safetensors", f"{folder}/trained", f"{folder}/original")
    ...     found = read_adapter(f"{folder}/original")["up"]
    >>> found.lora_A.shape
    torch.Size([4, 32])
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(shortened(f"{folder} is not an empty folder. Name another one."))
    parts, origins = open_parts(Path(checkpoint).absolute())
    trained = read_adapter(adapter)
    if left := sorted(trained.keys() - parts.matrices.keys()):
        raise CheckpointError(
            shortened(
                f"{adapter} does not fit {checkpoint}, which has no matrix {shown(left[0])} ({len(left)} in all)."
            )
        )
    bases = {name: base_fingerprint(parts.matrix(name).quantized) for name in trained}
    check_bases(adapter, bases, "Name the checkpoint that training started from.")
    found = {}
    for origin in origins.values():
        for name in origin.matrices:
            own = _change(name, parts.matrix(name), trained.get(name), f"{adapter} does not fit {checkpoint}")
            if own is not None and (fault := adapter_fault(name, origin, len(own.lora_A))):
                raise FormatError(shortened(f"{shown(name)} cannot be in an adapter. {fault}"))
            if own is not None:
                found[name] = own
    if not found:
        raise CheckpointError(shortened(f"{adapter} and {checkpoint} have no factors."))
    names = {*parts.matrices, *(name.rpartition(".")[0] for name in parts.tensors)}
    is_transposed = any(origin.is_transposed for origin in origins.values())
    settings = adapter_settings(found, sorted(names), None, None) | {"fan_in_fan_out": is_transposed}
    write_adapter(folder, found, settings)


def _change(name: str, start: StoredMatrix, trained: Factors | None, fault: str) -> Factors | None:
    """Return factors of what training has changed, or None if there were none before and after."""
    first = Factors(_tensor(start.lora_A), _tensor(start.lora_B), start.scaling)
    # A scaling of 0 is that of no low-rank part.
    own = (
        Factors(first.lora_A[:0], first.lora_B[:, :0], first.scaling)
        if trained is None or not trained.scaling
        else trained
    )
    if own.lora_A.shape[1:] != first.lora_A.shape[1:] or own.lora_B.shape[:1] != first.lora_B.shape[:1]:
        raise CheckpointError(shortened(f"{fault}: {shown(name)} has other shapes there."))
    dtype = torch.promote_types(own.lora_A.dtype, first.lora_A.dtype)
    back = first.lora_B.to(dtype)
    if len(first.lora_A) and first.scaling != own.scaling:  # one scaling for both
        back = back.double().mul(first.scaling / own.scaling).to(dtype)
    joined = torch.cat([own.lora_A.to(dtype), first.lora_A.to(dtype)])
    if not len(joined):
        return None
    if not bool(torch.isfinite(back).all()) or not math.isfinite(own.scaling * len(joined)):
        raise CheckpointError(
            shortened(f"{fault}: {shown(name)} has a scaling of {own.scaling:.4g} there, and no number for the sum.")
        )
    return Factors(joined, torch.cat([own.lora_B.to(dtype), -back], 1), own.scaling)


def _tensor(array: Any) -> torch.Tensor:
    """Return a copy of an array, whose file is mapped, as a tensor."""
    found: torch.Tensor = ops.convert(np.array(array), torch)
    return found
