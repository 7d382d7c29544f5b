"""Experts that files have one by one, each with several matrices, and that models of transformers 5 have in arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ExpertRows", "find_rows", "renamings"]


class ExpertRows(NamedTuple):
    """Rows of an array of experts that are a matrix of the files.

    Parameters
    ----------
    array : str
        Name of the array in the model.
    expert : int
        Index along its first axis.
    part, parts : int
        Index and number of equal parts of the rows.
    """

    array: str
    expert: int
    part: int
    parts: int


def renamings(model: Any) -> list[Any]:
    """Return the renamings of tensors with which transformers reads the files of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.

    Returns
    -------
    list of WeightRenaming
        None with transformers 4.
    """
    return _conversions(model)[0]


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """Return renamings and converters of transformers."""
    try:
        from transformers import conversion_mapping, core_model_loading  # noqa: PLC0415 - not in transformers 4
    except ImportError:
        return [], []
    known = conversion_mapping.get_model_conversion_mapping(model)
    return (
        [own for own in known if isinstance(own, core_model_loading.WeightRenaming)],
        [own for own in known if isinstance(own, core_model_loading.WeightConverter)],
    )


def find_rows(model: Any, names: Iterable[str]) -> dict[str, ExpertRows]:
    """Return the matrices that are rows of an array of experts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, of which values are not looked at.
    names : iterable of str
        Names of tensors in files, such as ``"model.layers.0.mlp.experts.3.up_proj.weight"``.

    Returns
    -------
    dict of str to ExpertRows
        Rows by name of the tensor. Other tensors are not among them, and neither are those that transformers changes in other ways
        than to put them one below another.
    """
    renames, converters = _conversions(model)
    simple = {
        pattern: own
        for own in converters
        if _is_stack_of_rows(own.operations, len(own.source_patterns)) and len(own.target_patterns) == 1
        for pattern in own.source_patterns
    }
    if not simple:
        return {}
    from transformers.core_model_loading import rename_source_key  # noqa: PLC0415 - of transformers 5

    prefix, state, found = model.base_model_prefix, model.state_dict(), {}
    for name in names:
        array, pattern = rename_source_key(name, renames, converters, prefix, state)
        numbers = [part for part in name.split(".") if part.isdigit()]
        if pattern in simple and array in state and numbers:
            sources = simple[pattern].source_patterns
            found[name] = ExpertRows(array, int(numbers[-1]), sources.index(pattern), len(sources))
    return found


def _is_stack_of_rows(operations: list[Any], sources: int) -> bool:
    """Return whether a converter stacks experts along the first axis, and what has a pattern of its own along the second one."""
    steps = [(type(own).__name__, getattr(own, "dim", None)) for own in operations]
    return steps == [("MergeModulelist", 0), ("Concatenate", 1)][: 1 if sources == 1 else 2]
