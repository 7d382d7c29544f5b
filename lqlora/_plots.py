"""Pictures of plans and decompositions. They take plain numbers, and matplotlib is imported when one is drawn."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._optional import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

__all__ = ["by_layer", "draw_bits", "draw_errors", "figure"]


def by_layer(values: Mapping[str, float]) -> tuple[list[str], list[int], npt.NDArray[np.float64]]:
    """Arrange values of named matrices by kind and by layer.

    Parameters
    ----------
    values : mapping of str to float
        By module name. The first number in a name is taken as the layer, the rest as the kind.

    Returns
    -------
    kinds : list of str
        In the order of first appearance; their last words alone where these differ.
    layers : list of int
        Sorted.
    grid : ndarray of float64, shape (kinds, layers)
        NaN where there is no matrix.

    Examples
    --------
    >>> by_layer({"layers.0.q_proj": 2.0, "layers.1.q_proj": 4.0})
    (['q_proj'], [0, 1], array([[2., 4.]]))
    """
    keys = {}
    for name in values:
        number = re.search(r"\d+", name)
        keys[name] = (re.sub(r"\d+", "*", name, count=1), int(number[0]) if number else 0)
    kinds = list(dict.fromkeys(kind for kind, _ in keys.values()))
    layers = sorted({layer for _, layer in keys.values()})
    grid = np.full((len(kinds), len(layers)), np.nan)
    for name, (kind, layer) in keys.items():
        grid[kinds.index(kind), layers.index(layer)] = values[name]
    short = [kind.rpartition(".")[2] for kind in kinds]
    return (short if len(set(short)) == len(kinds) else kinds), layers, grid


def draw_bits(axes: Any, values: Mapping[str, float], title: str) -> Any:
    """Draw bits per weight as a grid of kinds and layers; return the image."""
    kinds, layers, grid = by_layer(values)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=2.0)
    axes.set_yticks(range(len(kinds)), kinds)
    step = -(-len(layers) // 15)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_xlabel("layer")
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, label="bits per weight")
    return image


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
