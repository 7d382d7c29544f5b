"""Saving torch models with quantized layers to checkpoint files, and loading them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._documents import Reader, Text, key_step
from lqlora._messages import shortened, shown
from lqlora._printable import printable
from lqlora._shared_settings import collection_paused
from lqlora.checkpoint import Checkpoint, StoredMatrix, load, save
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.nn.embedding import quantized_tables
from lqlora.nn.embedding_tables import EmbeddingTable, embedding_fault
from lqlora.nn.experts import JoinedExperts
from lqlora.nn.linear_maps import matrix_of
from lqlora.nn.model import (
    QUANTIZED,
    first_names,
    keys_inside,
    quantized_layer,
    quantized_layers,
    replace_modules,
    table_modules,
)
from lqlora.nn.offload import Prefetcher, offload_weight, select_offloaded
from lqlora.nn.selection import LinearMaps, unwrapped
from lqlora.nn.sharding import is_sharded, whole, write_once
from lqlora.nn.skeletons import MetaTensors, with_computed_buffers
from lqlora.nn.weight import QuantizedWeight

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping

    from lqlora._patterns import Patterns
    from lqlora.nn.linear import LQLinear
    from lqlora.quantized import QuantizedArray

__all__ = ["load_model", "save_model"]

#: Key of the metadata under which :func:`save_model` keeps the ties: the other names of tensors and tables that are stored once.
_TIED = "tied"


@annotated
@collection_paused()
def save_model(path: str | os.PathLike[str], model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model with quantized layers to one checkpoint file, atomically. Tied weights are stored once.

    If ``fully_shard`` has shared the parameters out to several processes, all of them must call this. The process of rank 0
    writes the file.

    Parameters
    ----------
    path : path-like
        File to write, see :func:`lqlora.save`.
    model : torch.nn.Module
        A model that :func:`quantize_model` changed.
    metadata : mapping, optional
        JSON values to store with the model. The key ``tied`` is reserved.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, or the metadata uses the reserved key, or an entry of the state dict cannot be
        stored, such as one on the meta device, or experts were read one by one from a folder. Also if it has a quantized
        output embedding without the embedding that owns its table.
    CheckpointError
        If the file cannot be written.
    """
    model = unwrapped(model)
    # One walk finds all: a model may have thousands of modules.
    modules = [own for own in model.named_modules(remove_duplicate=False) if isinstance(own[1], QUANTIZED)]
    layers = quantized_layers(model, modules)
    _refuse_joined_experts(model, layers)
    if _TIED in (metadata or {}):
        raise InvalidArgumentError(f"metadata must not have the key {_TIED!r}, which is reserved. Rename the key.")
    state = model.state_dict(keep_vars=True)
    _require_storable(state)
    has_shards = is_sharded(state.values())
    matrices: dict[str, StoredMatrix | QuantizedArray] = {
        name: StoredMatrix(
            layer.quantized.array, whole(layer.lora_A.detach()), whole(layer.lora_B.detach()), layer.scaling
        )
        for name, layer in layers.items()
    }
    tables = quantized_tables(model, modules)
    matrices |= {name: own[name].quantized.array for name, own in tables.items()}
    own = keys_inside(state, {name for name, _ in modules})
    state = {name: tensor for name, tensor in state.items() if name not in own}
    first = first_names(state)
    tensors = {name: whole(tensor) for name, tensor in state.items() if first[name] == name}
    tied = {name: origin for name, origin in first.items() if origin != name}
    tied |= {other: name for name, modules in tables.items() for other in modules if other != name}
    content = path, matrices, tensors, {**(metadata or {}), _TIED: tied}
    if has_shards:
        write_once(save, *content)
    else:
        save(*content)


def _require_storable(state: Mapping[str, Any]) -> None:
    """Raise if an entry of a state dict holds no values that a file can store."""
    for name, own in state.items():
        if not isinstance(own, torch.Tensor) or name.endswith("_extra_state"):
            fault = "is extra state of a module, which files do not store. Save it beside the file"
        elif is_lazy(own):
            fault = "is made by the first call of its module. Call the model once"
        elif own.is_meta:
            fault = "is on the meta device and holds no values. Load it first"
        elif own.layout != torch.strided:
            fault = f"has the layout {own.layout}, which files do not store. Make it dense"
        elif own.is_floating_point() and own.itemsize == 1:
            fault = f"is of {own.dtype}, which files do not store. Convert it, for example to torch.bfloat16"
        else:
            continue
        raise InvalidArgumentError(f"model must have a state that files can store, but {printable(name)!r} {fault}.")


def _refuse_joined_experts(model: nn.Module, layers: Mapping[str, LQLinear]) -> None:
    """Raise if layers of experts stand for an array, which a model to load into would still have."""
    # They are called "experts.3.up_proj": the name before the number is that of the module with the array.
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name in layers if "experts." in name}
    for owner in owners:
        if any(isinstance(own, JoinedExperts) for own in vars(model.get_submodule(owner)).values()):
            raise InvalidArgumentError(
                "model must not have experts that were read one by one, which load_model would not find. Use save_pretrained of transformers."
            )


@annotated
@torch.inference_mode(mode=False)  # the new layers train
@collection_paused()
def load_model(path: str | os.PathLike[str], model: nn.Module, *, offload: Patterns | None = None) -> Checkpoint:
    """Load a checkpoint into a model of the same architecture, in place.

    Linear layers that are matrices of the file are replaced by :class:`LQLinear`, and embeddings by
    :class:`QuantizedEmbedding`, with the output embeddings that use their tables. Other tensors are copied into those of
    the model, so that ties of the model stay. Gradients are switched off as :func:`quantize_model` does.

    The model may be on the meta device, and so take no memory before it is loaded. It is in host memory afterwards, and no dense
    weight of a quantized layer is ever made.

    Parameters
    ----------
    path : path-like
        File of :func:`save_model`, or folder of :func:`lqlora.decompose_checkpoint`. In both, tensors have the names of the state dict
        of the model. Checkpoints of some models on hubs have others, which ``from_pretrained`` of transformers translates: experts one
        by one instead of in one array, for example. Such a folder does not fit.
    model : torch.nn.Module
        A model with plain linear layers, of any values. It is changed only after the file was checked against it.
    offload : patterns, optional
        Matrices of the file, by name or pattern as in :func:`select_linears`, whose codes and scales stay in the file, mapped
        into memory as :func:`offload_model` does. ``"*"`` means all layers. Tables of embeddings are loaded into memory, and a
        pattern that selects nothing else is refused.

    Returns
    -------
    Checkpoint
        The content of the file. With ``offload`` its matrices share the memory of the offloaded layers, so what
        ``load_state_dict`` writes into these layers is seen in both. With ``offload``, and for a model on the meta device, it is
        mapped into memory, as :func:`lqlora.load` does with ``mapped=True``.

    Raises
    ------
    InvalidArgumentError
        If ``offload`` is not a pattern, or selects no layer or a table alone.
    CheckpointError
        If the file is damaged, or does not fit the model: a layer or tensor is missing, left over or of another shape. Also if a
        buffer that files do not store is on the meta device, and no method ``_init_weights``, as models of transformers have,
        computes it.
    """
    on_meta = any(own.is_meta for own in (*model.parameters(), *model.buffers()))
    content = load(path, mapped=offload is not None or on_meta)
    if not content.matrices:
        raise CheckpointError(shortened(f"{path} holds no quantized matrix."))
    with with_computed_buffers(unwrapped(model)) if on_meta else nullcontext():
        _fill(path, LinearMaps(model, to_fill=True), content, offload)
    return content


def _fill(path: str | os.PathLike[str], maps: LinearMaps, content: Checkpoint, offload: Patterns | None) -> None:
    """Check a file against a model, and load it."""
    held = {name: getattr(maps.modules.get(name), "quantized", None) for name in content.matrices}
    if taken := [name for name, own in held.items() if isinstance(own, QuantizedWeight)]:
        raise InvalidArgumentError(
            f"model must be dense where the file has quantized matrices, but {taken[0]!r} is quantized already. Build the model again, or "
            "load factors by load_factors."
        )
    layers = [name for name in content.matrices if not isinstance(maps.modules.get(name), nn.Embedding)]
    embedded = [name for name in content.matrices if isinstance(maps.modules.get(name), nn.Embedding)]
    names = (
        [] if offload is None else select_offloaded(layers, embedded, offload, where=f" of {path}", parameter="offload")
    )
    linears = {name: module for name, module in maps.layers.items() if name in content.matrices}
    ties = _ties(path, content)
    tied = {name: origin for name, origin in ties.items() if origin in content.tensors}
    sharing = {name: origin for name, origin in ties.items() if name not in tied}
    tables = _tables(maps, content, sharing)
    state = {name: own for name, own in maps.model.state_dict(keep_vars=True).items() if isinstance(own, torch.Tensor)}
    skeleton = MetaTensors(maps.modules | {name: own for stack in maps.stacks for name, own in stack.matrices.items()})
    stored = {*state.values()}
    for stack in maps.stacks:
        if not linears.keys().isdisjoint(stack.matrices):
            del state[stack.name]
            state |= {f"{name}.weight": own.weight for name, own in stack.matrices.items() if name not in linears}
    stored |= {*state.values(), *(cast("torch.Tensor", own.weight) for own in linears.values())}
    empty = [name for own, name in skeleton.names.items() if own not in stored]
    _check_fit(path, state, maps, linears, tables, content, tied, sharing, empty=empty)
    maps.freeze()
    # Values are copied into the tensors of the model, which keeps their ties, dtypes and devices. Layers are replaced
    # last: they take over the biases that were just filled.
    for name in [*content.tensors, *tied]:
        own, values = state[name], ops.convert(content.tensors[tied.get(name, name)], torch)
        if own.is_meta:
            skeleton.fill(own, values)
            continue
        # Only inference mode may change tensors that were made in it.
        with torch.inference_mode(mode=own.is_inference()), torch.no_grad():
            own.copy_(values)
    replacements: dict[nn.Module, nn.Module] = {}
    offloaded, prefetcher = frozenset(names), Prefetcher()
    for name, matrix in content.matrices.items():
        if name in tables:
            replacements |= table_modules(tables[name], matrix.quantized)
            continue
        replacements[linears[name]] = new = quantized_layer(matrix, linears[name])
        if name in offloaded:
            offload_weight(new.quantized, matrix.quantized.to_arrays(), prefetcher)
    maps.split_stacks(replacements)
    replace_modules(maps.model, replacements)


def _tables(maps: LinearMaps, content: Checkpoint, sharing: Mapping[str, str]) -> dict[str, EmbeddingTable]:
    """Return the embeddings of a model that are matrices of a file, with the modules that the file ties to them."""
    found: dict[str, EmbeddingTable] = {}
    for name in content.matrices:
        embedding = maps.modules.get(name)
        if isinstance(embedding, nn.Embedding):
            modules = {name: embedding} | {
                other: maps.modules[other]
                for other, origin in sharing.items()
                if origin == name and isinstance(maps.modules.get(other), nn.Embedding | nn.Linear)
            }
            embeddings = {key: own for key, own in modules.items() if isinstance(own, nn.Embedding)}
            heads = {key: own for key, own in modules.items() if isinstance(own, nn.Linear)}
            faults = (embedding_fault(maps, key, own) for key, own in embeddings.items())
            fault = next(filter(None, [*faults, *(maps.faults.get(key) for key in heads)]), None)
            found[name] = EmbeddingTable(cast("nn.Parameter", embedding.weight), embeddings, heads, fault)
    return found


def _are_equal(first: Any, second: Any) -> bool:
    """Return whether two tensors of a file are the same, byte for byte."""
    return bool(first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes())


def _can_hold(dtype: torch.dtype, given: torch.Tensor) -> bool:
    """Return whether a dtype has the values of a tensor: all integers, and floating-point numbers but for rounding."""
    if given.dtype == dtype:
        return True
    if given.is_complex() and not dtype.is_complex:
        return False
    cast = given.to(dtype)
    if (given.is_floating_point() or given.is_complex()) and (dtype.is_floating_point or dtype.is_complex):
        # Casts to 8 bits may saturate. Others turn what is too large into infinity.
        if dtype.itemsize == 1:
            return bool((given.abs().double() <= torch.finfo(dtype).max).all())
        return torch.equal(cast.isfinite(), given.isfinite())
    return torch.equal(cast.to(given.dtype), given)


def _ties(path: str | os.PathLike[str], content: Checkpoint) -> dict[str, str]:
    """Return a dict from other names of tied tensors and tables to the names under which they are stored."""
    reader = Reader(f"{path} is damaged or inconsistent", CheckpointError)
    place = f"metadata.{_TIED}"
    tied = reader.convert(content.metadata.get(_TIED, {}), dict[Text, Text], place)
    for name, origin in tied.items():
        if origin not in content.tensors and origin not in content.matrices:
            raise reader.fault(
                place + key_step(name), f"must name a tensor or matrix of the file, got {shown(origin)}."
            )
    return tied


def _table_fault(matrix: StoredMatrix) -> str | None:
    """Return why a matrix of a file cannot be the table of an embedding, or None."""
    if matrix.lora_A.shape[0]:
        return "has low-rank factors in the file, and is an embedding in the model"
    if matrix.quantized.format.couples_rows:
        return "has blocks along its columns or rotated outputs in the file, and is an embedding in the model"
    return None


def _check_fit(
    path: str | os.PathLike[str],
    state: Mapping[str, torch.Tensor],
    maps: LinearMaps,
    linears: Mapping[str, nn.Module],
    tables: Mapping[str, EmbeddingTable],
    content: Checkpoint,
    tied: Mapping[str, str],
    sharing: Mapping[str, str],
    *,
    empty: Collection[str],
) -> None:
    """Raise unless the file and the state of the model have the same names, shapes and, as far as needed, ties."""
    # A layer of the file stands for the weight of a linear layer, under each name of the layer. Another module that shares
    # the weight, such as an embedding, keeps it.
    of_tables = {key: own for table in tables.values() for key, own in (table.embeddings | table.heads).items()}
    layers = {*linears.values(), *of_tables.values()}
    replaced = {
        f"{name}.weight" for name, module in maps.model.named_modules(remove_duplicate=False) if module in layers
    }
    expected = {name: tuple(t.shape) for name, t in state.items() if name not in replaced}
    stored = {name: tuple(content.tensors[tied.get(name, name)].shape) for name in [*content.tensors, *tied]}
    expected |= {name: tuple(matrix_of(layer).shape) for name, layer in linears.items()}
    expected |= {name: tuple(own.weight.shape) for name, own in of_tables.items()}
    stored |= {name: matrix.quantized.shape for name, matrix in content.matrices.items()}
    stored |= {name: content.matrices[table].quantized.shape for name, table in sharing.items()}
    faults = [f"{name!r} {maps.faults[name].sentence}" for name in linears if name in maps.faults]
    faults += [f"{name!r} {own.fault.sentence}" for name, own in tables.items() if own.fault]
    faults += [f"{name!r} {fault}" for name in tables if (fault := _table_fault(content.matrices[name]))]
    faults += [
        f"{name!r} uses the table of {origin!r} in the file, and no such module is in the model"
        for name, origin in sharing.items()
        if name not in of_tables
    ]
    # A tensor that has another name in the model, such as a head that is tied to the embedding, is stored under either.
    names = first_names(state)
    present = {names[name] for name in stored if name in names}
    faults += [
        f"{name!r} is not in the file" for name in expected if name not in stored and names.get(name) not in present
    ]
    faults += [
        f"{name!r} is not in the model, or not of that kind"
        for name in stored
        if name not in expected or (name in content.matrices and name not in linears and name not in tables)
    ]
    faults += [
        f"{name!r} is {expected[name]} in the model and {shape} in the file"
        for name, shape in stored.items()
        if name in expected and expected[name] != shape
    ]
    faults += [
        f"{name!r} holds values of {tensor.dtype} in the file that {state[name].dtype} of the model cannot hold. Build the "
        "model in another dtype"
        for name, tensor in content.tensors.items()
        if name in state and not _can_hold(state[name].dtype, ops.convert(tensor, torch))
    ]
    faults += [
        f"{name!r} is spread over processes in the model. Load the file first"
        for name, own in state.items()
        if name in stored and hasattr(own, "full_tensor")
    ]
    faults += [
        f"{name!r} is on the meta device, and files do not store it. Give it its values, or build the model with "
        "accelerate.init_empty_weights, which makes buffers as ever"
        for name in empty
    ]
    # A tie of the file that the model does not have is harmless: both tensors get the same values. The opposite is not:
    # of two stored tensors that are one in the model, the second would overwrite the first.
    first = first_names({name: state[name] for name in content.tensors if name in state})
    faults += [
        f"{name!r} and {other!r} are one tensor in the model and two in the file"
        for name, other in first.items()
        if other != name and not _are_equal(content.tensors[name], content.tensors[other])
    ]
    if faults:
        raise CheckpointError(
            shortened(f"{path} does not fit the model: {faults[0]} ({len(faults)} differences in all).")
        )
