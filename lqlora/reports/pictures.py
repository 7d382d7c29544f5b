"""Data and pictures of plans and decompositions: plain numbers, and matplotlib is imported when one is drawn."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lqlora._optional import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

__all__ = ["Grid", "by_layer", "draw_errors", "draw_grid", "draw_pareto", "figure", "kind_and_layer"]


class Grid(NamedTuple):
    """Values by kind of matrix and by layer.

    Parameters
    ----------
    kinds : list of str
        One a row.
    layers : list of int
        One a column, sorted.
    values : ndarray of float64, shape (kinds, layers)
        NaN where there is no matrix.
    """

    kinds: list[str]
    layers: list[int]
    values: npt.NDArray[np.float64]


def kind_and_layer(name: str) -> tuple[str, int]:
    """Split the name of a matrix.

    Parameters
    ----------
    name : str
        Module name.

    Returns
    -------
    kind : str
        The name with ``*`` for each part that is a number; for the first number inside a part if none is.
    layer : int
        The first of those numbers, 0 if there is none.

    Examples
    --------
    >>> kind_and_layer("gpt2.h.3.experts.1.up")
    ('gpt2.h.*.experts.*.up', 3)
    >>> kind_and_layer("layer_3/kernel")
    ('layer_*/kernel', 3)
    """
    parts = name.split(".")
    if numbers := [part for part in parts if re.fullmatch(r"[0-9]+", part)]:
        return ".".join("*" if part in numbers else part for part in parts), int(numbers[0])
    number = re.search(r"[0-9]+", name)
    return (name, 0) if number is None else (re.sub(r"[0-9]+", "*", name, count=1), int(number[0]))


def by_layer(values: Mapping[str, float]) -> Grid:
    """Arrange values of named matrices by kind and by layer.

    Parameters
    ----------
    values : mapping of str to float
        By module name. What shares kind and layer, such as the experts of a layer, is added.

    Returns
    -------
    Grid
        Kinds in the order of first appearance; their last words alone where these differ.

    Examples
    --------
    >>> by_layer({"layers.0.q_proj": 2.0, "layers.1.q_proj": 4.0})
    Grid(kinds=['q_proj'], layers=[0, 1], values=array([[2., 4.]]))
    """
    keys = {name: kind_and_layer(name) for name in values}
    kinds = {kind: row for row, kind in enumerate(dict.fromkeys(kind for kind, _ in keys.values()))}
    layers = {layer: column for column, layer in enumerate(sorted({layer for _, layer in keys.values()}))}
    grid = np.full((len(kinds), len(layers)), np.nan)
    for name, (kind, layer) in keys.items():
        cell = kinds[kind], layers[layer]
        grid[cell] = np.nansum([grid[cell], values[name]])
    short = [kind.rpartition(".")[2] for kind in kinds]
    return Grid(short if len(set(short)) == len(kinds) else list(kinds), list(layers), grid)


def draw_grid(axes: Any, grid: Grid, title: str, label: str, *, form: str = "{x:g}") -> Any:
    """Draw values by kind and layer, the values of the scale formatted as ``form`` says; return the image."""
    image = axes.imshow(grid.values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(grid.kinds)), grid.kinds, parse_math=False)
    step = max(1, -(-len(grid.layers) // 15))
    axes.set_xticks(range(0, len(grid.layers), step), grid.layers[::step])
    axes.set_xlabel("layer")
    axes.set_title(title, parse_math=False)
    axes.figure.colorbar(image, ax=axes, label=label, format=form)
    return image


def draw_pareto(axes: Any, bits: Sequence[float], errors: Sequence[float]) -> None:
    """Draw errors over bits per weight; the error on a logarithmic scale if none is zero."""
    axes.plot(bits, errors, marker=".")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("weighted squared error")
    if min(errors, default=0.0) > 0:
        axes.set_yscale("log")


def draw_errors(axes: Any, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Draw relative errors by iteration, one curve a name."""
    for name, errors in curves.items():
        axes.plot(range(len(errors)), errors, marker=".", label=name)
    axes.set_xlabel("iteration (0: quantization alone)")
    axes.set_ylabel("relative error")
    axes.set_title(title)
    axes.legend()


def figure(**options: Any) -> Any:
    """Return an empty matplotlib figure that belongs to no window."""
    require("matplotlib", "plot", "A picture")
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    return Figure(layout="constrained", **options)
