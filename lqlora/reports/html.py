"""A plan as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources
from typing import TYPE_CHECKING

from lqlora.reports._svg import curve, escape, heat_map
from lqlora.reports.frontier import pareto_points

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lqlora.allocation.plan import Plan

__all__ = ["page"]

_WORDS = ("kind", "matrix", "format")  # columns of text; numbers stand to the right
_NUMBER = ' class="number"'


def page(plan: Plan, title: str, others: Sequence[Plan]) -> str:
    """Return the page."""
    style, script = _asset("plan.css"), _asset("plan.js")
    # Nothing but these two texts may act, and nothing may be fetched, whatever a matrix is called.
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    sections = [f"<h1>{escape(title)}</h1>", _summary(plan), *_pictures(plan)]
    if others:
        points, own = pareto_points([*others, plan]), pareto_points([plan])[0]
        sections.append(_figure("Error over bits", curve(points, own), "The marked point is this plan."))
    sections += ["<h2>Kinds of matrices</h2>", _kind_table(plan), "<h2>Matrices</h2>", _matrix_table(plan)]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
            *sections,
            f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return resources.files("lqlora.reports").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summary(plan: Plan) -> str:
    bits = float(plan.bits_per_weight)
    factors = sum(plan.factor_bits.values())
    counted = "they count in what was asked" if plan.counts_factors else "they do not count in what was asked"
    rows = [
        ("Matrices", f"{len(plan.formats):,} with {plan.weight_count:,} weights"),
        ("Quantized parts", f"{bits:.4f} bits per weight, {_megabytes(plan.storage_bits)}"),
        ("Low-rank factors", f"{_megabytes(factors)}; {counted}"),
        *(("Asked", demand.describe()) for demand in plan.demands),
        ("Weighted squared error", f"{plan.error:.6g}"),
        ("Proof", f"{plan.status}, relative gap {plan.gap:.2g}, by {plan.solver}"),
        *([("Note", plan.note)] if plan.note else []),
    ]
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows) + "</dl>"


def _pictures(plan: Plan) -> Iterable[str]:
    told = "The table of matrices below has the numbers."
    yield _figure("Bits per weight", heat_map(plan.bits_by_layer(), "bits per weight", "{:.2f}".format), told)
    if len(set(plan.ranks.values())) > 1:
        yield _figure("Ranks", heat_map(plan.ranks_by_layer(), "rank", "{:.4g}".format), told)
    yield _figure("Share of the error", heat_map(plan.error_by_layer(), "share of the error", "{:.1%}".format), told)


def _figure(title: str, svg: str, caption: str) -> str:
    return (
        f'<h2>{title}</h2>\n<figure class="scroll" tabindex="0" aria-label="{title}">\n{svg}\n'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _kind_table(plan: Plan) -> str:
    kinds = plan.by_kind()
    largest = max((kind.error_share for kind in kinds), default=0.0)
    rows = [
        [
            _name(kind.name),
            _number(kind.matrices, f"{kind.matrices:,}"),
            _number(float(kind.bits_per_weight), f"{float(kind.bits_per_weight):.3f}"),
            _number(float(kind.lowest), f"{float(kind.lowest):.3f}"),
            _number(float(kind.highest), f"{float(kind.highest):.3f}"),
            _number(kind.ranks[0], str(kind.ranks[0])),
            _number(kind.ranks[1], str(kind.ranks[1])),
            *_share(kind.error_share, largest),
        ]
        for kind in kinds
    ]
    head = ("kind", "matrices", "bits per weight", "least", "most", "least rank", "largest rank", "share of the error")
    return _table(head, rows)


def _matrix_table(plan: Plan) -> str:
    bits, shares = plan.bits_by_matrix(), plan.error_by_matrix()
    rows = [
        [
            _name(name),
            _name(str(fmt)),
            _number(bits[name], f"{bits[name]:.3f}"),
            _number(plan.ranks[name], str(plan.ranks[name])),
            _number(math.prod(plan.shapes[name]), " × ".join(map(str, plan.shapes[name]))),
            _number(plan.costs[name], f"{plan.costs[name]:.4g}"),
            *_share(shares[name], max(shares.values())),
        ]
        for name, fmt in plan.formats.items()
    ]
    return _table(("matrix", "format", "bits per weight", "rank", "shape", "cost", "share of the error"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(
        f'<th scope="col"{"" if word in _WORDS else _NUMBER}><button type="button">{word}</button></th>'
        for word in head
    )
    lines = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}<td></td></tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def _name(text: str) -> str:
    return f"<td><code>{escape(text)}</code></td>"


def _number(value: float, text: str) -> str:
    return f'<td{_NUMBER} data-value="{value!r}">{text}</td>'


def _share(share: float, largest: float) -> tuple[str, str]:
    """Return a cell with a share, and one with a bar that is as long as the share is large among its column."""
    width = 100 * share / largest if largest else 0.0
    bar = f'<svg width="100" height="16" aria-hidden="true"><rect width="{width:.1f}" height="12" y="4"/></svg>'
    return _number(share, f"{share:.2%}"), f"<td>{bar}</td>"


def _megabytes(bits: int) -> str:
    return f"{bits / 8e6:,.2f} MB"
