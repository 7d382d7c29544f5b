"""Pictures as SVG text, for pages that hold everything they show."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lqlora.reports.frontier import ParetoPoint
    from lqlora.reports.pictures import Grid

__all__ = ["curve", "escape", "heat_map"]

# Viridis: light and dark in gray too, and told apart by color-blind readers.
_COLORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
_CHARACTER = 7.3  # pixels of one character of a label, at 12 pixels
_ROW = 22


def escape(text: str) -> str:
    """Return text that HTML shows as it is; what is no visible character becomes a replacement character."""
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def heat_map(grid: Grid, label: str, show: Callable[[float], str]) -> str:
    """Return a picture of values by kind and layer; every cell tells its value when it is pointed at."""
    low, high = _range(grid)
    left = 12 + _CHARACTER * max((len(_shorten(kind)) for kind in grid.kinds), default=0)
    cell = min(48.0, max(10.0, 880 / max(1, len(grid.layers))))
    width, height = left + cell * len(grid.layers) + 8, _ROW * len(grid.kinds) + 66
    parts = [
        f'<text x="{left - 6:.0f}" y="{_ROW * row + 15}" class="end">{escape(_shorten(kind))}'
        f"<title>{escape(kind)}</title></text>"
        for row, kind in enumerate(grid.kinds)
    ]
    for row, kind in enumerate(grid.kinds):
        for column, layer in enumerate(grid.layers):
            value = float(grid.values[row, column])
            if not math.isnan(value):
                where = f"{kind}, layer {layer}: {show(value)}"
                parts.append(_cell((left + cell * column, _ROW * row), cell, _portion(value, low, high), where))
                if cell >= 40:
                    parts.append(_value(left + cell * (column + 0.5), row, show(value), _portion(value, low, high)))
    step = max(1, math.ceil(26 / cell))
    parts += [
        f'<text x="{left + cell * (column + 0.5):.1f}" y="{height - 50}" class="mid">{grid.layers[column]}</text>'
        for column in range(0, len(grid.layers), step)
    ]
    parts.append(_legend(left, height - 34, (f"layer; {label}", show(low), show(high))))
    return _svg(max(width, left + 420), height, f"{label} by kind of matrix and layer", parts)


def curve(points: Sequence[ParetoPoint], own: ParetoPoint) -> str:
    """Return a picture of errors over bits per weight, with one point marked."""
    width, height, left, bottom = 640, 300, 90, 260
    bits = [point.bits_per_weight for point in (*points, own)]
    is_log = all(point.error > 0 for point in (*points, own))
    errors = [math.log10(point.error) if is_log else point.error for point in (*points, own)]
    across = [left + 20 + (width - left - 60) * _portion(x, min(bits), max(bits)) for x in bits]
    down = [bottom - 20 - (bottom - 50) * _portion(y, min(errors), max(errors)) for y in errors]
    places = list(zip(across, down, (*points, own), strict=True))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places[:-1])
    parts = [
        f'<path d="M{left} 22V{bottom}H{width - 10}" class="axis"/><polyline points="{line}" class="line"/>',
        f'<text x="{left}" y="{height - 6}">bits per weight</text>',
        f'<text x="4" y="12">error{", logarithmic" if is_log else ""}</text>',
    ]
    parts += [_dot(x, y, point, "dot") for x, y, point in places[:-1]] + [_dot(*places[-1], "own")]
    for value in sorted({min(bits), max(bits), bits[-1]}):
        x = across[bits.index(value)]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" class="mid">{value:.2f}</text>')
    for place in sorted({errors.index(min(errors)), errors.index(max(errors))}):
        parts.append(f'<text x="{left - 6}" y="{down[place] + 4:.1f}" class="end">{_error(places[place][2])}</text>')
    return _svg(width, height, "Error over bits per weight", parts)


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">\n' + "\n".join(parts) + "\n</svg>"


def _cell(corner: tuple[float, float], width: float, portion: float, label: str) -> str:
    x, y = corner
    box = f'x="{x:.1f}" y="{y:.0f}" width="{width - 1:.1f}" height="{_ROW - 1}"'
    return f'<rect {box} fill="{_color(portion)}"><title>{escape(label)}</title></rect>'


def _value(x: float, row: int, text: str, portion: float) -> str:
    return f'<text x="{x:.1f}" y="{_ROW * row + 15}" class="mid {"on-dark" if portion < 0.6 else "on-light"}">{text}</text>'


def _legend(left: float, y: float, words: tuple[str, str, str]) -> str:
    title, low, high = words
    steps = "".join(
        f'<rect x="{left + 4 * step:.1f}" y="{y + 16:.0f}" width="4.5" height="10" class="scale" fill="{_color(step / 39)}"/>'
        for step in range(40)
    )
    ends = f'<text x="{left + 168:.1f}" y="{y + 25:.0f}">{low} (dark) to {high} (light)</text>'
    return f'<text x="{left:.1f}" y="{y + 6:.0f}">{escape(title)}</text>{steps}{ends}'


def _dot(x: float, y: float, point: ParetoPoint, name: str) -> str:
    label = f"{point.bits_per_weight:.4f} bits per weight: error {_error(point)}"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{name}"><title>{label}</title></circle>'


def _error(point: ParetoPoint) -> str:
    return f"{point.error:.3g}"


def _range(grid: Grid) -> tuple[float, float]:
    known = grid.values[~np.isnan(grid.values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def _portion(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _color(portion: float) -> str:
    ends = np.linspace(0, 1, len(_COLORS))
    red, green, blue = (round(float(np.interp(portion, ends, channel))) for channel in _COLORS.T)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _shorten(text: str) -> str:
    return text if len(text) <= 36 else f"…{text[-35:]}"
