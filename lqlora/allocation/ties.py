"""Ties: matrices that take one format and rank, such as those that a serving engine fuses, found by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._patterns import NameIndex, Pattern

__all__ = ["Tie", "experts", "fused_projections"]

#: Several names or patterns whose matrices are one group, or one pattern: see :func:`lqlora.allocate`.
Tie: TypeAlias = "Pattern | Iterable[Pattern]"

#: Last parts of the names of matrices that engines fuse, as Hugging Face, Meta, GGUF and BERT name them.
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
    """Return ties of the projections that serving engines fuse: query, key and value; gate and up.

    Parameters
    ----------
    names : iterable of str
        Names of matrices, such as ``table.names``. A last part ``"weight"`` is ignored.

    Returns
    -------
    list of tuple of str
        Groups of two or more, in the order of the names: the ``ties`` of :func:`lqlora.allocate`.

    Raises
    ------
    InvalidArgumentError
        If no two names belong together.

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
    """Return ties of all matrices of all experts of a layer, which kernels for mixtures of experts run as one.

    Parameters
    ----------
    names : iterable of str
        Names of matrices, such as ``table.names``. A matrix of an expert has a part ``"experts"`` with a number after it.

    Returns
    -------
    list of tuple of str
        Groups of two or more, in the order of the names: the ``ties`` of :func:`lqlora.allocate`.

    Raises
    ------
    InvalidArgumentError
        If no two names belong together.

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
    """Return the groups of at least two names; raise if there are none."""
    found = [tuple(group) for group in groups if len(group) > 1]
    if not found:
        raise InvalidArgumentError(f"names must contain at least two {what} of one layer, but every layer has fewer.")
    return found


def tie_groups(index: NameIndex, ties: Iterable[Tie]) -> npt.NDArray[np.int64]:
    r"""Return a group number for each name. Overlapping ties merge.

    Parameters
    ----------
    index : NameIndex
        Names of matrices.
    ties : iterable of ties
        See :func:`lqlora.allocate`.

    Returns
    -------
    ndarray of int64, shape (n,)
        Names with equal numbers are tied. The number is the first row of the group.

    Raises
    ------
    InvalidArgumentError
        If a pattern matches no name, or a tie that is one pattern joins no two names.

    Examples
    --------
    >>> from lqlora._patterns import NameIndex
    >>> tie_groups(NameIndex(["0.q", "0.k", "1.q", "1.k"]), [re.compile(r"(\d)\.[qk]")]).tolist()
    [0, 0, 2, 2]
    """
    # Union-find: each row points to an earlier row of its group or to itself, so that the root is the first row.
    leader = list(range(len(index.names)))
    joined: set[int] = set()
    for tie in ties:
        for members in _members(index, tie):
            roots = sorted({_root(leader, row) for row in members})
            for other in roots[1:]:
                leader[other] = roots[0]
            joined.update(members)
    groups = np.arange(len(leader))
    for row in joined:
        groups[row] = _root(leader, row)
    return groups


def _root(leader: list[int], row: int) -> int:
    """Return the root of a row's group, the first row in it (union-find with path halving)."""
    while leader[row] != row:
        leader[row] = leader[leader[row]]
        row = leader[row]
    return row


def _members(index: NameIndex, tie: Tie) -> list[list[int]]:
    """Return the groups of rows that a tie joins: one, or several if it is a regular expression with groups."""
    if isinstance(tie, Iterable) and not isinstance(tie, str):
        return [index.rows(tie, parameter="ties")]
    # Rows are keyed by the text that each group of the expression matched. Without groups the key is () for all rows.
    groups: defaultdict[tuple[str | None, ...], list[int]] = defaultdict(list)
    for row in index.rows(tie, parameter="ties"):
        found = tie.fullmatch(index.names[row]) if isinstance(tie, re.Pattern) else None
        groups[found.groups() if found else ()].append(row)
    if max(map(len, groups.values())) < 2:
        raise InvalidArgumentError(f"ties must join at least two matrices, but {tie!r} does not join any.")
    return [*groups.values()]
