"""HTML that is escaped by construction, and tables made of it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from falign.evaluation.summaries import Estimate
from falign.report.metric_names import NOTHING, Number, number
from falign.report.palette import MARKERS
from falign.report.runs import ReportedRun

__all__ = ["Html", "code", "details", "interval", "joined", "legend", "markup", "run_name", "table", "tag"]


def run_name(run: ReportedRun) -> Html:
    """Return a run's name after its marker."""
    mark = Html(f'<path d="M0 6h28"/><path class="marker" d="{MARKERS[run.marker]}"/>')
    look = {"class": "mark", "viewBox": "0 0 28 12", "aria-hidden": "true", "style": f"--run: var(--{run.color.name})"}
    return tag("span", tag("svg", mark, attributes=look), run.label, attributes={"class": "run"})


def legend(runs: Sequence[ReportedRun]) -> Html:
    """Return the names of several runs in a line; nothing for one run."""
    names = [tag("li", run_name(run)) for run in runs]
    return tag("ul", *names, attributes={"class": "legend", "aria-label": "runs"}) if len(runs) > 1 else Html("")


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    groups: Sequence[tuple[str, int]] = (),
    text: bool = False,
    stacked: bool = False,
    quiet: bool = False,
) -> Html:
    """Return a table; the first cell of each row is its heading.

    Args:
        caption: The caption, which screen readers use too.
        columns: Headings of all columns.
        rows: Cells, as text or markup.
        groups: Headings over several columns, with their number of columns, after the first column.
        text: Whether cells hold text, not numbers; a text that is the same in all columns is written once.
        stacked: Whether intervals are below their values, not beside them.
        quiet: Whether to hide the caption, because a heading above says the same.
    """
    head = []
    if groups:
        over = [tag("th", name, attributes={"scope": "colgroup", "colspan": str(count)}) for name, count in groups]
        head.append(tag("tr", tag("td"), *over))
    head.append(tag("tr", *(tag("th", name, attributes={"scope": "col"}) for name in columns)))
    body = [_row(row, merged=text) for row in rows]
    inner = tag("table", tag("caption", caption), tag("thead", *head), tag("tbody", *body))
    # A focusable box can be scrolled with the keyboard.
    kinds = ["scroll", *(["text"] if text else []), *(["stacked"] if stacked else []), *(["quiet"] if quiet else [])]
    box = {"class": " ".join(kinds), "tabindex": "0", "role": "region", "aria-label": caption}
    return tag("div", inner, attributes=box)


def _row(row: Sequence[str], *, merged: bool) -> Html:
    heading = tag("th", row[0], attributes={"scope": "row"})
    if merged and len(row) > 2 and len(set(row[1:])) == 1:
        return tag("tr", heading, tag("td", row[1], attributes={"colspan": str(len(row) - 1), "class": "same"}))
    return tag("tr", heading, *(tag("td", cell) for cell in row[1:]))


def interval(found: Estimate | None, write: Callable[[Number | None], str] = number) -> Html:
    """Return a value with its interval, if it has one."""
    if found is None:
        return markup(NOTHING)
    if found.low is None or found.high is None:
        return markup(write(found.value))
    low, high = write(found.low), write(found.high)
    ends = f"{low.removesuffix('%') if high.endswith('%') else low} to {high}"
    return joined([write(found.value), " ", tag("small", ends)])


def details(summary: str, *children: str) -> Html:
    """Return content that is shown on demand."""
    return tag("details", tag("summary", summary), *children)


def code(text: str, label: str) -> Html:
    """Return lines of code, to be copied."""
    return tag("pre", tag("code", text), attributes={"tabindex": "0", "role": "region", "aria-label": label})


VOID = frozenset({"meta", "br", "wbr"})
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that a completion may contain, but HTML in UTF-8 may not."""


class Html(str):
    """Markup, inserted into a page without escaping."""

    __slots__ = ()


def markup(content: str) -> Html:
    r"""Return markup unchanged, and text escaped.

    Example:
        >>> markup("<b> & \x00"), markup(Html("<b>"))
        ('&lt;b&gt; &amp; �', '<b>')
    """
    return content if isinstance(content, Html) else Html(html.escape(UNWRITABLE.sub("\ufffd", content), quote=True))


def tag(name: str, *children: str, attributes: Mapping[str, str] | None = None) -> Html:
    """Return an element; children and values of attributes are escaped unless they are markup.

    Example:
        >>> tag("p", "1 < 2", tag("br"), attributes={"class": "note"})
        '<p class="note">1 &lt; 2<br></p>'
    """
    written = "".join(f' {key}="{markup(value)}"' for key, value in (attributes or {}).items())
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[str], separator: str = "") -> Html:
    """Concatenate parts, each escaped unless it is markup."""
    return Html(separator.join(map(markup, parts)))
