import io
import warnings

import pytest
from matplotlib.image import imread

from falign.report.drawing import DASHED, Plot, Series, render
from falign.report.palette import RUNS
from tests.report.page_text import Page

BLUE = RUNS[0].light


def plot(*series, **changes):
    return Plot("a-plot", "A plot", "step", "nats", series, **changes)


def test_colours_are_variables_of_the_page_and_letters_are_letters():
    picture = render(plot(Series("run", [0, 1, 2], [1.0, 0.5, 0.25], BLUE), caption="how to read it"))
    page = Page(picture.figure)
    assert "var(--run-1)" in picture.figure
    assert BLUE not in picture.figure
    assert "step" in page.words()
    assert "how to read it" in page.words()
    assert "A plot. step against nats. run: from 1 at 0 to 0.25 at 2." in picture.figure


def test_two_plots_of_a_page_share_no_ids():
    series = Series("run", [0, 1], [1.0, 2.0], BLUE, marker="o")
    ids = [Page(render(Plot(name, "t", "x", "y", (series,))).figure).ids for name in ("one", "two")]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])


def test_a_png_has_a_legend_below_its_plot():
    bare = render(plot(Series("", [0, 1], [1.0, 2.0], BLUE)))
    named = render(plot(Series("one", [0, 1], [1.0, 2.0], BLUE), Series("two", [0, 1], [2.0, 1.0], BLUE, line=DASHED)))
    assert imread(io.BytesIO(named.png)).shape[0] > imread(io.BytesIO(bare.png)).shape[0]


@pytest.mark.parametrize("name", ["$a_b", "_hidden", "运行", "<b>&amp;", "a" * 200])
def test_any_name_of_a_run_is_drawn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = render(
            plot(Series(name, [0.1], [0], BLUE, line=None, marker="o", low=[0.05], high=[0.2]), categories=(name,))
        )
        render(plot(Series(name, [0, 1], [1.0, 2.0], BLUE)))
    Page(picture.figure)
    assert "<b>" not in picture.figure


def test_intervals_lie_about_their_values():
    picture = render(
        plot(
            Series("r", [1, 2, 4], [0.2, 0.4, 0.6], BLUE, low=[0.1, 0.3, 0.5], high=[0.3, 0.5, 0.7]),
            powers=True,
            unit=True,
        )
    )
    words = Page(picture.figure).words()
    assert "100%" in words
    assert "1 2 4" in words
