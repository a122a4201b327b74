"""The colors of the report, for light and dark pages and for PNG files; one color and one marker per run."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "FAINT",
    "INK",
    "MARKERS",
    "MUTED",
    "NAMED",
    "RUNS",
    "SURFACE",
    "Color",
    "css_variables",
    "marker_of",
    "run_color",
]


class Color(NamedTuple):
    """One color in both modes.

    Attributes:
        name: Name of the CSS variable, without its dashes.
        light: The color on a light page and in PNG files.
        dark: The color on a dark page.
    """

    name: str
    light: str
    dark: str


SURFACE = Color("surface", "#fdfdfc", "#15181c")
RAISED = Color("raised", "#f3f4f2", "#1e2329")
INK = Color("ink", "#1b1f24", "#e6e8ea")
MUTED = Color("muted", "#59616b", "#a3acb7")
FAINT = Color("faint", "#cfd4da", "#3b434d")
LINK = Color("link", "#155fa0", "#7fbcf3")
RUNS = (
    Color("run-1", "#1f6fb5", "#6cb4f2"),
    Color("run-2", "#b8520e", "#f2a162"),
    Color("run-3", "#1a7f4c", "#5fcf96"),
    Color("run-4", "#7b4cb4", "#bf9bf1"),
    Color("run-5", "#b5317b", "#f18dc1"),
    Color("run-6", "#0d7f8d", "#55cbd9"),
    Color("run-7", "#7a6a01", "#d3c14b"),
    Color("run-8", "#4b5566", "#aeb9c9"),
)
NAMED = (SURFACE, RAISED, INK, MUTED, FAINT, LINK, *RUNS)
MARKERS = {
    "o": "M14 2a4 4 0 1 0 .01 0z",
    "s": "M10 2h8v8h-8z",
    "^": "M14 1l5 9h-10z",
    "D": "M14 .5l5.5 5.5-5.5 5.5-5.5-5.5z",
    "v": "M14 11l5-9h-10z",
    "P": "M12 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M11 1l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z",
    "p": "M14 1l5 4-2 6h-6l-2-6z",
}
"""Markers by their matplotlib names, each as an SVG path centered in a box of 28 by 12."""


def run_color(index: int) -> Color:
    """Return the color of the run at an index; from the ninth run on, colors repeat with other markers."""
    return RUNS[index % len(RUNS)]


def marker_of(index: int) -> str:
    """Return the marker of the run at an index."""
    return list(MARKERS)[(index + index // len(RUNS)) % len(MARKERS)]


def css_variables(*, dark: bool) -> str:
    """Return the CSS declarations of one mode."""
    return " ".join(f"--{color.name}: {color.dark if dark else color.light};" for color in NAMED)
