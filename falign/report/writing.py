"""Writing of a report: the page, and its images beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from falign.durable import naming, refuse_link, write_whole
from falign.errors import ConfigError, FalignError, one_line, without_passwords
from falign.report.drawing import PNG_MARK
from falign.report.palette import css_variables
from falign.report.runs import ReportedRun, read_runs
from falign.report.sections import SECTIONS, Section
from falign.report.tables import legend, markup, tag

__all__ = ["MARK", "WrittenReport", "made_of", "page", "report_path", "write_report"]


NAME = "report.html"


class WrittenReport(NamedTuple):
    """A report on disk.

    Attributes:
        page: The HTML file.
        figures: The folder of the PNG files.
        pictures: The PNG files.
        runs: The runs, as the page shows them.
    """

    page: Path
    figures: Path
    pictures: tuple[Path, ...]
    runs: tuple[ReportedRun, ...]


def report_path(runs: Sequence[str | Path], out: str | Path | None) -> Path:
    """Return the file of a report.

    Args:
        runs: The run folders.
        out: A folder, or a file with the suffix ``.html``; by default the folder of a single run, else the current one.

    Raises:
        ConfigError: The path is a link, or a file that is not a report.
    """
    if out is None:
        path = (Path(runs[0]) if len(runs) == 1 else Path()) / NAME
    else:
        path = Path(out)
        path = path if path.suffix.lower() in (".html", ".htm") and not path.is_dir() else path / NAME
    refuse_link(path)
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{path} exists and is not a report of falign: choose another `out`.")
    return path


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> WrittenReport:
    """Write the report of one or more runs.

    Args:
        runs: Run folders.
        out: As in :func:`report_path`.

    Returns:
        The page and its pictures, which lie in the folder ``NAME-figures`` beside ``NAME.html``.

    Raises:
        ConfigError: A path is not a run folder, a file in one is damaged, or another file or a link is in the place of
            the report or of an image.
    """
    path = report_path(runs, out)
    with _naming_the_runs(runs):
        read = read_runs(runs)
    sections = [made_of(section, read) for section in SECTIONS]
    folder = path.parent / f"{path.stem}-figures"
    pictures = {folder / f"{picture.name}.png": picture.png for part in sections for picture in part.pictures}
    for file in (path, folder, *pictures):
        refuse_link(file)
    for file in pictures:
        _refuse_foreign(file)
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
    for file, content in pictures.items():
        write_whole(file, content)
    write_whole(path, without_passwords(page(read, sections)))
    return WrittenReport(path, folder, tuple(pictures), tuple(read))


def made_of(section: Callable[[Sequence[ReportedRun]], Section], runs: Sequence[ReportedRun]) -> Section:
    """Return a section of the page.

    Args:
        section: One of ``SECTIONS``.
        runs: The runs of the report.

    Raises:
        ConfigError: A file of a run does not have the form that runs write.
    """
    with _naming_the_runs([run.folder.path for run in runs]):
        return section(runs)


def _refuse_foreign(picture: Path) -> None:
    if picture.exists() and PNG_MARK.encode() not in picture.read_bytes():
        raise ConfigError(f"{picture} exists and was not drawn by falign: move it, or choose another `out`.")


@contextmanager
def _naming_the_runs(runs: Sequence[str | Path]) -> Iterator[None]:
    try:
        yield
    except FalignError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(
            f"A file of {', '.join(map(str, runs))} does not have the form that runs write ({reason}): restore it, or "
            "run again."
        ) from error


MARK = '<meta name="generator" content="falign report">'
"""Marks a file as a report, which falign may overwrite."""


def page(runs: Sequence[ReportedRun], sections: Sequence[Section]) -> str:
    """Return the page as HTML."""
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
