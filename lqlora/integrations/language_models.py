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
from lqlora.integrations._quiet import without_bars
from lqlora.integrations.gguf import load_llama
from lqlora.integrations.transformers import register

if TYPE_CHECKING:
    import os

__all__ = ["load_causal_model", "load_language_model", "load_tokenizer"]


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
    if not _is_folder(path):
        return load_llama(path)
    model = load_causal_model(Path(path), may_be_quantized=may_be_quantized)
    return model, _tokenizer_of(Path(path))


def load_causal_model(folder: Path, *, may_be_quantized: bool = False) -> Any:
    """Read a causal language model without its tokenizer.

    Parameters
    ----------
    folder : Path
        Folder that ``save_pretrained`` of transformers wrote.
    may_be_quantized : bool, default False
        See :func:`load_language_model`.

    Returns
    -------
    torch.nn.Module
        Model in evaluation mode and float32.

    Raises
    ------
    CheckpointError
        If the folder is invalid, or holds a model that is quantized already.
    MissingDependencyError
        If torch or transformers is not installed.
    """
    transformers = require("transformers", "demo", "Reading language models")
    torch = require("torch", "demo", "Reading language models")
    try:
        _, is_ours = _config_of(folder, may_be_quantized=may_be_quantized)
        if is_ours:
            register()
        with without_bars():
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
    return (model if is_ours else model.float()).eval()


def _is_folder(path: str | os.PathLike[str]) -> bool:
    try:
        return Path(path).is_dir()
    except ValueError:  # a zero byte, which the reader of files will say
        return False


def _tokenizer_of(folder: Path) -> Any:
    """Read the tokenizer of a folder."""
    try:
        return require("transformers", "demo", "Reading language models").AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # as above
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(shortened(f"{folder} has no tokenizer that can be read: {reason}.")) from error


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
    if _is_folder(path):
        try:
            config = _config_of(Path(path), may_be_quantized=False)[0].get_text_config()
        except CheckpointError:
            raise
        except Exception as error:  # as above
            raise CheckpointError(shortened(f"{path} cannot be read as a causal language model: {error}.")) from error
        tokenizer = _tokenizer_of(Path(path))
    else:
        model, tokenizer = load_llama(path)
        config = model.config
    return tokenizer, getattr(config, "max_position_embeddings", None), config.vocab_size
