"""Models of transformers whose blocks stay in their files, and are read one at a time."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lqlora._messages import about_file, shortened, shown
from lqlora._optional import require
from lqlora._patterns import list_names
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations._expert_rows import find_rows
from lqlora.integrations._quiet import without_bars
from lqlora.integrations.sources import open_model
from lqlora.nn.block_calls import find_blocks
from lqlora.nn.experts import ExpertMatrix
from lqlora.nn.linear_maps import matrix_of
from lqlora.nn.selection import LinearMaps
from lqlora.nn.skeletons import MetaTensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lqlora._patterns import Patterns
    from lqlora.integrations.contents import ModelContents

__all__ = ["DiskModel", "MatrixSource", "list_layers"]


class MatrixSource(NamedTuple):
    """Matrix of the files that is a layer of the model, or some rows of one.

    Parameters
    ----------
    layer : str
        Name of the layer in the model.
    rows, columns : int
        Shape of the matrix.
    first : int, default 0
        Row of the layer that the matrix begins with.
    """

    layer: str
    rows: int
    columns: int
    first: int = 0


class DiskModel:
    """Model whose blocks are on the meta device, with the files that hold their values.

    Parameters
    ----------
    source : Path
        Folder that ``save_pretrained`` of transformers wrote.
    model_class : class
        Class of transformers with ``from_pretrained``.
    blocks : str or None
        Name of the list of blocks.
    include, exclude : patterns
        Layers to select, of those in the blocks.
    dtype : torch.dtype
        Dtype of the computation.
    work : Path
        Folder for weights that the model has in another layout than the files.

    Attributes
    ----------
    model : torch.nn.Module
        The model in evaluation mode. Everything outside of lists of blocks is in memory.
    path : str
        Name of the list of blocks.
    blocks : dict of str to torch.nn.Module
        Blocks by their names in the model, on the meta device.
    matrices : dict of str to MatrixSource
        Selected matrices by their names in the files, as :func:`lqlora.integrations.sources.open_model` has them.
    lost : list of str
        Selected layers of the model that have no matrix in the files.
    """

    def __init__(
        self,
        source: Path,
        model_class: Any,
        blocks: str | None,
        include: Patterns | None,
        exclude: Patterns,
        dtype: torch.dtype,
        work: Path,
    ) -> None:
        skeleton = _skeleton(source, model_class)
        self.path, items, chosen = _chosen(skeleton, blocks, include, exclude)
        self.model = _loaded(source, skeleton, dtype, work)
        self.blocks = {f"{self.path}.{key}": self.model.get_submodule(f"{self.path}.{key}") for key in items}
        self._values: Mapping[str, torch.Tensor] = _offloaded(self.model)
        self.matrices = self._sources_of(open_model(source), chosen)
        self.lost = sorted(chosen.keys() - {own.layer for own in self.matrices.values()})
        _remove_hooks(self.blocks.values())

    def block(self, name: str, device: torch.device) -> nn.Module:
        """Return a copy of a block that has values.

        Parameters
        ----------
        name : str
            Name of the block in the model.
        device : torch.device
            Device of the copy.

        Returns
        -------
        torch.nn.Module
            The copy. Its parameters do not train.
        """
        own: nn.Module = copy.deepcopy(self.blocks[name])
        skeleton = MetaTensors(dict(own.named_modules()))
        for tensor, key in skeleton.names.items():
            whole = f"{name}.{key}"
            if whole not in self._values:
                raise CheckpointError(shortened(f"source has no values for {shown(whole)} of the model."))
            skeleton.fill(tensor, self._values[whole])
        own.requires_grad_(requires_grad=False).eval().to(device)
        return own

    def _sources_of(self, contents: ModelContents, chosen: Mapping[str, nn.Module]) -> dict[str, MatrixSource]:
        """Return the matrices of the files that the layers have."""
        index: Mapping[str, Mapping[str, Any]] = self._values.index  # type: ignore[attr-defined]
        files, found = {path.resolve() for path in contents.files}, {}
        for name, layer in chosen.items():
            stack, _, number = name.rpartition(".")
            own = index.get(stack if isinstance(layer, ExpertMatrix) else f"{name}.weight")
            if own is None or Path(own["safetensors_file"]).resolve() not in files:
                continue  # it was put together from several tensors
            matrix = own["weight_name"].removesuffix(".weight") + (
                f".{number}" if isinstance(layer, ExpertMatrix) else ""
            )
            found[matrix] = MatrixSource(name, *_shape_of(layer))
        return {
            name: own
            for name, own in (found | _joined(self.model, contents, chosen)).items()
            if name in contents.weights
        }


def _joined(model: nn.Module, contents: ModelContents, chosen: Mapping[str, nn.Module]) -> dict[str, MatrixSource]:
    """Return the matrices of experts that files have one by one, and the model in one array."""
    if not any(isinstance(layer, ExpertMatrix) for layer in chosen.values()):
        return {}
    found = {}
    for name, own in find_rows(model, contents.tensors).items():
        tensor, layer = contents.tensors[name], f"{own.array}.{own.expert}"
        if layer in chosen and len(tensor.matrices) == 1:
            rows, columns = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
            if (rows * own.parts, columns) == _shape_of(chosen[layer]):
                found[tensor.matrices[0]] = MatrixSource(layer, rows, columns, rows * own.part)
    return found


def list_layers(
    source: Path, model_class: Any, include: Patterns | None, exclude: Patterns
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return blocks, and the shapes of the matrices in them that patterns select, without reading a weight.

    Parameters
    ----------
    source : Path
        Folder that ``save_pretrained`` of transformers wrote.
    model_class : class
        Class of transformers with ``from_pretrained``.
    include, exclude : patterns
        Layers to select.

    Returns
    -------
    blocks : list of str
        Names of the blocks.
    shapes : list of tuple of int
        Shape of each matrix of these layers, as the files have them.
    """
    skeleton = _skeleton(source, model_class)
    path, items, chosen = _chosen(skeleton, None, include, exclude)
    joined = _joined(skeleton, open_model(source), chosen)
    in_parts = {own.layer for own in joined.values()}
    shapes: list[tuple[int, ...]] = [_shape_of(layer) for name, layer in chosen.items() if name not in in_parts]
    shapes += [(own.rows, own.columns) for own in joined.values()]
    return [f"{path}.{key}" for key in items], shapes


def _chosen(
    skeleton: nn.Module, blocks: str | None, include: Patterns | None, exclude: Patterns
) -> tuple[str, dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the name of the list of blocks of a model, its items, and the selected layers in them."""
    maps = LinearMaps(skeleton, to_fill=True)
    layers = maps.choose(include, exclude)
    path, items = find_blocks(maps.modules, layers, blocks)
    return path, items, {name: layer for name, layer in layers.items() if name.startswith(f"{path}.")}


def _skeleton(source: Path, model_class: Any) -> nn.Module:
    """Return the model of a folder on the meta device."""
    transformers = require("transformers", "demo", "Calibration of models in files")
    require("accelerate", "demo", "Calibration of models in files")
    if not source.is_dir():
        raise CheckpointError(about_file(source, "is not a folder of a model of transformers."))
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise CheckpointError(
                about_file(source, "holds a model that is quantized already. Name the folder of the dense model.")
            )
        make = getattr(model_class, "from_config", None) or model_class._from_config  # noqa: SLF001 - the name in transformers
        with torch.device("meta"):
            model: nn.Module = make(config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises errors of many kinds for files that it cannot read
        raise CheckpointError(shortened(f"{source} cannot be read as a model of transformers: {error}.")) from error
    return model


def _loaded(source: Path, skeleton: nn.Module, dtype: torch.dtype, work: Path) -> Any:
    """Return the model with the items of all lists of modules in files, and the rest in memory."""
    places = dict(_places(skeleton, ""))
    # It says that parameters are in files, which is what is asked for.
    loud = logging.getLogger("accelerate.big_modeling")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with without_bars():
            model, loading = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
                source, local_files_only=True, device_map=places, offload_folder=str(work), dtype=dtype, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # as above
        raise CheckpointError(shortened(f"{source} cannot be read as a model of transformers: {error}.")) from error
    finally:
        loud.setLevel(level)
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        raise CheckpointError(
            shortened(f"{source} must hold all weights of {type(skeleton).__name__}, but lacks {list_names(missing)}.")
        )
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    model.requires_grad_(requires_grad=False)
    return model.eval()


def _places(module: nn.Module, name: str) -> Iterator[tuple[str, str]]:
    """Yield the place of each part of a model: items of lists in files, other modules and parameters in memory."""
    prefix = f"{name}." if name else ""
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{prefix}{key}.{item}", "disk") for item, _ in child.named_children())
        elif any(isinstance(own, nn.ModuleList) for own in child.modules()):
            yield from _places(child, f"{prefix}{key}")
        else:
            yield f"{prefix}{key}", "cpu"
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    yield from ((f"{prefix}{key}", "cpu") for key, _ in own)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))


def _offloaded(model: nn.Module) -> Any:
    """Return the mapping from which accelerate reads parameters that are in files."""
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map.dataset
    raise InvalidArgumentError("source must hold a model whose blocks have parameters.")


def _remove_hooks(blocks: Iterable[nn.Module]) -> None:
    hooks = require("accelerate.hooks", "demo", "Calibration of models in files")
    for block in blocks:
        hooks.remove_hook_from_submodules(block)
        for module in block.modules():
            vars(module).pop("forward", None)  # the method that the hook stood for


def _shape_of(layer: nn.Module) -> tuple[int, int]:
    rows, columns = matrix_of(layer).shape
    return rows, columns
