"""Ties between matrices, from lists and patterns, and those that serving engines need."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora._patterns import NameIndex
from lqlora.allocation.ties import tie_groups
from lqlora.errors import InvalidArgumentError

LLAMA = [
    f"model.layers.{layer}.{part}_proj"
    for layer in range(2)
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def _groups(names, ties):
    """Return the groups of two or more, as sets of names."""
    found = {}
    for name, group in zip(names, tie_groups(NameIndex(names), ties).tolist(), strict=True):
        found.setdefault(group, set()).add(name)
    return [members for members in found.values() if len(members) > 1]


def test_a_list_is_one_tie():
    assert _groups(LLAMA, [LLAMA[:2]]) == [set(LLAMA[:2])]
    assert _groups(LLAMA, [["*.o_proj", LLAMA[0]]]) == [{LLAMA[0], LLAMA[3], LLAMA[10]}]
    assert _groups(LLAMA, [(re.compile(r".*\.(\d)\..*"),)]) == [set(LLAMA)]


def test_a_pattern_without_groups_is_one_tie():
    for pattern in ("*.o_proj", re.compile(r".*o_proj"), lambda name: name.endswith(".o_proj")):
        assert _groups(LLAMA, [pattern]) == [{LLAMA[3], LLAMA[10]}]


def test_the_groups_of_an_expression_tell_its_ties_apart():
    assert _groups(LLAMA, [re.compile(r"(.*)\.(?:gate|up)_proj")]) == [set(LLAMA[4:6]), set(LLAMA[11:13])]
    assert _groups(LLAMA, [re.compile(r".*\.(\d)\.mlp\.(?:(gate)|up|down)_proj")]) == [
        set(LLAMA[5:7]),
        set(LLAMA[12:14]),
    ]


@pytest.mark.parametrize("tie", ["*.0.self_attn.q_proj", re.compile(r"(.*)\.q_proj"), lambda name: name == LLAMA[0]])
def test_a_pattern_that_joins_no_two_matrices_is_refused(tie):
    with pytest.raises(InvalidArgumentError, match=r"^ties .*does not join"):
        tie_groups(NameIndex(LLAMA), [tie])


def test_lists_of_one_name_or_of_none_tie_nothing():
    assert _groups(LLAMA, [[LLAMA[0]], []]) == []


@given(st.lists(st.lists(st.integers(0, 7), max_size=4), max_size=5))
def test_ties_that_overlap_merge(ties):
    names = [f"m{i}" for i in range(8)]
    groups = tie_groups(NameIndex(names), [[names[i] for i in tie] for tie in ties]).tolist()
    # Transitive closure: groups that overlap are merged until none do.
    together = {frozenset([i]) for i in range(8)}
    for tie in ties:
        touched = {members for members in together if members & set(tie)}
        together = (together - touched) | ({frozenset().union(*touched)} if touched else set())
    assert groups == [min(next(members for members in together if i in members)) for i in range(8)]


class TestFusedProjections:
    def test_query_key_and_value_are_one_and_gate_and_up_another(self):
        expected = [tuple(LLAMA[i:j]) for i, j in ((0, 3), (4, 6), (7, 10), (11, 13))]
        assert lq.ties.fused_projections(LLAMA) == expected
        assert lq.ties.fused_projections(f"{name}.weight" for name in LLAMA) == [
            tuple(f"{name}.weight" for name in tie) for tie in expected
        ]

    @pytest.mark.parametrize(
        "names",
        [
            ("layers.0.attention.wq", "layers.0.attention.wk", "layers.0.attention.wv"),
            ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3"),
            ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"),
            ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
            ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.key"),
            ("q_proj", "k_proj"),
        ],
        ids=lambda names: names[0],
    )
    def test_other_customs_of_naming_are_known(self, names):
        assert lq.ties.fused_projections(["blk.0.other", *names]) == [names]

    def test_projections_of_different_blocks_are_not_one(self):
        with pytest.raises(InvalidArgumentError, match=r"^names .*projections"):
            lq.ties.fused_projections(["0.q_proj", "1.k_proj", "0.gate_proj", "0.o_proj"])


class TestExperts:
    NAMES = tuple(f"{layer}.mlp.experts.{i}.{part}" for layer in (0, 1) for i in (0, 1) for part in ("gate", "down"))

    def test_all_matrices_of_all_experts_of_a_layer_are_one(self):
        names = [*self.NAMES, "0.mlp.shared_experts.up", "0.mlp.experts.gate", "0.mlp.gate"]
        assert lq.ties.experts(names) == [self.NAMES[:4], self.NAMES[4:]]

    def test_a_model_without_experts_is_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"^names .*experts"):
            lq.ties.experts(LLAMA)


def test_a_plan_stores_what_is_fused_alike(table):
    names = tuple(f"{layer}.{part}" for layer in (0, 1) for part in ("q_proj", "k_proj"))
    fused = lq.CostTable(
        names, *(getattr(table, key) for key in ("shapes", "configurations", "costs", "sizes", "factor_sizes"))
    )
    ties = lq.ties.fused_projections(fused.names)
    free, tied = (lq.allocate(fused, bits_per_weight=4.5, ties=own) for own in ((), ties))
    assert any(free.formats[a] != free.formats[b] for a, b in ties)  # else the ties would change nothing
    assert all(tied.formats[a] == tied.formats[b] for a, b in ties)
