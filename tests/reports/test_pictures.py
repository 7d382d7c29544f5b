"""Pictures of plans and of frontiers."""

from __future__ import annotations

import dataclasses

import pytest

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError
from lqlora.reports import pareto_points, plot, plot_pareto
from lqlora.reports.pictures import draw_errors
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


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (r"$\broken{$", r"$\broken{$"),
        ("\x1b[m\n\u202eq\ud800", r"\x1b[m\n\u202eq\ud800"),
        ("_q_", "_q_"),
        ("a" * 30 + "b" * 270, "a" * 23 + "…" + "b" * 24),
    ],
)
def test_names_are_labels_as_they_are(plan, name, label):
    strange = dataclasses.replace(plan, matrices={name: plan.matrices["layers.0.q"]})
    picture = plot(strange)
    curves = picture.add_subplot()
    draw_errors(curves, {name: [1.0, 0.5]}, title=name)
    labels = picture.axes[0].get_yticklabels()[:1], curves.get_legend().get_texts(), [curves.title]
    for (text,) in labels:
        assert text.get_text() == label
        assert not text.get_parse_math()


def test_a_picture_of_strange_names_is_drawn(plan, tmp_path):
    names = [r"$\broken{$", "\x1b[m\n\u202eq\ud800", "_q_", "a" * 300]
    strange = dataclasses.replace(plan, matrices=dict.fromkeys(names, plan.matrices["layers.0.q"]))
    plot(strange).savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_frontier_is_a_curve_through_its_points(table):
    plans = [lq.allocate(table, bits_per_weight=bits) for bits in (5, 3.1, 4)]
    line = plot_pareto(plans).axes[0].lines[0]
    assert line.get_xydata().tolist() == [list(point) for point in pareto_points(plans)]


def test_a_frontier_without_plans_is_refused():
    with pytest.raises(InvalidArgumentError, match="plans"):
        plot_pareto([])
