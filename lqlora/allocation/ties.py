"""Matrices that must be stored alike, because a serving engine fuses them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lqlora.allocation._names import Names
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from lqlora._patterns import Pattern

__all__ = ["Tie", "experts", "fused_projections"]

#: Names or patterns, all of whose matrices are stored alike; or one pattern: see :func:`lqlora.allocate`.
Tie: TypeAlias = "Pattern | Iterable[Pattern]"

#: The last part of the names of matrices that engines keep as one, in the naming of Hugging Face, Meta, GGUF and BERT.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("attn_q", "attn_k", "attn_v"),
    ("ffn_gate", "ffn_up"),
    ("query", "key", "value"),
)


def fused_projections(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Tie the matrices that serving engines keep as one: query, key and value; gate and up.

    Parameters
    ----------
    names : iterable of str
        Names of matrices, such as ``table.names``; a last part ``"weight"`` does not matter.

    Returns
    -------
    list of tuple of str
        Groups of two or more, in the order of the names: the ``ties`` of :func:`lqlora.allocate`.

    Raises
    ------
    InvalidArgumentError
        If there are none.

    Examples
    --------
    >>> fused_projections(["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.o_proj", "1.self_attn.q_proj"])
    [('0.self_attn.q_proj', '0.self_attn.k_proj')]
    """
    groups: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        before, _, last = name.removesuffix(".weight").rpartition(".")
        for number, family in enumerate(_FUSED):
            if last in family:
                groups[before, number].append(name)
    return _several(groups.values(), "projections that are fused, such as q_proj and k_proj")


def experts(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Tie all matrices of all experts of a layer, which kernels for mixtures of experts run as one.

    Parameters
    ----------
    names : iterable of str
        Names of matrices, such as ``table.names``. Experts are what has a part ``"experts"`` with a number after it.

    Returns
    -------
    list of tuple of str
        Groups of two or more, in the order of the names: the ``ties`` of :func:`lqlora.allocate`.

    Raises
    ------
    InvalidArgumentError
        If there are none.

    Examples
    --------
    >>> experts(["0.mlp.experts.0.up_proj", "0.mlp.experts.1.up_proj", "0.mlp.shared_expert.up_proj"])
    [('0.mlp.experts.0.up_proj', '0.mlp.experts.1.up_proj')]
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if found := re.fullmatch(r"((?:.*\.)?experts)\.\d+\..*", name):
            groups[found[1]].append(name)
    return _several(groups.values(), "experts")


def _several(groups: Iterable[list[str]], what: str) -> list[tuple[str, ...]]:
    found = [tuple(group) for group in groups if len(group) > 1]
    if not found:
        raise InvalidArgumentError(f"Among the names there are no two {what}.")
    return found


def tie_groups(names: Sequence[str], ties: Iterable[Tie]) -> npt.NDArray[np.int64]:
    r"""Return a group number for each name; overlapping ties merge.

    Parameters
    ----------
    names : sequence of str
        Names of matrices.
    ties : iterable of ties
        See :func:`lqlora.allocate`.

    Returns
    -------
    ndarray of int64, shape (n,)
        Names with equal numbers are tied.

    Raises
    ------
    InvalidArgumentError
        If a pattern matches no name, or a tie that is one pattern joins no two.

    Examples
    --------
    >>> tie_groups(["0.q", "0.k", "1.q", "1.k"], [re.compile(r"(\d)\.[qk]")]).tolist()
    [0, 0, 2, 2]
    """
    known = Names(names)
    leader = list(range(len(names)))
    for tie in ties:
        for members in _members(names, known, tie):
            leaders = sorted({_find(leader, row) for row in members})
            for other in leaders[1:]:
                leader[other] = leaders[0]
    return np.array([_find(leader, row) for row in range(len(names))])


def _find(leader: list[int], row: int) -> int:
    """Follow the leaders of a row to the first of its group, and shorten the way."""
    while leader[row] != row:
        leader[row] = leader[leader[row]]
        row = leader[row]
    return row


def _members(names: Sequence[str], known: Names, tie: Tie) -> list[list[int]]:
    if isinstance(tie, Iterable) and not isinstance(tie, str):
        return [known.rows(tie)]
    groups: defaultdict[tuple[str | None, ...], list[int]] = defaultdict(list)
    for row in known.rows(tie):
        found = tie.fullmatch(names[row]) if isinstance(tie, re.Pattern) else None
        groups[found.groups() if found else ()].append(row)
    if max(map(len, groups.values())) < 2:
        raise InvalidArgumentError(f"The tie {tie!r} joins no two matrices.")
    return [*groups.values()]
