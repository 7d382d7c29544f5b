"""Plans within budgets, and plans as documents."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lqlora as lq
from lqlora import solvers
from lqlora._optional import is_installed
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError, SolverError
from lqlora.solvers import RawResult
from tests.allocation.cases import FORMATS, NF2, NF4, NF8, SHAPES, matrices
from tests.requirements import require_or_skip


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return matrices()


@pytest.fixture(scope="module")
def table(weights) -> lq.CostTable:
    return lq.cost_table(weights, FORMATS, rank=2)


def _best(table: lq.CostTable, budget: int) -> float:
    """Least cost within a budget in bits, by trying everything."""
    rows = np.arange(len(table.names))
    choices = (np.array(c) for c in itertools.product(range(len(table.formats)), repeat=len(rows)))
    return min(table.costs[rows, c].sum() for c in choices if table.sizes[rows, c].sum() <= budget)


class TestBudgets:
    @pytest.mark.parametrize("bits", [3.02, 3.3, 4.0, 5.5, 7.0])
    def test_a_plan_is_optimal_and_within_its_budget(self, table, bits):
        plan = lq.allocate(table, bits_per_weight=bits)
        assert plan.bits_per_weight <= Fraction(bits)
        assert plan.storage_bits == sum(plan.formats[n].storage_bits(s) for n, s in SHAPES.items())
        np.testing.assert_allclose(plan.objective, _best(table, math.floor(bits * table.weight_count)), rtol=1e-6)
        assert plan.objective == pytest.approx(sum(plan.costs.values()), rel=1e-12)
        assert plan.bound <= plan.objective
        assert plan.gap <= 1e-6
        assert (plan.status, plan.ranks) == ("OPTIMAL", dict.fromkeys(SHAPES, 2))

    def test_costs_fall_as_the_budget_rises(self, table):
        plans = [lq.allocate(table, bits_per_weight=bits) for bits in np.linspace(3.0, 9, 12)]
        costs = [plan.objective for plan in plans]
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(costs))
        assert costs[-1] < costs[0]

    def test_a_budget_of_the_cheapest_choice_is_feasible_to_the_bit(self, table):
        cheapest = int(table.sizes.min(axis=1).sum())
        plan = lq.allocate(table, bits_per_weight=Fraction(cheapest, table.weight_count))
        assert plan.storage_bits == cheapest
        with pytest.raises(InfeasibleBudgetError):
            lq.allocate(table, bits_per_weight=Fraction(cheapest - 1, table.weight_count))

    @pytest.mark.parametrize("budget", [{"bits_per_weight": 1.5}, {"total_bytes": 384}, {"total_bytes": 0}])
    def test_a_budget_below_the_cheapest_tells_the_feasible_range(self, table, budget):
        with pytest.raises(InfeasibleBudgetError, match="infeasible") as caught:
            lq.allocate(table, **budget)
        error = caught.value
        assert error.asked == (Fraction(3, 2) if budget.get("total_bytes") != 0 else 0)
        assert error.minimum == Fraction(int(table.sizes.min(axis=1).sum()), table.weight_count)
        assert error.maximum == Fraction(int(table.sizes.max(axis=1).sum()), table.weight_count)

    def test_a_budget_above_the_dearest_gives_the_best_plan_and_a_note(self, table):
        plan = lq.allocate(table, bits_per_weight=100)
        assert plan.objective == pytest.approx(table.costs.min(axis=1).sum(), rel=1e-9)
        assert "above the dearest" in plan.note
        assert lq.allocate(table, bits_per_weight=4.0).note == ""

    def test_bytes_are_the_same_budget_as_bits(self, table):
        total = 900
        plan = lq.allocate(table, total_bytes=total)
        same = lq.allocate(table, bits_per_weight=Fraction(8 * total, table.weight_count))
        assert plan.nbytes <= total
        assert plan == same

    @pytest.mark.parametrize(
        "budget",
        [
            {},
            {"bits_per_weight": 3.0, "total_bytes": 1000},
            {"bits_per_weight": -1.0},
            {"total_bytes": -1},
            {"bits_per_weight": float("nan")},
            {"bits_per_weight": float("inf")},
            {"bits_per_weight": "three"},
            {"total_bytes": 10.5},
        ],
        ids=str,
    )
    def test_what_is_no_budget_is_refused(self, table, budget):
        with pytest.raises(InvalidArgumentError, match="budget"):
            lq.allocate(table, **budget)

    @pytest.mark.parametrize("number", [np.float32(4.0), np.float64(4.0), np.int64(4)])
    def test_numbers_of_numpy_are_budgets(self, table, number):
        assert lq.allocate(table, bits_per_weight=number) == lq.allocate(table, bits_per_weight=4)

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_any_table_is_allocated_within_any_feasible_budget(self, data):
        table = data.draw(_tables())
        low, high = int(table.sizes.min(axis=1).sum()), int(table.sizes.max(axis=1).sum())
        budget = data.draw(st.integers(low, high))
        plan = lq.allocate(table, bits_per_weight=Fraction(budget, table.weight_count))
        assert plan.storage_bits <= budget
        np.testing.assert_allclose(plan.objective, _best(table, budget), rtol=1e-6, atol=1e-300)


@st.composite
def _tables(draw) -> lq.CostTable:
    rows = draw(st.integers(1, 4))
    shapes = tuple((draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(rows))
    cells = st.floats(1e-15, 1e-9) | st.just(0.0)
    costs = np.array(draw(st.lists(cells, min_size=5 * rows, max_size=5 * rows))).reshape(rows, 5)
    sizes = np.array([[fmt.storage_bits(shape) for fmt in FORMATS] for shape in shapes])
    configurations = tuple(lq.Configuration(fmt, 0) for fmt in FORMATS)
    return lq.CostTable(tuple(f"m{i}" for i in range(rows)), shapes, configurations, costs, sizes, 0 * sizes)


class TestConstraints:
    def test_tied_matrices_take_one_format(self, table):
        free = lq.allocate(table, bits_per_weight=3.5)
        names = ["layers.0.q", "layers.1.q"]
        assert free.formats[names[0]] != free.formats[names[1]]  # else the tie would change nothing
        tied = lq.allocate(table, bits_per_weight=3.5, ties=[names])
        assert tied.formats[names[0]] == tied.formats[names[1]]
        assert tied.objective >= free.objective

    def test_overlapping_ties_merge(self, table):
        names = list(SHAPES)
        plan = lq.allocate(table, bits_per_weight=4.0, ties=[names[:2], names[2:], names[1:3]])
        assert len(set(plan.formats.values())) == 1

    def test_a_fixed_format_is_taken(self, table):
        plan = lq.allocate(table, bits_per_weight=6.0, fixed={"layers.1.q": NF2})
        assert plan.formats["layers.1.q"] == NF2

    def test_a_fixed_format_counts_in_the_feasible_range(self, table):
        with pytest.raises(InfeasibleBudgetError) as caught:
            lq.allocate(table, bits_per_weight=3.0, fixed=dict.fromkeys(SHAPES, NF8))
        assert caught.value.minimum == caught.value.maximum

    def test_a_forbidden_format_is_not_taken(self, table):
        free = lq.allocate(table, bits_per_weight=5.0)
        name, fmt = "layers.1.q", free.formats["layers.1.q"]
        plan = lq.allocate(table, bits_per_weight=5.0, forbidden={name: [fmt]})
        assert plan.formats[name] != fmt
        assert plan.objective >= free.objective

    def test_a_format_with_an_infinite_cost_is_never_taken(self, table):
        costs = table.costs.copy()
        costs[:, 4] = np.inf
        broken = dataclasses.replace(table, costs=costs)
        assert NF8 not in lq.allocate(broken, bits_per_weight=100).formats.values()

    @pytest.mark.parametrize(
        "options",
        [
            {"ties": [["layers.0.q", "nowhere"]]},
            {"fixed": {"nowhere": NF2}},
            {"forbidden": {"nowhere": [NF2]}},
            {"fixed": {"layers.0.q": lq.BlockFormat.parse("int7/5:float32")}},
            {"forbidden": {"layers.0.q": [lq.BlockFormat.parse("int7/5:float32")]}},
            {"forbidden": {"layers.0.q": FORMATS}},
            {"fixed": {"layers.0.q": NF2}, "forbidden": {"layers.0.q": [NF2]}},
            {"fixed": {"layers.0.q": NF2, "layers.1.q": NF4}, "ties": [["layers.0.q", "layers.1.q"]]},
            {"solver": "abacus"},
            {"time_limit": -1.0},
            {"rel_gap": -1.0},
        ],
        ids=[
            "unknown tie",
            "unknown fixed",
            "unknown forbidden",
            "fixed format not in table",
            "forbidden format not in table",
            "all forbidden",
            "fixed and forbidden",
            "tied and fixed apart",
            "unknown solver",
            "negative time",
            "negative gap",
        ],
    )
    def test_contradictions_and_unknown_names_are_refused(self, table, options):
        with pytest.raises(InvalidArgumentError):
            lq.allocate(table, bits_per_weight=5.0, **options)

    def test_an_empty_matrix_costs_nothing(self):
        weights = {"none": np.zeros((0, 4)), "some": np.ones((4, 4))}
        plan = lq.allocate(lq.cost_table(weights, FORMATS[:1], rank=0), bits_per_weight=9)
        assert plan.bits_by_matrix()["none"] == 0.0
        assert plan.table().count("\n") == 3

    def test_a_table_of_empty_matrices_is_refused_or_costs_nothing(self):
        empty = lq.cost_table({"none": np.zeros((0, 4))}, FORMATS[3:4], rank=0)
        assert lq.allocate(empty, total_bytes=9).storage_bits == 0


@pytest.mark.parametrize("bits", [3.1, 4.4])
def test_plans_of_both_solvers_agree_within_the_gap(table, bits):
    for name in ("highs", "scipy"):
        require_or_skip(name, solvers.available()[name])
    first, second = (lq.allocate(table, bits_per_weight=bits, solver=name) for name in ("highs", "scipy"))
    np.testing.assert_allclose(first.objective, second.objective, rtol=2.1e-6)
    assert first.solver.startswith("highs ")
    assert second.solver.startswith("scipy ")


class _Stopped:
    """A solver that its time limit stopped."""

    REQUIRES = "numpy"

    def __init__(self, *, incumbent: bool):
        self._incumbent = incumbent

    def version(self) -> str:
        return "1"

    def solve(self, reduced, _) -> RawResult:
        x = np.zeros(len(reduced.cost))
        # The cheapest size of each group is always feasible, and after pruning it is the group's last in cost.
        for group in range(reduced.choose.shape[0]):
            members = np.flatnonzero(reduced.group == group)
            x[members[np.argmin(np.asarray(reduced.use[[0], :].todense()).ravel()[members])]] = 1
        return RawResult(x if self._incumbent else None, -np.inf, "time limit", infeasible=False)


@pytest.fixture
def stopped(monkeypatch):
    monkeypatch.setattr(solvers, "_ADAPTERS", dict(solvers._ADAPTERS))

    def add(*, incumbent: bool) -> str:
        solvers.register("stopped", _Stopped(incumbent=incumbent))
        return "stopped"

    return add


def test_a_time_limit_without_a_plan_is_an_error_that_says_what_to_do(table, stopped):
    with pytest.raises(SolverError, match="allow more time"):
        lq.allocate(table, bits_per_weight=4.0, solver=stopped(incumbent=False), time_limit=1.0)


def test_a_plan_without_a_bound_says_so_and_is_still_standard_json(table, stopped):
    plan = lq.allocate(table, bits_per_weight=4.0, solver=stopped(incumbent=True), time_limit=1.0)
    assert (plan.status, plan.gap) == ("FEASIBLE", math.inf)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads(plan.to_json(), parse_constant=refuse)
    assert lq.Plan.from_json(plan.to_json()) == plan


class TestDocuments:
    @pytest.fixture
    def plan(self, table) -> lq.Plan:
        return lq.allocate(table, bits_per_weight=4.0)

    def test_the_round_trip_is_identical(self, plan):
        back = lq.Plan.from_json(plan.to_json())
        assert back == plan
        assert back.to_json() == plan.to_json()
        assert back.formats == plan.formats
        assert (back.objective, back.bound, back.costs) == (plan.objective, plan.bound, plan.costs)
        assert back.bits_per_weight == plan.bits_per_weight

    def test_equal_inputs_give_equal_text(self, table, plan):
        assert lq.allocate(table, bits_per_weight=4.0).to_json() == plan.to_json()

    @pytest.mark.parametrize("name", ["ternary", "nf4"])  # the second is not what its name stands for
    def test_a_codebook_of_ones_own_is_written_with_its_levels(self, name):
        ternary = lq.BlockFormat(lq.Codebook([-1, 0, 1 / 3], name=name), 8)
        plan = lq.allocate(lq.cost_table({"a": np.eye(8)}, [ternary], rank=0), bits_per_weight=9)
        back = lq.Plan.from_json(plan.to_json())
        assert back == plan
        assert back.formats["a"].codebook.levels.tolist() == ternary.codebook.levels.tolist()

    def test_the_document_is_readable(self, plan):
        document = json.loads(plan.to_json())
        assert list(document["matrices"]) == list(SHAPES)
        assert document["storage_bits"] == plan.storage_bits
        assert document["matrices"]["layers.0.q"]["format"] == str(plan.formats["layers.0.q"])

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"plan"', "{}", "[" * 100_000], ids=lambda t: t[:6])
    def test_text_that_is_no_plan_is_refused(self, text):
        with pytest.raises(InvalidArgumentError, match="plan"):
            lq.Plan.from_json(text)

    @pytest.mark.parametrize("key", ["lqlora_plan", "matrices", "objective", "bound", "status", "solver", "note"])
    def test_a_missing_key_is_refused(self, plan, key):
        document = json.loads(plan.to_json())
        del document[key]
        with pytest.raises(InvalidArgumentError, match=key):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize("key", ["format", "rank", "shape", "cost"])
    def test_a_missing_key_of_a_matrix_is_refused(self, plan, key):
        document = json.loads(plan.to_json())
        del document["matrices"]["layers.0.q"][key]
        with pytest.raises(InvalidArgumentError, match=key):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [("lqlora_plan", 1), ("matrices", []), ("matrices", {"a": []}), ("objective", "cheap"), ("bound", "high")],
    )
    def test_a_wrong_value_is_refused(self, plan, key, value):
        document = json.loads(plan.to_json())
        document[key] = value
        with pytest.raises(InvalidArgumentError, match=r"[pP]lan"):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "nf99/64"),
            ("format", 4),
            ("format", "nf4/8" + ":u8/1" * 20_000),
            ("rank", "two"),
            ("rank", -1),
            ("rank", math.inf),
            ("rank", 1.5),
            ("shape", "ab"),
            ("shape", [2, -3]),
            ("shape", [2.5, 3]),
            ("cost", "little"),
            ("cost", math.nan),
        ],
        ids=lambda value: str(value)[:10],
    )
    def test_a_wrong_value_of_a_matrix_is_refused(self, plan, key, value):
        document = json.loads(plan.to_json())
        document["matrices"]["layers.0.q"][key] = value
        with pytest.raises(InvalidArgumentError):
            lq.Plan.from_json(json.dumps(document))

    def test_bits_by_matrix_is_exact_storage_per_weight(self, plan):
        for name, bits in plan.bits_by_matrix().items():
            assert bits == plan.formats[name].storage_bits(SHAPES[name]) / math.prod(SHAPES[name])
        mean = sum(bits * math.prod(SHAPES[name]) for name, bits in plan.bits_by_matrix().items())
        assert mean == pytest.approx(plan.storage_bits)

    def test_the_table_has_a_row_for_each_matrix(self, plan):
        head, rule, *rows = plan.table().split("\n")
        assert head.count("|") == rule.count("|") == 6
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        assert [row[:2] for row in cells] == [[name, str(fmt)] for name, fmt in plan.formats.items()]
        assert [row[2] for row in cells] == [f"{bits:.3f}" for bits in plan.bits_by_matrix().values()]

    def test_the_picture_shows_the_bits(self, plan):
        require_or_skip("matplotlib", is_installed("matplotlib"))
        from matplotlib.figure import Figure

        picture = plan.plot()
        assert isinstance(picture, Figure)
        shown = picture.axes[0].images[0].get_array()
        bits = plan.bits_by_matrix()
        expected = [[bits["layers.0.q"], bits["layers.1.q"]], [bits["layers.0.up"], bits["layers.1.up"]]]
        assert shown.tolist() == expected
        assert [label.get_text() for label in picture.axes[0].get_yticklabels()] == ["q", "up"]
