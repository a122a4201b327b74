"""The sections of a report, one per file; a section without content says what is missing."""

from falign.report.sections.base import Section
from falign.report.sections.benchmarks import benchmarks
from falign.report.sections.data import data
from falign.report.sections.diversity import diversity, frontier
from falign.report.sections.held_out import completions, curves, held_out
from falign.report.sections.judged import judged
from falign.report.sections.trained import trained

__all__ = ["SECTIONS", "Section"]

SECTIONS = (held_out, trained, data, curves, benchmarks, judged, frontier, diversity, completions)
"""The sections, in the order of the page."""
