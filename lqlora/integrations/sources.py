"""Matrices of a model file (GGUF, safetensors, or a folder of safetensors) by name, each read when it is needed."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._annotations import annotated
from lqlora._documents import Reader, key_step
from lqlora._messages import about_file, shown
from lqlora._patterns import DENSE_BY_NAME
from lqlora.errors import CheckpointError, LQLoRAError
from lqlora.integrations._coded_sources import find_coded_tensors
from lqlora.integrations._parts import all_parts, number_and_count
from lqlora.integrations._schema import Index
from lqlora.integrations._tensor_files import FoundTensor, TensorPart, of_dimensions, read_as_stored, read_header
from lqlora.integrations.contents import LeftOut, ModelContents, SourceTensor
from lqlora.integrations.gguf import open_llama

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    import numpy.typing as npt

    from lqlora._patterns import Patterns

__all__ = ["open_model", "open_weights"]

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_MOST_INDEX_BYTES = 2**27

_CONFIG = "config.json"
_MOST_CONFIG_BYTES = 2**24

_OF_ADAPTER = "of an adapter"

#: Names of NumPy for dtypes of safetensors.
_DTYPES = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
}

#: Arrays of experts, one matrix for each.
_STACK = re.compile(r"(?:.*\.)?experts\.[^.]+(?:\.weight)?", re.DOTALL)

#: Tensors that store matrices of shape (inputs, outputs), by the ``model_type`` of transformers: layers of class ``Conv1D``, and
#: experts that multiply from the other side.
_CONV1D = re.compile(r"(?:.*\.)?(?:c_attn|q_attn|c_proj|c_fc)\.weight", re.DOTALL)
_TRANSPOSED = dict.fromkeys(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"), _CONV1D) | dict.fromkeys(
    ("gpt_oss", "llama4", "llama4_text", "aria_text", "openai_privacy_filter"), _STACK
)

#: Last parts of the names of codes and scales: float8, compressed-tensors, GPTQ and AWQ, EXL2, HQQ, bitsandbytes int8,
#: Quanto.
_CODED = re.compile(
    r"(?:.*\.)?(?:weight_scale(?:_inv|_2|s)?|weight_packed|weight_zero_point|qweight|qzeros|g_idx|q_weight|q_scale|W_q|SCB"
    r"|_data)",
    re.DOTALL,
)

#: Low-rank factors of an adapter, as PEFT and Diffusers call them.
_FACTOR = re.compile(
    r"(?:.*[._])?lora(?:_linear_layer)?[._](?:A|B|embedding_A|embedding_B|up|down)(?:\..*)?", re.DOTALL
)


@annotated
def open_weights(
    path: str | os.PathLike[str], include: Patterns = "*", exclude: Patterns = DENSE_BY_NAME
) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
    """Return a loader for each matrix of a model file, the input of :func:`lqlora.cost_table`.

    Only the headers of the files are read at once. The memory needed is that of the matrices that the caller keeps.
    Tensors that are not matrices, such as biases, are left out; :func:`open_model` lists them.

    Parameters
    ----------
    path : path-like
        See :func:`open_model`.
    include, exclude : str, compiled regular expression, callable, or several of them
        Names or their ends (``"q_proj"``), shell patterns (``"*.attn.*"``), expressions that match the whole name, or
        functions of the name. A matrix is selected if one of ``include`` matches its name and none of ``exclude`` does.
        The default leaves out embeddings, output heads and routers of experts.

    Returns
    -------
    dict of str to callable
        Loaders by name, in the order of the files. Each loader reads one matrix as float32, and can be pickled.

    Raises
    ------
    CheckpointError
        If :func:`open_model` raises it.
    InvalidArgumentError
        If no matrix is selected.
    MissingDependencyError
        If a GGUF file is given and gguf is not installed.
    """
    return open_model(path).select(include, exclude)


@annotated
def open_model(path: str | os.PathLike[str]) -> ModelContents:
    """Return the weight matrices of a model file, and a list of what is left out.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``, safetensors file, or folder of safetensors files. It may be any part of a
        model in parts, such as ``model-00001-of-00002.safetensors``: all parts are read. In a folder the files are those
        that ``model.safetensors.index.json`` lists, else ``model.safetensors``, else every ``.safetensors`` file but
        adapters, and ``consolidated`` copies beside other files.

    Returns
    -------
    ModelContents
        A weight is a two-dimensional tensor of floating-point numbers, one matrix of an array of experts, or a weight that is decoded: of
        4 bits in the layout of bitsandbytes, of GPTQ (which ``config.json`` must say), packed by compressed-tensors, or of float8 numbers
        with one scale, or one for each row or block. Low-rank factors of adapters are left out. Its name is that of the tensor without
        ``.weight``; for an expert with its number at the end, as in ``"mlp.experts.down_proj.0"``. Its shape is (outputs, inputs):
        what models of transformers store the other way round, as GPT-2 does, is transposed. A ``config.json`` beside the file says
        so.

    Raises
    ------
    CheckpointError
        If a file or a part is missing or cannot be read, two matrices have one name, there is no matrix, or the weights
        are quantized in another way: AWQ, 4-bit floats, or by :func:`lqlora.save`.
    MissingDependencyError
        If a GGUF file is given and gguf is not installed.
    """
    path = Path(path)
    try:
        contents = open_llama(path) if path.suffix == ".gguf" else _open_safetensors(path)
    except (OSError, ValueError) as error:  # a path that the system refuses, such as one with a name that is too long
        if isinstance(error, LQLoRAError):
            raise
        raise CheckpointError(about_file(path, f"cannot be read: {error}.")) from error
    if not contents.weights:
        raise CheckpointError(about_file(path, f"has no weight matrix. {contents.describe_left_out()}".strip()))
    return contents


def _open_safetensors(path: Path) -> ModelContents:
    files, listed = _files_of(path)
    parts, left_out = _tensors_of(path, files, listed)
    config = _configuration(files[0].parent)
    turned = _transposed_names(config)
    coded = find_coded_tensors(path, parts, config, turned)
    weights: dict[str, Callable[[], npt.NDArray[np.float32]]] = {}
    tensors: dict[str, SourceTensor] = {}
    for name in parts:
        if name in coded.parts:
            continue
        own = coded.tensors[name] if name in coded.tensors else _plain_tensor(name, parts[name], is_turned=turned(name))
        if own.reason:
            left_out[own.name] = LeftOut(own.reason, own.tensor.nbytes)
        if own.reason != _OF_ADAPTER:
            tensors[own.name] = own.tensor
        for matrix, load in own.loaders.items():
            if matrix in weights:
                raise CheckpointError(
                    about_file(path, f"has two matrices called {shown(matrix)}. Keep the files of one model in it.")
                )
            weights[matrix] = load
    unread = set(_files_in(path)) - set(files) if path.is_dir() else set()
    return ModelContents(path, weights, left_out, tuple(files), tuple(sorted(unread)), tensors)


def _plain_tensor(name: str, part: TensorPart, *, is_turned: bool) -> FoundTensor:
    """Describe a tensor that is stored as it is."""
    _refuse_codes(name, part)
    reason, is_turned = _reason_to_leave_out(name, part), is_turned and not name.endswith("_bias")
    loaders = {} if reason else _matrices_of(name, part, is_transposed=is_turned)
    dtype, load = _DTYPES.get(part.dtype, part.dtype), functools.partial(read_as_stored, part.file, name)
    tensor = SourceTensor(part.shape, dtype, part.nbytes, load, tuple(loaders), is_turned and bool(loaders))
    return FoundTensor(name, tensor, loaders, reason)


def _matrices_of(
    name: str, part: TensorPart, *, is_transposed: bool
) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
    """Return the loaders of the weight matrices of a tensor, of shape (outputs, inputs)."""
    own = name.removesuffix(".weight")
    if len(part.shape) == 2:
        return {own: functools.partial(_read, part.file, name, is_transposed=is_transposed)}
    return {
        f"{own}.{index}": functools.partial(_read, part.file, name, index, is_transposed=is_transposed)
        for index in range(part.shape[0])
    }


def _configuration(folder: Path) -> dict[str, Any]:
    """Return the configuration of transformers, which says what the tensors mean; an empty one if there is none."""
    try:
        text = (folder / _CONFIG).read_bytes() if (folder / _CONFIG).stat().st_size <= _MOST_CONFIG_BYTES else b"{}"
        found = json.loads(text)
    except (OSError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _transposed_names(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a function that tells of the name of a tensor whether its matrices have the shape (inputs, outputs)."""
    # Without a configuration, matrices are taken as they are.
    patterns = {_TRANSPOSED[kind] for kind in _model_types(config) & _TRANSPOSED.keys()}
    return lambda name: any(pattern.fullmatch(name) for pattern in patterns)


def _model_types(config: object) -> set[str]:
    """Return the types of a model and of the models in it, such as the decoder of an encoder and decoder."""
    if not isinstance(config, dict):
        return set()
    own = config.get("model_type")
    return ({own} if isinstance(own, str) else set()).union(*map(_model_types, config.values()))


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _files_of(path: Path) -> tuple[list[Path], Mapping[str, Path] | None]:
    """Return the files of a model, and the file of each tensor where an index says it."""
    if not path.is_dir():
        return _with_all_parts([path]), None
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if index := next((file for file in indexes if file.name == _INDEX), indexes[0] if len(indexes) == 1 else None):
        listed = _read_index(index)
        return list(dict.fromkeys(listed.values())), listed
    if indexes:
        raise CheckpointError(
            about_file(path, f"has {len(indexes)} indexes, but no {_INDEX}. Keep the files of one model in it.")
        )
    found = _files_in(path)
    if not found:
        raise CheckpointError(about_file(path, "has no .safetensors file."))
    models = [file for file in found if not file.name.startswith("adapter_model")] or found
    if whole := [file for file in models if file.name == "model.safetensors"]:
        return whole, None
    # Some models are published twice, in the names of transformers and, as `consolidated`, in those of their authors.
    others = [file for file in models if not file.name.startswith("consolidated")]
    return _with_all_parts(others or models), None


def _with_all_parts(files: list[Path]) -> list[Path]:
    """Return the files and the parts that belong to them, in order; raise if a part is missing."""
    found: dict[Path, None] = {}
    for file in files:
        if file not in found:
            number, count = number_and_count(file) or (1, 1)
            found |= dict.fromkeys(all_parts(file) if 1 <= number <= count else [file])
    return list(found)


def _read_index(path: Path) -> dict[str, Path]:
    """Return the file of each tensor; the files exist."""
    if not path.is_file() or path.stat().st_size > _MOST_INDEX_BYTES:
        raise CheckpointError(about_file(path, f"must be a file of at most {_MOST_INDEX_BYTES} bytes to be an index."))
    reader = Reader(str(path), CheckpointError)
    files = reader.read(path.read_bytes(), Index).weight_map
    for tensor, name in files.items():
        # A path would let an index read files elsewhere.
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise reader.fault(
                f"weight_map{key_step(tensor)}", f"must be a .safetensors file of the folder, got {shown(name)}."
            )
    for name in dict.fromkeys(files.values()):
        if not path.with_name(name).exists():
            raise CheckpointError(about_file(path, f"lists the file {shown(name)}, which is missing."))
    return {tensor: path.with_name(name) for tensor, name in files.items()}


def _tensors_of(
    path: Path, files: Iterable[Path], listed: Mapping[str, Path] | None
) -> tuple[dict[str, TensorPart], dict[str, LeftOut]]:
    """Return the tensors of all files by name, and those that the index does not list; only headers are read."""
    found: dict[str, TensorPart] = {}
    left_out: dict[str, LeftOut] = {}
    for file in files:
        for name, part in read_header(file):
            if listed is not None and listed.get(name) != file:
                left_out.setdefault(name, LeftOut("not listed in the index", part.nbytes))
            elif name in found:
                raise CheckpointError(
                    about_file(path, f"has two tensors called {shown(name)}. Keep the files of one model in it.")
                )
            else:
                found[name] = part
    if missing := next((name for name in listed or () if name not in found), None):
        assert listed is not None
        raise CheckpointError(about_file(listed[missing], f"lacks the tensor {shown(missing)}, which the index lists."))
    return found, {name: reason for name, reason in left_out.items() if name not in found}


def _refuse_codes(name: str, part: TensorPart) -> None:
    """Raise if a tensor shows that weights are stored as codes and scales."""
    # Their scales are matrices of floating-point numbers, and would be taken for weights.
    is_weight = (name == "weight" or name.endswith((".weight", "_blocks"))) and len(part.shape) > 1
    is_coded = is_weight and part.dtype not in _FLOATS
    if name.endswith(".quantized.codes"):
        raise CheckpointError(
            about_file(
                part.file,
                f"is of a model that lqlora has quantized ({shown(name)}). Read its folder with lqlora.load, or merge it first.",
            )
        )
    if _CODED.fullmatch(name) or is_coded or part.dtype.startswith(("F8_", "F6_", "F4")):
        raise CheckpointError(
            about_file(
                part.file,
                f"holds quantized weights in a layout that is not read ({shown(name)} of dtype {part.dtype}). Decode the model "
                "to bfloat16 first.",
            )
        )


def _reason_to_leave_out(name: str, part: TensorPart) -> str:
    """Return why a tensor holds no weight matrices, or nothing if it does."""
    if part.dtype not in _FLOATS:
        return f"of dtype {part.dtype}"
    if _FACTOR.fullmatch(name):
        return _OF_ADAPTER
    is_stack = len(part.shape) == 3 and _STACK.fullmatch(name) is not None
    return "" if len(part.shape) == 2 or is_stack else of_dimensions(part.shape)


def _read(path: Path, name: str, index: int | None = None, *, is_transposed: bool = False) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # whoever uses the values refuses infinity
        found = read_as_stored(path, name, index).astype(np.float32)
    return np.ascontiguousarray(found.T) if is_transposed else found
