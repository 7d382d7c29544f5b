"""GGUF files of a tiny Llama model with a byte-level tokenizer, so that tests need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["HEADS", "KV_HEADS", "LAYERS", "permute", "quantized_name", "write_tiny_llama"]

LAYERS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, CONTEXT = 2, 32, 4, 2, 64, 128
MERGES = ["t h", "th e", "Ġ the", "i n", "a n", "Ġ a", "e r", "o n", "Ġ in", "an d"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

#: The one tensor that is written in Q8_0, by its name in transformers.
quantized_name = "model.layers.1.mlp.down_proj.weight"

_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    architecture: str = "llama",
    tied: bool = True,
    change: Callable[[dict[str, npt.NDArray[np.float32]]], object] | None = None,
    without: tuple[str, ...] = (),
    settings: Mapping[str, object] | None = None,
    tensors_per_part: int = 0,
) -> dict[str, npt.NDArray[np.float32]]:
    """Write a file, and return the weights that a reader must find, by their names in transformers.

    Parameters
    ----------
    path : Path
        File to write.
    seed : int
        Seed of the weights.
    architecture : str
        Architecture that the file names.
    tied : bool
        If false, the file has an output head beside the embedding.
    change : callable, optional
        Called with the weights before they are written, to change them.
    without : tuple of str
        Metadata keys to leave out.
    settings : mapping, optional
        Metadata to write instead of, or beside, that of the model: integers, floats, strings or lists by whole key.
    tensors_per_part : int
        If not 0, the model is written in parts of as many tensors: ``NAME-00001-of-0000N.gguf`` beside ``path``.
    """
    weights = _weights(seed, tied=tied)
    if change is not None:
        change(weights)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    _add_settings(writer, without)
    _add_tokenizer(writer)
    for key, value in (settings or {}).items():
        writer.kv_data[0].pop(key, None)
        add = {int: writer.add_int64, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, values in weights.items():
        _add_tensor(writer, name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: _as_stored(name, values) for name, values in weights.items()}


def permute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Order the rows of a query or key weight as llama.cpp's converter does."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _tokens() -> list[str]:
    return [*_byte_characters(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]


def _byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def _weights(seed: int, *, tied: bool) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    words, narrow = len(_tokens()), HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens": (words, HIDDEN), "model.norm": (HIDDEN,)}
    kinds = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes |= {f"model.layers.{i}.{kind}": shape for i in range(LAYERS) for kind, shape in kinds.items()}
    if not tied:
        shapes["lm_head"] = (words, HIDDEN)
    return {
        f"{name}.weight": (rng.standard_normal(shape) * (0.2 if len(shape) == 2 else 0.05) + (len(shape) == 1)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def _add_settings(writer: gguf.GGUFWriter, without: tuple[str, ...]) -> None:
    settings: Mapping[str, tuple[Callable[[str, object], None], object]] = {
        "embedding_length": (writer.add_uint32, HIDDEN),
        "feed_forward_length": (writer.add_uint32, INTERMEDIATE),
        "block_count": (writer.add_uint32, LAYERS),
        "context_length": (writer.add_uint32, CONTEXT),
        "attention.head_count": (writer.add_uint32, HEADS),
        "attention.head_count_kv": (writer.add_uint32, KV_HEADS),
        "attention.layer_norm_rms_epsilon": (writer.add_float32, 1e-5),
        "rope.freq_base": (writer.add_float32, 10000.0),
        "vocab_size": (writer.add_uint32, len(_tokens())),
    }
    for key, (add, value) in settings.items():
        if key not in without:
            add(f"llama.{key}", value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = _tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(tokens.index(SPECIAL[1]))
    writer.add_eos_token_id(tokens.index(SPECIAL[2]))
    writer.add_unk_token_id(tokens.index(SPECIAL[0]))


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float32]) -> None:
    stored = values
    for kind, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
        if f".{kind}." in name:
            stored = permute(values, heads)
    if name == quantized_name:
        packed = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(stored))


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, end = name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{end}"
    if not stem.startswith("model.layers."):
        return name
    _, _, layer, *module = stem.split(".")
    kind = ".".join(module)
    return f"blk.{layer}.{_MODULES.get(kind, kind)}.{end}"


def _as_stored(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if name != quantized_name:
        return values
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
