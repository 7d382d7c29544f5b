"""Models of transformers whose layers are quantized: ``from_pretrained``, ``save_pretrained``, ``generate`` and ``Trainer``.

After :func:`register` the method ``from_pretrained`` of transformers loads the folders that :func:`lqlora.decompose_checkpoint`
writes, and those that ``save_pretrained`` writes of such a model.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from lqlora._annotations import annotated
from lqlora._optional import require
from lqlora._options import require_integer
from lqlora.decomposition import decompose
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat

if TYPE_CHECKING:
    from torch import nn

__all__ = ["mark_quantized", "quantize_on_load", "register"]


def register() -> None:
    """Teach transformers the method ``"lqlora"`` of quantization. Further calls do nothing.

    Raises
    ------
    MissingDependencyError
        If transformers is not installed.

    Notes
    -----
    transformers looks for methods of quantization in a registry of its own process, and has no way to find those of other packages. So
    this must be called before ``from_pretrained``.

    Layers are built without memory, and transformers fills them from the files as it fills all others: ``device_map`` works, and no
    dense weight is made. Codes and scales keep their dtypes whatever ``dtype`` says. Factors are in float32, because they train. No
    fingerprint is compared: :func:`lqlora.verify` does that.
    """
    require("transformers", "peft", "lqlora.integrations.transformers.register")
    from lqlora.integrations._transformers_quantizer import register_quantizer  # noqa: PLC0415 - imports transformers

    register_quantizer()


@annotated
def quantize_on_load(format: str, rank: int, **options: Any) -> Any:  # noqa: A002 - as in other functions for users
    """Return a configuration with which ``from_pretrained`` quantizes a dense model.

    Parameters
    ----------
    format : str
        Format of all linear layers that :func:`lqlora.nn.quantize_model` selects.
    rank : int
        Rank of the low-rank parts.
    **options
        Further options of :func:`lqlora.nn.quantize_model` that are text, numbers or lists of text, without ``dropout`` and
        ``embeddings``.

    Returns
    -------
    transformers.utils.quantization_config.QuantizationConfigMixin
        Value for the argument ``quantization_config`` of ``from_pretrained``.

    Notes
    -----
    The dense model is loaded first. :func:`lqlora.decompose_checkpoint` needs less memory.
    """
    register()
    from lqlora.integrations._transformers_quantizer import LqloraConfig  # noqa: PLC0415 - imports transformers
    from lqlora.nn import quantize_model  # noqa: PLC0415 - imports torch

    # What is wrong is said before the dense model is loaded.
    BlockFormat.parse(format)
    require_integer(rank, "rank")
    known = inspect.signature(quantize_model).parameters.keys() | inspect.signature(decompose).parameters.keys()
    for name in options:
        if name not in known or name in ("model", "formats", "dropout", "embeddings", "weighting", "executor"):
            raise InvalidArgumentError(
                f"{name} cannot be set for a model that is quantized on load. Use quantize_model."
            )
    return LqloraConfig(format=format, rank=rank, options=options)


@annotated
def mark_quantized(model: nn.Module) -> None:
    """Describe the quantized layers of a model in its configuration, so that ``save_pretrained`` writes a folder that can be loaded.

    Models that ``from_pretrained`` has loaded or quantized are described already, and once more when they are saved. Call this after
    :func:`lqlora.nn.quantize_model`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model with quantized layers.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, is not one of transformers, or has quantized embeddings, layers with dropout, layers of
        :class:`lqlora.nn.PEQALinear` or layers with adapters of PEFT, which such a folder does not describe.
    """
    register()
    from lqlora.integrations._transformers_quantizer import attach, quantized_modules  # noqa: PLC0415 - imports transformers

    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise InvalidArgumentError(f"model must be one of transformers, got {type(model).__name__}.")
    if not quantized_modules(model):
        raise InvalidArgumentError("model must have a quantized layer, got none. Call quantize_model first.")
    attach(model)
