"""Plots, each drawn twice: as SVG in the colors and fonts of the page, and as a self-contained PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from falign.report.metric_names import Number, number
from falign.report.palette import FAINT, INK, MARKERS, MUTED, NAMED, SURFACE
from falign.report.tables import Html, markup, tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DASHED", "DOTTED", "PNG_MARK", "SOLID", "Line", "Picture", "Plot", "Series", "file_name", "render"]

Line: TypeAlias = tuple[Number, ...]
"""Lengths of dashes and gaps, in units of the line width; empty for a solid line."""
SOLID: Line = ()
DASHED: Line = (4, 2)
DOTTED: Line = (1, 1.5)

PNG_MARK = "falign report"
"""Metadata of falign's own images, which it may overwrite."""

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "falign",  # the same runs give the same bytes
    "text.parse_math": False,  # a dollar sign in a run's name is not mathematics
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.edgecolor": MUTED.light,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "axes.labelcolor": MUTED.light,
    "text.color": INK.light,
    "grid.color": FAINT.light,
    "grid.linewidth": 0.7,
    "axes.formatter.limits": (-3, 4),
}


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        label: Name in the PNG's legend and in the alternative text; empty for none.
        x: Horizontal coordinates.
        y: Vertical coordinates.
        color: One of the palette's light colors.
        line: Style of the line; None draws only marks.
        marker: The marker, in the notation of matplotlib; empty for none.
        low: Lower ends of intervals.
        high: Upper ends of intervals.
        faint: Whether to draw it thin and pale, behind another series.
    """

    label: str
    x: Sequence[Number]
    y: Sequence[Number]
    color: str
    line: Line | None = SOLID
    marker: str = ""
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Plot:
    """The contents of a plot.

    Attributes:
        name: Name of the PNG file, without suffix: letters, digits and hyphens.
        title: Title.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        series: The series.
        caption: Explanation of lines and marks.
        categories: Names in place of 0, 1, 2 ... on the vertical axis; intervals are then horizontal.
        powers: Whether the horizontal axis is logarithmic with base 2.
        whole: Whether the horizontal axis has whole numbers.
        unit: Whether the vertical axis shows shares, from 0 to 1.
        key: Whether the page needs a legend, because colors and markers of runs do not identify the series.
        size: Width and height in inches.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""
    categories: tuple[str, ...] = ()
    powers: bool = False
    whole: bool = False
    unit: bool = False
    key: bool = False
    size: tuple[Number, Number] = (4.2, 2.8)


class Picture(NamedTuple):
    """A drawn plot.

    Attributes:
        name: Name of the PNG file.
        figure: The element for the page.
        png: Content of the PNG file.
    """

    name: str
    figure: Html
    png: bytes


def file_name(name: str) -> str:
    """Return a name in a form that is safe in file names.

    Example:
        >>> file_name("RM-Bench (hard)")
        'rm-bench-hard'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"


def render(plot: Plot) -> Picture:
    """Draw a plot for the page and as a PNG."""
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS), _any_letters():
        figure = _draw(plot)
        svg = _svg(figure, plot)
        png = _png(figure, plot)
    caption = [tag("strong", plot.title), *([" ", tag("span", plot.caption)] if plot.caption else [])]
    return Picture(plot.name, tag("figure", tag("figcaption", *caption), svg, *([_key(plot)] if plot.key else [])), png)


def _key(plot: Plot) -> Html:
    entries = [tag("li", _sample(series), " ", series.label) for series in plot.series if series.label]
    return tag("ul", *entries, attributes={"class": "key"})


def _sample(series: Series) -> Html:
    """Return a short sample of a line in its style."""
    names = {color.light: color.name for color in NAMED}
    drawn = "" if series.line is None else f'<path d="M0 6h28" stroke-dasharray="{_dashes(series.line)}"/>'
    if series.marker in MARKERS:
        drawn += f'<path class="marker" d="{MARKERS[series.marker]}"/>'
    look = f"--run: var(--{names[series.color]})"
    return tag(
        "svg", Html(drawn), attributes={"class": "mark", "viewBox": "0 0 28 12", "aria-hidden": "true", "style": look}
    )


def _dashes(line: Line) -> str:
    return " ".join(f"{1.7 * length:g}" for length in line)


@contextmanager
def _any_letters() -> Iterator[None]:
    """Ignore warnings about missing glyphs: the font of the PNG may lack letters of a run's name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _draw(plot: Plot) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter, ScalarFormatter

    figure = Figure(figsize=plot.size, layout="constrained")
    axes = figure.subplots()
    for series in plot.series:
        _add(axes, series, along_x=bool(plot.categories))
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if plot.categories else "y")
    axes.set_axisbelow(True)
    if plot.categories:
        axes.set_yticks(range(len(plot.categories)), labels=[_short(name) for name in plot.categories])
        axes.set_ylim(len(plot.categories) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if plot.whole:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if plot.powers:
        axes.set_xscale("log", base=2)
        values = sorted({x for series in plot.series for x in series.x})
        axes.xaxis.set_major_locator(FixedLocator(values[:: -(-len(values) // 8)]))
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if plot.unit:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _add(axes: Axes, series: Series, *, along_x: bool) -> None:
    look: dict[str, Any] = {"color": series.color, "linestyle": _style(series), "marker": series.marker or None}
    if series.faint:
        axes.plot(series.x, series.y, linewidth=0.9, alpha=0.4, **look)
        return
    if series.low is not None and series.high is not None:
        center = series.x if along_x else series.y
        ends = [
            [value - low for value, low in zip(center, series.low, strict=True)],
            [high - value for value, high in zip(center, series.high, strict=True)],
        ]
        look |= {"xerr" if along_x else "yerr": ends, "elinewidth": 1.6, "capsize": 3}
        axes.errorbar(series.x, series.y, linewidth=1.7, markersize=5.5, **look)
        return
    axes.plot(
        series.x, series.y, linewidth=1.7, markersize=5, markeredgecolor=SURFACE.light, markeredgewidth=0.6, **look
    )


def _style(series: Series) -> Any:
    return "none" if series.line is None else (0, series.line) if series.line else "-"


def _svg(figure: Figure, plot: Plot) -> Html:
    file = io.StringIO()
    figure.savefig(
        file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    opening, body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL).split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', opening)
    assert box is not None
    # Nothing is drawn outside of the axes, so clip paths have no effect.
    body = re.sub(r'<clipPath.*?</clipPath>| clip-path="[^"]*"', "", body, flags=re.DOTALL)
    # Ids are unique only within a plot. Only those of the markers are referenced; the others are removed.
    body = re.sub(r' id="(?!m[0-9a-f]{10}")[^"]*"', "", body)
    body = re.sub(r'(id="|href="#)(m[0-9a-f]{10})', rf"\g<1>{plot.name}-\g<2>", body.replace("xlink:href", "href"))
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    for color in NAMED:
        body = body.replace(color.light, f"var(--{color.name})")
    body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><").replace("rotate(-0", "rotate(0")
    width = round(plot.size[0] * 72)
    about = f'role="img" aria-label="{markup(_described(plot))}" style="max-width: {width * 2}px"'
    return Html(f'<svg class="plot" viewBox="{box[1]}" {about}>{body.strip()}')


def _png(figure: Figure, plot: Plot) -> bytes:
    figure.axes[0].set_title(plot.title, loc="left", fontsize=10)
    named = [series for series in plot.series if series.label and not series.faint]
    if named and not plot.categories:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=each.color, linestyle=_style(each), marker=each.marker or None, markersize=5)
            for each in named
        ]
        columns = 1 if max(len(each.label) for each in named) > 28 else 2
        rows = -(-len(named) // columns)
        figure.set_size_inches(plot.size[0], plot.size[1] + 0.3 + 0.19 * rows)
        labels = [_short(each.label, 52) for each in named]
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor=SURFACE.light, metadata={"Software": PNG_MARK})
    return file.getvalue()


def _short(label: str, length: int = 26) -> str:
    # matplotlib omits labels that begin with an underscore.
    label = label if len(label) <= length else f"{label[: length // 2]}…{label[-(length // 2 - 1) :]}"
    return f" {label}" if label.startswith("_") else label


def _described(plot: Plot) -> str:
    """Describe the plot in words, for screen readers."""
    parts = [f"{plot.title}. {plot.x_label} against {plot.y_label or 'runs'}."]
    for series in plot.series:
        if series.faint or not series.label or not len(series.x):
            continue
        if plot.categories or len(series.x) == 1:
            at = number(series.x[0]) if plot.categories else f"{number(series.y[0])} at {number(series.x[0])}"
            parts.append(f"{series.label}: {at}.")
        else:
            first, last = number(series.y[0]), number(series.y[-1])
            parts.append(f"{series.label}: from {first} at {number(series.x[0])} to {last} at {number(series.x[-1])}.")
    return " ".join(parts)
