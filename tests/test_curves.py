"""Records of fine-tuning curves have what the pages draw."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "measurements"
RECORDS = [path for name in ("classification", "fine_tuning") if (path := FOLDER / f"{name}.json").exists()]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_runs_of_a_record_have_the_same_steps_and_finite_measurements(path: Path) -> None:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert len(record["full"]) == 2
    assert record["runs"]
    for key, run in record["runs"].items():
        name, _, seed = key.rpartition(", seed ")
        assert run["method"] == name
        assert seed.isdecimal()
        assert run["bytes"] > 0
        assert run["factor bytes in 16 bits"] >= 0
        steps = [step for step, *_ in run["curve"]]
        assert steps == [k * record["settings"]["steps"] // 6 for k in range(7)], key
        assert all(len(own) == 3 and all(map(math.isfinite, own)) for own in run["curve"]), key


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_method_has_the_same_size_and_start_with_every_seed(path: Path) -> None:
    starts: dict[str, Any] = {}
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"].values():
        own = [run["bytes"], run["factor bytes in 16 bits"], *run["curve"][0]]
        assert starts.setdefault(run["method"], own) == pytest.approx(own)
