"""Plans and their JSON documents."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError
from tests.costs.cases import SHAPES
from tests.requirements import require_or_skip


@pytest.fixture(scope="module")
def plan(table) -> lq.Plan:
    return lq.allocate(table, bits_per_weight=4.0, limits=[lq.Limit("*.q", bits_per_weight=2, at_least=True)])


class TestDocuments:
    def test_the_round_trip_is_identical(self, plan):
        back = lq.Plan.from_json(plan.to_json())
        assert back == plan
        assert back.to_json() == plan.to_json()
        assert back.formats == plan.formats
        assert (back.objective, back.bound, back.costs) == (plan.objective, plan.bound, plan.costs)
        assert back.bits_per_weight == plan.bits_per_weight

    def test_equal_inputs_give_equal_text(self, table, plan):
        limits = [lq.Limit("*.q", bits_per_weight=2, at_least=True)]
        assert lq.allocate(table, bits_per_weight=4.0, limits=limits).to_json() == plan.to_json()

    @pytest.mark.parametrize("name", ["ternary", "nf4"])  # the second is not what its name stands for
    def test_a_codebook_without_a_standard_name_is_written_with_its_levels(self, name):
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

    @pytest.mark.parametrize(
        "key",
        [
            *("lqlora_plan", "matrices", "goal", "objective", "bound", "counts_factors", "limits", "status"),
            *("solver", "note"),
        ],
    )
    def test_a_missing_key_is_refused(self, plan, key):
        document = json.loads(plan.to_json())
        del document[key]
        with pytest.raises(InvalidArgumentError, match=key):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize("key", ["format", "rank", "shape", "cost", "factor_bits"])
    def test_a_missing_key_of_a_matrix_is_refused(self, plan, key):
        document = json.loads(plan.to_json())
        del document["matrices"]["layers.0.q"][key]
        with pytest.raises(InvalidArgumentError, match=key):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("lqlora_plan", 2),
            ("lqlora_plan", 5),
            ("matrices", []),
            ("matrices", {"a": []}),
            ("objective", "cheap"),
            ("bound", "high"),
            ("counts_factors", 1),
            ("goal", "peace"),
            ("surprise", 1),
            ("limits", [{}]),
            ("limits", [{"matrices": "a", "used": 1, "upper": None, "lower": None, "unit": "bits", "weight_count": 1}]),
            ("limits", [{"matrices": "a", "used": -1, "upper": 2, "lower": None, "unit": "bits", "weight_count": 1}]),
            ("limits", [{"matrices": "a", "used": 1, "upper": 2, "lower": None, "unit": "eggs", "weight_count": 1}]),
        ],
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
            ("shape", [2, 3, 4]),
            ("cost", "little"),
            ("cost", -1.0),
            ("factor_bits", 0.5),
            ("normalization", "absmax"),
            ("surprise", 1),
            ("cost", math.nan),
        ],
        ids=lambda value: str(value)[:10],
    )
    def test_a_wrong_value_of_a_matrix_is_refused(self, plan, key, value):
        document = json.loads(plan.to_json())
        document["matrices"]["layers.0.q"][key] = value
        with pytest.raises(InvalidArgumentError):
            lq.Plan.from_json(json.dumps(document))


@pytest.fixture(scope="module")
def errors():
    """List the faults of a document."""
    require_or_skip("jsonschema", is_installed("jsonschema"))
    jsonschema = importlib.import_module("jsonschema")
    jsonschema.Draft202012Validator.check_schema(lq.Plan.json_schema())
    validator = jsonschema.Draft202012Validator(lq.Plan.json_schema())
    return lambda document: list(validator.iter_errors(document))


class TestSchema:
    """Validation of documents against the shipped schema, by the package jsonschema."""

    @pytest.mark.parametrize("options", [{"bits_per_weight": 4.0}, {"total_bytes": 900}, {"max_error": 1000.0}])
    def test_every_kind_of_plan_is_valid(self, errors, table, options):
        plan = lq.allocate(table, **options, limits=[lq.Limit("*.q", total_bytes=10, at_least=True)])
        assert errors(json.loads(plan.to_json())) == []

    def test_a_plan_without_a_bound_or_with_levels_of_its_own_is_valid(self, errors):
        ternary = lq.BlockFormat(lq.Codebook([-1, 0, 1 / 3], name="ternary"), 8)
        plan = lq.allocate(lq.cost_table({"a": np.eye(8)}, [ternary], rank=0), bits_per_weight=9)
        assert errors(json.loads(dataclasses.replace(plan, bound=-math.inf).to_json())) == []

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (["lqlora_plan"], 3),
            (["status"], None),
            (["goal"], "peace"),
            (["bound"], "high"),
            (["counts_factors"], 1),
            (["surprise"], 1),
            (["limits"], {}),
            (["limits", 0, "unit"], "eggs"),
            (["limits", 0, "upper"], None),
            (["limits", 0, "used"], -1),
            (["matrices"], []),
            (["matrices", "layers.0.q", "rank"], -1),
            (["matrices", "layers.0.q", "rank"], 1.5),
            (["matrices", "layers.0.q", "shape"], [1, 2, 3]),
            (["matrices", "layers.0.q", "shape"], "ab"),
            (["matrices", "layers.0.q", "cost"], -1),
            (["matrices", "layers.0.q", "format"], ""),
            (["matrices", "layers.0.q", "normalization"], "absmax"),
            (["matrices", "layers.0.q", "surprise"], 1),
        ],
        ids=str,
    )
    def test_what_the_schema_refuses_is_refused_by_the_reader(self, errors, plan, path, value):
        document = json.loads(plan.to_json())
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert errors(document)
        with pytest.raises(InvalidArgumentError):
            lq.Plan.from_json(json.dumps(document))

    def test_without_a_required_key_nothing_accepts_it(self, errors, plan):
        for key in lq.Plan.json_schema()["required"]:
            document = json.loads(plan.to_json())
            del document[key]
            assert errors(document)
            with pytest.raises(InvalidArgumentError, match=key):
                lq.Plan.from_json(json.dumps(document))


class TestOlderVersions:
    """Documents of version 3, as the code before version 4 wrote them."""

    @pytest.fixture(params=["plan_v3_bits.json", "plan_v3_error.json"])
    def text(self, request) -> str:
        return (Path(__file__).parent / "data" / request.param).read_text(encoding="utf-8")

    def test_they_are_read_with_all_that_they_say(self, text):
        document, plan = json.loads(text), lq.Plan.from_json(text)
        for key in ("status", "solver", "note", "goal", "objective", "bound", "counts_factors", "storage_bits"):
            assert getattr(plan, key) == document[key]
        for name, row in document["matrices"].items():
            own = plan.matrices[name]
            assert (str(own.format), own.rank, list(own.shape)) == (row["format"], row["rank"], row["shape"])
            assert (own.cost, own.factor_bits, own.storage_bits) == (
                row["cost"],
                row["factor_bits"],
                row["storage_bits"],
            )
            assert (
                np.float32(row.get("levels", own.format.codebook.levels)).tolist()
                == own.format.codebook.levels.tolist()
            )
        assert [(use.matrices, use.weight_count) for use in plan.limits] == [
            (row["what"], row["weights"]) for row in document["demands"]
        ]
        for use, row in zip(plan.limits, document["demands"], strict=True):
            assert (use.used, use.upper, use.lower, use.unit) == (row["used"], row["upper"], row["lower"], row["unit"])

    def test_they_are_written_as_the_newest_version(self, text):
        plan = lq.Plan.from_json(text)
        document = json.loads(plan.to_json())
        assert (document["lqlora_plan"], "demands" in document) == (4, False)
        assert document["matrices"] == json.loads(text)["matrices"]
        assert lq.Plan.from_json(plan.to_json()) == plan

    def test_keys_of_two_versions_in_one_document_are_refused(self, text):
        for version in (3, 4):
            document = json.loads(text) | {"lqlora_plan": version, "limits": []}
            with pytest.raises(InvalidArgumentError, match="limits" if version == 3 else "demands"):
                lq.Plan.from_json(json.dumps(document))


class TestMatrices:
    def test_properties_are_the_fields_of_the_records(self, plan):
        for name, own in plan.matrices.items():
            found = (plan.formats[name], plan.ranks[name], plan.shapes[name], plan.costs[name], plan.factor_bits[name])
            assert found == (own.format, own.rank, own.shape, own.cost, own.factor_bits)
        assert sum(own.weight_count for own in plan.matrices.values()) == plan.weight_count


class TestLimitUses:
    def test_the_budget_comes_first_and_limits_after_it(self, plan):
        budget, limit = plan.limits
        assert (budget.matrices, budget.used, budget.upper, budget.lower) == (
            "all matrices",
            plan.storage_bits,
            4 * plan.weight_count,
            None,
        )
        own = [name for name in SHAPES if name.endswith(".q")]
        count = sum(math.prod(SHAPES[name]) for name in own)
        assert (limit.matrices, limit.upper, limit.lower, limit.weight_count) == ("'*.q'", None, 2 * count, count)
        assert limit.used == sum(plan.formats[name].storage_bits(SHAPES[name]) for name in own)

    def test_an_error_is_a_limit_too(self, table):
        plan = lq.allocate(table, max_error=1000.0)
        assert [(use.unit, use.used, use.upper) for use in plan.limits] == [("error", plan.error, 1000.0)]
        assert plan.limits[0].describe() == f"all matrices: an error of at most 1000, used {plan.error:.4g}"

    def test_factors_are_in_what_is_used_if_they_count(self, table):
        plan = lq.allocate(table, bits_per_weight=8, count_factors=True)
        assert plan.limits[0].used == plan.counted_bits == plan.storage_bits + sum(plan.factor_bits.values())
        assert sum(plan.factor_bits.values()) > 0

    def test_both_sides_are_described(self):
        use = lq.LimitUse("'*.q'", 300, upper=400, lower=200, weight_count=100)
        expected = "'*.q': at least 2.0000 and at most 4.0000 bits per weight, used 3.0000, 100 bits left"
        assert use.describe() == expected

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, "upper or lower"),
            ({"upper": math.inf}, "upper .* inf"),
            ({"upper": -1}, "upper .* -1"),
            ({"lower": math.nan}, "lower .* nan"),
            ({"upper": 1, "unit": "eggs"}, "unit .*eggs"),
        ],
        ids=str,
    )
    def test_a_use_without_a_limit_or_a_number_is_refused(self, options, said):
        with pytest.raises(InvalidArgumentError, match=said):
            lq.LimitUse("a", 1, **options)


class TestByMatrix:
    def test_bits_by_matrix_is_exact_storage_per_weight(self, plan):
        for name, bits in plan.bits_by_matrix().items():
            assert bits == plan.formats[name].storage_bits(SHAPES[name]) / math.prod(SHAPES[name])
        mean = sum(bits * math.prod(SHAPES[name]) for name, bits in plan.bits_by_matrix().items())
        assert mean == pytest.approx(plan.storage_bits)

    def test_shares_of_the_error_are_costs_over_their_sum(self, plan):
        shares = plan.error_by_matrix()
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["layers.0.up"] == pytest.approx(plan.costs["layers.0.up"] / sum(plan.costs.values()))
