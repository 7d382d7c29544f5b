"""Causal language models with their tokenizers: from GGUF files, and from folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqlora._annotations import annotated
from lqlora._messages import shortened
from lqlora._optional import require
from lqlora._patterns import list_names
from lqlora.checkpoint.quantization_config import METHOD
from lqlora.errors import CheckpointError
from lqlora.integrations.gguf import load_llama
from lqlora.integrations.transformers import register

if TYPE_CHECKING:
    import os

__all__ = ["load_language_model", "load_tokenizer"]


@annotated
def load_language_model(path: str | os.PathLike[str], *, may_be_quantized: bool = False) -> tuple[Any, Any]:
    """Read a causal language model and its tokenizer. Nothing is downloaded.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``, or a folder that ``save_pretrained`` of transformers wrote, with the files of the tokenizer.
    may_be_quantized : bool, default False
        Also take a folder of a model that this library has quantized, such as one of :func:`lqlora.decompose_checkpoint`.

    Returns
    -------
    model : torch.nn.Module
        Model in evaluation mode and float32.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.

    Raises
    ------
    CheckpointError
        If the file or folder is missing or invalid, or holds a model that is quantized already.
    MissingDependencyError
        If gguf, torch or transformers is not installed.
    """
    folder = Path(path)
    try:
        is_folder = folder.is_dir()
    except ValueError:  # a zero byte, which the reader of files will say
        is_folder = False
    if not is_folder:
        return load_llama(path)
    transformers = require("transformers", "demo", "Reading language models")
    torch = require("torch", "demo", "Reading language models")
    try:
        _, is_ours = _config_of(folder, may_be_quantized=may_be_quantized)
        if is_ours:
            register()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **({"dtype": torch.float32} if is_ours else {})
        )
        if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
            raise CheckpointError(
                shortened(
                    f"{folder} must hold all weights of a causal language model, but {list_names(missing)} are missing."
                )
            )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises errors of many kinds for files that it cannot read
        raise CheckpointError(shortened(f"{folder} cannot be read as a causal language model: {error}.")) from error
    return (model if is_ours else model.float()).eval(), tokenizer


def _config_of(folder: Path, *, may_be_quantized: bool) -> tuple[Any, bool]:
    """Return the configuration of a model, and whether this library has quantized it."""
    config = require("transformers", "demo", "Reading language models").AutoConfig.from_pretrained(
        folder, local_files_only=True
    )
    quantization = getattr(config, "quantization_config", None)
    is_ours = may_be_quantized and isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    if quantization is not None and not is_ours:
        raise CheckpointError(f"{folder} holds a model that is quantized already. Name a folder of the dense model.")
    return config, is_ours


@annotated
def load_tokenizer(path: str | os.PathLike[str]) -> tuple[Any, int | None, int]:
    """Read the tokenizer of a causal language model, and how many positions and tokens the model has. Nothing is downloaded.

    Parameters
    ----------
    path : path-like
        See :func:`load_language_model`. The weights of a folder are not read.

    Returns
    -------
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer.
    positions : int or None
        Largest number of tokens of a sequence, if the configuration says it.
    tokens : int
        Number of tokens that the model has embeddings of.

    Raises
    ------
    CheckpointError
        If the file or folder is missing or invalid.
    MissingDependencyError
        If gguf, torch or transformers is not installed.
    """
    transformers = require("transformers", "demo", "Reading language models")
    try:
        is_folder = Path(path).is_dir()
    except ValueError:  # a zero byte, which the reader of files will say
        is_folder = False
    if is_folder:
        try:
            config = _config_of(Path(path), may_be_quantized=False)[0].get_text_config()
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # as above
            raise CheckpointError(shortened(f"{path} cannot be read as a causal language model: {error}.")) from error
    else:
        model, tokenizer = load_llama(path)
        config = model.config
    return tokenizer, getattr(config, "max_position_embeddings", None), config.vocab_size
