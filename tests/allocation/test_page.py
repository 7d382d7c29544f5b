"""A plan as one HTML page: what it holds, and what a browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError
from tests.allocation.tables import FORMATS, make_table
from tests.requirements import require_or_skip

NAMES = ['<script>alert("1")</script>', "a\"b|c'&amp;d", "\u202eevil\x00\ud800", "layers.10.q", "layers.9.q"]


class Page(html.parser.HTMLParser):
    """Texts of the cells of tables, row by row, and the names of all elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def _plan(names=NAMES, bits=4.0) -> lq.Plan:
    configurations = [lq.Configuration(fmt, rank) for fmt in FORMATS for rank in (0, 2)]
    shapes = [(16, 24 + 8 * (i % 3)) for i in range(len(names))]
    rng = np.random.default_rng(5)
    costs = [
        [s / fmt.storage_bits((8, 8)) / (1 + r) for fmt in FORMATS for r in (0, 1)] for s in rng.random(len(names))
    ]
    table = dataclasses.replace(make_table(shapes, configurations, costs), names=tuple(names))
    plan = lq.allocate(table, bits_per_weight=bits, count_factors=False)
    return dataclasses.replace(plan, ranks={name: 2 * (i % 2) for i, name in enumerate(names)})


@pytest.fixture(scope="module")
def plan() -> lq.Plan:
    return _plan()


@pytest.fixture(scope="module")
def page(plan) -> Page:
    return Page(plan.to_html("A & B", [_plan(bits=bits) for bits in (3.5, 5, 6)]))


class TestContent:
    def test_every_matrix_has_a_row_with_its_numbers(self, plan, page):
        rows = page.tables[1][1:]
        for row, name in zip(rows[3:], NAMES[3:], strict=True):
            own = plan.formats[name]
            bits = own.storage_bits(plan.shapes[name]) / math.prod(plan.shapes[name])
            assert row[:4] == [name, str(own), f"{bits:.3f}", str(plan.ranks[name])]
            assert row[5:7] == [f"{plan.costs[name]:.4g}", f"{plan.error_by_matrix()[name]:.2%}"]

    def test_names_are_text_whatever_they_hold(self, page):
        assert [row[0] for row in page.tables[1][1:]] == [NAMES[0], NAMES[1], "\ufffdevil\ufffd\ufffd", *NAMES[3:]]
        assert [tag for tag, _ in page.elements if tag == "script"] == ["script"]

    def test_kinds_are_summed_up(self, plan, page):
        last = page.tables[0][-1]
        assert last[:2] == ["layers.*.q", "2"]
        assert float(last[2]) == pytest.approx(float(plan.by_kind()[-1].bits_per_weight), abs=5e-4)

    def test_it_loads_nothing(self, plan, page):
        loading = {"src", "href", "srcset", "action", "data", "poster", "background", "style", "onclick", "onload"}
        assert [attributes for _, attributes in page.elements if loading & set(attributes)] == []
        assert {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements} == set()
        assert "url(" not in plan.to_html()
        assert "@import" not in plan.to_html()

    def test_its_policy_admits_its_own_script_and_style_and_nothing_else(self, plan, page):
        policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
        text = plan.to_html()
        hashes = []
        for tag in ("style", "script"):
            (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            hashes.append(base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode())
        style, script = hashes
        assert policy == f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'"

    def test_pictures_have_names_and_values_for_those_who_do_not_see_them(self, page):
        pictures = [attributes for tag, attributes in page.elements if tag == "svg" and "role" in attributes]
        assert [(a["role"], a["aria-label"]) for a in pictures] == [
            ("img", "bits per weight by kind of matrix and layer"),
            ("img", "rank by kind of matrix and layer"),
            ("img", "share of the error by kind of matrix and layer"),
            ("img", "Error over bits per weight"),
        ]

    def test_equal_plans_give_equal_pages(self, plan):
        assert _plan().to_html() == plan.to_html()

    def test_it_can_be_written_as_utf_8(self, plan):
        assert plan.to_html().encode()

    def test_what_was_asked_and_found_is_said(self, plan):
        text = plan.to_html("A & B")
        assert "<h1>A &amp; B</h1>" in text
        for demand in plan.demands:
            assert demand.describe() in text
        assert f"{plan.error:.6g}" in text

    def test_a_plan_without_matrices_is_a_page_too(self, plan):
        fields = ("formats", "ranks", "shapes", "costs", "factor_bits")
        empty = dataclasses.replace(plan, **{field: {} for field in fields})
        assert "<h2>Matrices</h2>" in empty.to_html()

    def test_plans_of_other_matrices_are_refused(self, plan):
        with pytest.raises(InvalidArgumentError, match="same matrices"):
            plan.to_html(others=[_plan(["x", "y"])])

    def test_many_matrices_keep_a_page_of_a_few_hundred_kilobytes(self):
        names = [f"model.layers.{i}.{kind}" for i in range(32) for kind in ("q", "k", "v", "o", "gate", "up", "down")]
        assert len(_plan(names).to_html().encode()) < 400_000


# Written into a copy of the page whose policy admits it: clicks on a head, notes orders and requests, then breaks rules.
PROBE = """
const order = () => [...document.querySelectorAll("table")[1].tBodies[0].rows].map((row) => row.cells[0].textContent);
const click = (column) => document.querySelectorAll("table")[1].querySelectorAll("th button")[column].click();
const found = { first: order() };
click(0); found.names = order();
click(2); found.bits = order(); found.mark = document.querySelectorAll("[aria-sort]").length;
click(2); found.falling = order();
found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
document.body.dataset.found = JSON.stringify(found);
console.error("broken on purpose");
"""


class TestBrowser:
    @pytest.fixture
    def browse(self, tmp_path):
        """Open a page in headless Chromium; return the document after its scripts, and the lines of its console."""
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        require_or_skip("chromium", program is not None)

        def run(text: str) -> tuple[str, list[str]]:
            (tmp_path / "page.html").write_text(text, encoding="utf-8")
            options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
            options += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=1000", "--dump-dom"]
            command = [program, *options, (tmp_path / "page.html").as_uri()]
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, timeout=200)
            return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

        return run

    def test_it_shows_every_matrix_and_complains_of_nothing(self, browse, plan, page):
        document, console = browse(plan.to_html("A & B", [_plan(bits=bits) for bits in (3.5, 5, 6)]))
        assert console == []
        assert Page(document).tables == page.tables
        assert [tag for tag, _ in Page(document).elements if tag == "script"] == ["script"]

    def test_a_click_sorts_and_nothing_is_fetched(self, browse, plan):
        text = re.sub(r"<meta http-equiv[^>]*>", "", plan.to_html())
        document, console = browse(text.replace("</body>", f"<script>{PROBE}</script></body>"))
        (found,) = (json.loads(a["data-found"]) for tag, a in Page(document).elements if tag == "body")
        assert found["first"][3:] == ["layers.10.q", "layers.9.q"]
        assert [name for name in found["names"] if name.startswith("layers")] == ["layers.9.q", "layers.10.q"]
        shown = {**plan.bits_by_matrix(), "\ufffdevil\ufffd\ufffd": plan.bits_by_matrix()[NAMES[2]]}
        assert [shown[name] for name in found["bits"]] == sorted(plan.bits_by_matrix().values())
        assert [shown[name] for name in found["falling"]] == sorted(plan.bits_by_matrix().values(), reverse=True)
        assert (found["mark"], found["requests"]) == (1, [])
        assert any("broken on purpose" in line for line in console)  # so that silence means something
