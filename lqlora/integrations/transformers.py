"""Models of transformers whose layers are quantized: ``from_pretrained``, ``save_pretrained``, ``generate`` and ``Trainer``.

After :func:`register` the method ``from_pretrained`` of transformers loads the folders that :func:`lqlora.decompose_checkpoint`
writes, and those that ``save_pretrained`` writes of such a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lqlora._annotations import annotated
from lqlora._optional import require
from lqlora.errors import InvalidArgumentError

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
    dense weight is made. Codes and scales keep their dtypes whatever ``dtype`` says, and so do the factors, which train.
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
        Further options of :func:`lqlora.nn.quantize_model` that are text, numbers or lists of text.

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

    return LqloraConfig(format=format, rank=rank, options=options)


@annotated
def mark_quantized(model: nn.Module) -> None:
    """Describe the quantized layers of a model in its configuration, so that ``save_pretrained`` writes a folder that can be loaded.

    Models that ``from_pretrained`` has loaded or quantized are described already. Call this after :func:`lqlora.nn.quantize_model`,
    or when layers, ranks or scalings have changed.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model with quantized layers.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, is not one of transformers, or has quantized embeddings, layers with dropout or layers of
        :class:`lqlora.nn.PEQALinear`, which such a folder does not describe. :func:`lqlora.nn.save_model` stores them.
    """
    register()
    from lqlora.integrations._transformers_quantizer import attach  # noqa: PLC0415 - imports transformers
    from lqlora.nn import LQLinear  # noqa: PLC0415 - imports torch
    from lqlora.nn.model import QUANTIZED  # noqa: PLC0415

    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise InvalidArgumentError(f"model must be one of transformers, got {type(model).__name__}.")
    for name, own in model.named_modules():
        if isinstance(own, QUANTIZED) and not isinstance(own, LQLinear):
            raise InvalidArgumentError(
                f"model must have quantized layers of LQLinear only, but {name!r} is {type(own).__name__}."
            )
    attach(model)
