"""Batches as transformers has them: mappings of arguments with an attention mask and labels, cut to what the mask keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["examples_of", "has_targets", "parts_of", "run_model"]

#: Entries from which a model of transformers computes its loss.
_TARGETS = frozenset({"labels", "start_positions"})

#: Entries with one element per token along the second axis.
_TOKENS = frozenset(
    {
        "attention_mask",
        "bbox",
        "global_attention_mask",
        "input_ids",
        "input_values",
        "inputs_embeds",
        "labels",
        "position_ids",
        "special_tokens_mask",
        "token_type_ids",
    }
)

#: The same for the decoder of a sequence-to-sequence model, whose labels belong to its decoder.
_DECODER_TOKENS = frozenset(
    {"decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds", "decoder_position_ids", "labels"}
)

#: Entries that hold the tokens themselves. A mask of others says nothing about rows of linear layers.
_INPUTS = frozenset({"input_ids", "inputs_embeds", "input_values"})

#: Entries that count tokens from the left, so that padding on the left cannot be cut.
_INDICES = frozenset({"start_positions", "end_positions", "mc_token_ids"})

#: Entries without an element per example, whatever their length is.
_NOT_BY_EXAMPLE = frozenset({"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask"})

#: Label that no loss of transformers counts.
_IGNORED = -100

#: Tokens of one example to keep: a start and a stop for the axis of ``attention_mask``, and for that of the decoder.
_Spans = tuple[tuple[int, int] | None, tuple[int, int] | None]


def has_targets(batch: Any) -> bool:
    """Return whether a model of transformers computes its own loss for a batch.

    Parameters
    ----------
    batch : object
        Any batch.

    Returns
    -------
    bool
        True for a mapping with labels, or with the positions of answers.
    """
    return isinstance(batch, Mapping) and not _TARGETS.isdisjoint(batch)


def run_model(model: nn.Module, batch: Any) -> Any:
    """Return the output of a model for a batch.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    batch : mapping or object
        Keyword arguments of the model, or its only argument.

    Returns
    -------
    object
        The output.
    """
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def examples_of(batch: Any) -> int:
    """Return the number of examples of a batch.

    Parameters
    ----------
    batch : mapping or object
        Batch as transformers has it, or a tensor with the examples along its first axis.

    Returns
    -------
    int
        The number. It is 1 if the batch does not say it.
    """
    if isinstance(batch, Mapping):
        return _count(batch, _mask(batch, "attention_mask"))
    return batch.shape[0] if isinstance(batch, torch.Tensor) and batch.ndim else 1


def parts_of(model: nn.Module, batch: Any, *, one_by_one: bool = False) -> Iterator[Any]:
    """Yield a batch in parts without padding, so that every row of every layer belongs to a token.

    A mask of tokens does not tell which rows of a layer to leave out, because layers may have the tokens on any axis, or
    only some of them. So padding is cut before the model runs. Examples with the same length are run together.

    Parameters
    ----------
    model : torch.nn.Module
        Model that will run the parts.
    batch : mapping or object
        Batch as transformers has it. Other objects have no mask, and are the only part.
    one_by_one : bool, default False
        Whether each part of a mapping is one example.

    Yields
    ------
    mapping or object
        The batch itself, if there is nothing to split.

    Raises
    ------
    InvalidArgumentError
        If the batch cannot be split without doubt about the axes of an entry, or if tokens between others are masked.
    """
    if not isinstance(batch, Mapping):
        yield batch
        return
    mask, decoder_mask = _mask(batch, "attention_mask"), _mask(batch, "decoder_attention_mask")
    in_decoder = decoder_mask is not None or "decoder_input_ids" in batch or _has_decoder(model)
    if decoder_mask is None and in_decoder:
        decoder_mask = _mask_of_labels(batch)
    count = _count(batch, mask)
    masks = (mask, decoder_mask)
    if all(own is None or bool(own.all()) for own in masks) and not (one_by_one and count > 1):
        yield batch
        return
    groups: dict[_Spans, list[int]] = {}
    spans = [_spans_of(batch, own, name, count) for own, name in zip(masks, ("attention_mask", "labels"), strict=True)]
    for example, own in enumerate(zip(*spans, strict=True)):
        groups.setdefault(own, []).append(example)
    axes = _axes(batch, masks, in_decoder=in_decoder)
    for own, examples in groups.items():
        for chosen in [[example] for example in examples] if one_by_one else [examples]:
            yield {name: _cut(name, value, chosen, count, own, axes.get(name)) for name, value in batch.items()}


def _mask(batch: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """Return where a mask of a batch keeps tokens, or None if there is no mask."""
    mask = batch.get(name)
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        seen = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InvalidArgumentError(
            f"{name} must be a tensor of shape (examples, tokens), got {seen}. Pass such a mask, or batches without padding."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InvalidArgumentError(
            f"{name} must hold 1 for tokens and 0 for padding, got other numbers. Pass a mask of tokens, not what is added to scores."
        )
    return (mask != 0).cpu()


def _mask_of_labels(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return where the labels of a decoder are before their padding, or None if they are not labels of tokens."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    # A decoder sees the tokens from left to right, so only labels after the last one that counts are padding.
    counts = (labels != _IGNORED).cpu().long()
    return counts.flip(1).cumsum(1).flip(1) > 0


def _has_decoder(model: nn.Module) -> bool:
    """Return whether a model of transformers has an encoder and a decoder."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return bool(next((getattr(own, "is_encoder_decoder", False) for own in configs if own is not None), False))


def _count(batch: Mapping[str, Any], mask: torch.Tensor | None) -> int:
    """Return the number of examples of a batch."""
    if mask is not None:
        return mask.shape[0]
    for name in ("labels", "start_positions", "input_ids", *batch):
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.ndim > 0 and name not in _NOT_BY_EXAMPLE:
            return value.shape[0]
    return 1


def _spans_of(
    batch: Mapping[str, Any], mask: torch.Tensor | None, name: str, count: int
) -> list[tuple[int, int] | None]:
    """Return the first token that a mask keeps of each example, and the one after the last."""
    if mask is None:
        return [None] * count
    name = "decoder_attention_mask" if name == "labels" and "decoder_attention_mask" in batch else name
    if mask.shape[0] != count:
        raise InvalidArgumentError(f"{name} must have {count} rows, one for each example, got {mask.shape[0]}.")
    spans: list[tuple[int, int] | None] = []
    for example, row in enumerate(mask):
        kept = row.nonzero()
        if not len(kept):
            raise InvalidArgumentError(f"{name} keeps no token of example {example}. Leave the example out.")
        start, stop = int(kept[0]), int(kept[-1]) + 1
        if stop - start != len(kept):
            raise InvalidArgumentError(
                f"{name} must keep tokens that follow each other, but in example {example} some between {start} and "
                f"{stop - 1} are left out. Cut them, or pass the parts as examples."
            )
        if start and not _INDICES.isdisjoint(batch):
            named = min(_INDICES & batch.keys())
            raise InvalidArgumentError(
                f"{named} counts padding on the left of example {example}, which is cut. Pad on the right."
            )
        spans.append((start, stop))
    return spans


def _axes(
    batch: Mapping[str, Any], masks: tuple[torch.Tensor | None, torch.Tensor | None], *, in_decoder: bool
) -> dict[str, int]:
    """Return which of the two axes of tokens an entry has as its second axis, by the names of entries."""
    names = (_TOKENS - {"labels"} if in_decoder else _TOKENS, _DECODER_TOKENS)
    found: dict[str, int] = {}
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            continue
        for axis, mask in enumerate(masks):
            if mask is None or value.shape[1] != mask.shape[1]:
                continue
            if name in names[axis]:
                # Labels of a class each are floating point, or there are as many as there are examples.
                if name != "labels" or not value.is_floating_point():
                    found[name] = axis
            elif not (name in names[1 - axis] or name in _NOT_BY_EXAMPLE or name == "labels" or bool(mask.all())):
                raise InvalidArgumentError(
                    f"batches have padding, and {name!r} of shape {tuple(value.shape)} may have an element per token or not. "
                    "Pass batches of sequences of the same length, without padding."
                )
    if masks[0] is not None and not bool(masks[0].all()) and not any(found.get(name) == 0 for name in _INPUTS):
        raise InvalidArgumentError(
            f"attention_mask must be that of one of {', '.join(sorted(_INPUTS))} of the same length, got "
            f"{', '.join(batch)}. Pass batches without padding."
        )
    return found


def _cut(name: str, value: Any, chosen: list[int], count: int, spans: _Spans, axis: int | None) -> Any:
    """Return the entry of a batch for some of its examples, without the padding of its tokens."""
    if isinstance(value, list | tuple) and len(value) == count:
        return [value[example] for example in chosen]
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in _NOT_BY_EXAMPLE:
        return value
    if count > 1 and (value.shape[0] not in {1, count} or (name == "position_ids" and value.ndim > 2)):
        raise InvalidArgumentError(
            f"batches must have their {count} examples on the first axis of every tensor, but {name!r} has shape "
            f"{tuple(value.shape)}. Pass batches of one example."
        )
    if value.shape[0] == count:
        value = value[chosen]
    span = None if axis is None else spans[axis]
    return value if span is None else value[:, span[0] : span[1]]
