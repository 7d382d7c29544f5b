"""Pictures of plans and Pareto frontiers, drawn with matplotlib, which is imported at the first picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lqlora._messages import shortened
from lqlora._optional import require
from lqlora.errors import InvalidArgumentError
from lqlora.reports.frontier import pareto_points
from lqlora.reports.grouping import bits_by_layer, error_by_layer, ranks_by_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lqlora.allocation.plan import Plan
    from lqlora.reports.grouping import Grid

__all__ = ["draw_errors", "draw_grid", "figure", "plot", "plot_pareto"]

#: Most characters of a name in a picture. Longer names are cut in the middle, because they would leave no room.
_LONGEST = 48


def plot(plan: Plan) -> Any:
    """Draw bits per weight, ranks if they differ, and shares of the error, by kind of matrix and layer.

    Parameters
    ----------
    plan : Plan
        Any plan.

    Returns
    -------
    matplotlib.figure.Figure
        Figure without a window: save it, or show it in a notebook.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    bits = bits_by_layer(plan)
    grids = [(bits, f"{float(plan.bits_per_weight):.3f} bits per weight", "bits per weight", "{x:g}")]
    if len(set(plan.ranks.values())) > 1:
        grids.append((ranks_by_layer(plan), "Ranks", "rank", "{x:g}"))
    grids.append((error_by_layer(plan), "Share of the weighted squared error", "share", "{x:.1%}"))
    picture = figure(figsize=(8, len(grids) * max(3.0, 1.2 + 0.25 * len(bits.kinds))))
    # Two grids at least: for a single one, subplots would return one Axes and not an array of them.
    for axes, (grid, title, label, form) in zip(picture.subplots(len(grids)), grids, strict=True):
        draw_grid(axes, grid, title, label, form=form)
    return picture


def plot_pareto(plans: Iterable[Plan]) -> Any:
    """Draw the errors of plans over their bits per weight.

    The error has a logarithmic scale if none is zero.

    Parameters
    ----------
    plans : iterable of Plan
        One or more plans of one cost table.

    Returns
    -------
    matplotlib.figure.Figure
        Figure without a window: save it, or show it in a notebook.

    Raises
    ------
    InvalidArgumentError
        If there is no plan, the plans are of different matrices, or some count the factors and others do not.
    MissingDependencyError
        If matplotlib is not installed.
    """
    points = pareto_points(plans)
    if not points:
        raise InvalidArgumentError("plans must hold at least one plan, got none.")
    picture = figure(figsize=(6, 4))
    axes = picture.add_subplot()
    bits, errors = zip(*points, strict=True)
    axes.plot(bits, errors, marker=".")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("weighted squared error")
    if min(errors) > 0:  # zero has no place on a logarithmic axis
        axes.set_yscale("log")
    return picture


def draw_grid(axes: Any, grid: Grid, title: str, label: str, *, form: str = "{x:g}") -> Any:
    """Draw values by kind and layer as an image with a color bar.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Empty axes.
    grid : Grid
        Values.
    title, label : str
        Texts above the image and beside the color bar.
    form : str, default "{x:g}"
        Format of the numbers at the color bar, with ``x`` as the value.

    Returns
    -------
    matplotlib.image.AxesImage
        The image.
    """
    # Names come from files of others. A "$" in one must not start a formula, hence parse_math=False.
    image = axes.imshow(grid.values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(grid.kinds)), [_label(kind) for kind in grid.kinds], parse_math=False)
    step = max(1, -(-len(grid.layers) // 15))  # at most 15 labels
    axes.set_xticks(range(0, len(grid.layers), step), grid.layers[::step])
    axes.set_xlabel("layer")
    axes.set_title(_label(title), parse_math=False)
    axes.figure.colorbar(image, ax=axes, label=label, format=form)
    return image


def draw_errors(axes: Any, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Draw relative errors by iteration of the decomposition.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Empty axes.
    curves : mapping of str to sequence of float
        One curve for each name. Entry 0 is the error of quantization alone.
    title : str
        Text above the curves.
    """
    lines = [axes.plot(range(len(errors)), errors, marker=".")[0] for errors in curves.values()]
    axes.set_xlabel("iteration (0: quantization alone)")
    axes.set_ylabel("relative error")
    axes.set_title(_label(title), parse_math=False)
    # Labels are given here and not to the curves: matplotlib leaves out a curve whose label begins with an underscore.
    for text in axes.legend(lines, [_label(name) for name in curves]).get_texts():
        text.set_parse_math(False)


def _label(name: str) -> str:
    """Return a name as a picture shows it: on one line, without characters that cannot be printed, and not too long."""
    return shortened(name, _LONGEST)


def figure(**options: Any) -> Any:
    """Return an empty matplotlib figure without a window.

    Parameters
    ----------
    **options
        Options of ``matplotlib.figure.Figure``.

    Returns
    -------
    matplotlib.figure.Figure
        Figure with constrained layout.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    require("matplotlib", "plot", "A picture")
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    # Not pyplot.figure: pyplot would keep the figure alive, and may open a window.
    return Figure(layout="constrained", **options)
