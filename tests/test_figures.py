"""Figures in the prose and the tables of pages stand in a record of measurements, or are constants with a reason; pictures have a text.

Records are ``experiments/README.md``, ``benchmarks/README.md`` and ``docs/measurements``. A figure is a number of at least three digits with a
decimal point. Whole numbers are mostly sizes and counts, and nearly any figure of two digits is near to some number of a record. Output of code
cells is computed when the pages are built, so cells are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = [
    ROOT / "experiments" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs" / "measurements").glob("*.json")),
]
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts),
]

#: Figures that nothing measured: where they stand, and why.
CONSTANTS = {
    "docs/explanation/choosing_a_codebook.md": {"6.02": "10 log10 of 4"},
    "docs/explanation/normal_float.md": {"0.9677083": "a constant of the paper"},
    "docs/explanation/solver_robustness.md": {"0.999999": "an example"},
    "docs/explanation/which_weighting.md": {"10.6": "millions of weights of a model"},
    "docs/how-to/bitsandbytes.md": {"0.333": "a level"},
    "docs/how-to/switch_tasks_with_peqa.md": {"0.373": "bits of double quantization, from the paper"},
}

_SKIPPED = (
    re.compile(r"\A---\n.*?\n---\n", re.DOTALL),  # front matter
    re.compile(r"^(`{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE),  # cells and blocks
    re.compile(r"`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL),  # code and formulas
    re.compile(r"\]\([^)]*\)|https?://\S+|<[^>\n]*>"),  # addresses
    re.compile(r"(?i)arxiv[: ]\s*\S+|\d{4}\.\d{4,5}"),  # papers
    re.compile(r"\d+\.\d+\.\d+\S*"),  # versions
)
_NUMBER = re.compile(r"(?<![\w.-])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\w)|(?<![\w.-])\d+(?:\.\d+)?(?!\w)")


def numbers_of(text: str) -> list[str]:
    return [own.replace(",", "") for own in _NUMBER.findall(text)]


def figures_of(text: str) -> list[str]:
    for pattern in _SKIPPED:
        text = pattern.sub(" ", text)
    return [own for own in numbers_of(text) if "." in own and len(own.replace(".", "").lstrip("0")) > 2]


def is_held(figure: str, values: list[float]) -> bool:
    """Return whether a value rounds to a figure; half a unit of its last digit may go either way."""
    half = 0.5 * 10.0 ** -len(figure.split(".")[1])
    return any(abs(value - float(figure)) <= half * 1.0001 for value in values)


def means_of(path: Path) -> set[float]:
    """Return the means over seeds of the runs of a record, first and last."""
    found: dict[str, list[list[float]]] = {}
    for run in json.loads(path.read_text(encoding="utf-8")).get("runs", {}).values():
        found.setdefault(run["method"], []).append([*run["curve"][0][1:], *run["curve"][-1][1:]])
    return {sum(column) / len(column) for runs in found.values() for column in zip(*runs, strict=True)}


@pytest.fixture(scope="module")
def recorded() -> list[float]:
    single = {float(own) for path in RECORDS for own in numbers_of(path.read_text(encoding="utf-8"))}
    return sorted(single.union(*(means_of(path) for path in RECORDS[2:])))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_figures_of_a_page_are_recorded(page: Path, recorded: list[float]) -> None:
    known = CONSTANTS.get(page.relative_to(ROOT).as_posix(), {})
    figures = set(figures_of(page.read_text(encoding="utf-8")))
    unknown = sorted(own for own in figures - set(known) if not is_held(own, recorded))
    assert not unknown, f"no record has {unknown}: add the measurement and its command to a record"
    assert set(known) <= figures


def test_a_figure_that_no_record_has_is_found() -> None:
    text = "It takes 12.5 s with numpy 2.4.6, `3.5` and $4.5$ [there](x-5.5.md), and 1,234.5 MB.\n```\n6.5\n```\n"
    assert figures_of(text) == ["12.5", "1234.5"]
    assert is_held("12.5", [12.46])
    assert not is_held("12.5", [12.4, 12.56])


@pytest.mark.parametrize("path", RECORDS[:2], ids=lambda path: path.parent.name)
def test_tables_of_records_have_a_command(path: Path) -> None:
    program = re.compile(r"`(?:experiments|benchmarks|scripts|docs|lqlora)[ /][\w./]+")
    for section in path.read_text(encoding="utf-8").split("\n## ")[1:]:
        title = section.split("\n", 1)[0]
        named = program.search(section)
        assert named or "|---" not in section, f"{path.name}, {title}: which command measured the table?"
        for name in re.findall(r"(?:experiments|benchmarks)/\w+\.py", section):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", RECORDS[2:], ids=lambda path: path.stem)
def test_records_say_when_and_with_what_they_were_made(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert (ROOT / record["command"].split()[0]).exists()
    assert record["versions"]
    assert record["machine"]


#: Cells that draw.
_DRAWS = re.compile(r"\bplt\.|\.subplots\(|reports\.plot")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pictures_have_an_alternative_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for cell in re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if _DRAWS.search(cell):
            alt = re.match(r"---\n.*?\balt: \"([^\"\n]{30,300})\"\n---\n", cell, re.DOTALL)
            assert alt, f"write mystnb: image: alt: for the picture of\n{cell[:200]}"
    assert "![](" not in text
