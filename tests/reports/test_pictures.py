"""Pictures of plans and of frontiers."""

from __future__ import annotations

import dataclasses

import pytest

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError
from lqlora.reports import pareto_points, plot, plot_pareto
from tests.requirements import require_or_skip


@pytest.fixture(autouse=True)
def _drawable():
    require_or_skip("matplotlib", is_installed("matplotlib"))


def test_the_picture_shows_bits_and_errors(plan):
    from matplotlib.figure import Figure

    picture = plot(plan)
    assert isinstance(picture, Figure)
    images = [axes.images[0].get_array() for axes in picture.axes if axes.images]
    bits, shares = plan.bits_by_matrix(), plan.error_by_matrix()
    for image, values in zip(images, (bits, shares), strict=True):
        assert image.tolist() == [
            [values["layers.0.q"], values["layers.1.q"]],
            [values["layers.0.up"], values["layers.1.up"]],
        ]
    assert [label.get_text() for label in picture.axes[0].get_yticklabels()] == ["q", "up"]


def test_ranks_are_drawn_if_they_differ(mixture):
    assert len(set(mixture.ranks.values())) == 2
    titles = [axes.get_title() for axes in plot(mixture).axes]
    assert "Ranks" in titles


def test_a_name_with_dollars_is_no_formula(plan, tmp_path):
    strange = dataclasses.replace(plan, matrices={r"$\broken{$": plan.matrices["layers.0.q"]})
    plot(strange).savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_frontier_is_a_curve_through_its_points(table):
    plans = [lq.allocate(table, bits_per_weight=bits) for bits in (5, 3.1, 4)]
    line = plot_pareto(plans).axes[0].lines[0]
    assert line.get_xydata().tolist() == [list(point) for point in pareto_points(plans)]


def test_a_frontier_without_plans_is_refused():
    with pytest.raises(InvalidArgumentError, match="plans"):
        plot_pareto([])
