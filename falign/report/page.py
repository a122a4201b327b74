"""The page: one file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files

from falign.report.html import markup, tag
from falign.report.palette import css_variables
from falign.report.runs import ReportedRun
from falign.report.sections import Section
from falign.report.tables import legend

__all__ = ["MARK", "page"]

MARK = '<meta name="generator" content="falign report">'
"""By which a file is known as a report that may be written anew."""


def page(runs: Sequence[ReportedRun], sections: Sequence[Section]) -> str:
    """Return the page of some runs."""
    names = ", ".join(run.label for run in runs)
    title = f"{names} · falign report"
    contents = [
        tag("li", tag("a", re.split("[:,]", part.title)[0], attributes={"href": f"#{part.id}"})) for part in sections
    ]
    parts = [
        tag("section", tag("h2", part.title), part.body, attributes={"id": part.id, "class": "part"})
        for part in sections
    ]
    heading = tag("h1", runs[0].label if len(runs) == 1 else f"{len(runs)} runs")
    top = tag("header", tag("p", "falign report", attributes={"class": "kicker"}), heading, legend(runs))
    nav = tag("nav", tag("ul", *contents), attributes={"aria-label": "sections"})
    foot = tag("footer", f"Written by falign {version('falign')} from the run folders. Logs are in nats.")
    body = tag("body", top, nav, tag("main", *parts), foot)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{markup(title)}</title>\n<style>\n{_style()}</style>\n</head>\n{body}\n</html>\n"
    )


def _style() -> str:
    css = files("falign.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        f":root {{ {css_variables(dark=False)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} }} }}\n{css}"
    )
