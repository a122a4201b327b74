"""The sections of a report, one a file; each says what is missing where it has nothing to show."""

from falign.report.sections.base import Section
from falign.report.sections.benchmarks import benchmarks
from falign.report.sections.completions import completions
from falign.report.sections.data import data
from falign.report.sections.diversity import diversity, frontier
from falign.report.sections.held_out import curves, held_out
from falign.report.sections.trained import trained

__all__ = ["SECTIONS", "Section"]

SECTIONS = (held_out, trained, data, curves, benchmarks, frontier, diversity, completions)
"""In the order of the page."""
