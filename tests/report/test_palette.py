"""Contrast in both modes, by WCAG's formula."""

import pytest

from falign.report.palette import FAINT, INK, LINK, MUTED, RAISED, RUNS, SURFACE, marker_of, run_color

TEXT, GRAPHIC = 4.5, 3.0


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_texts_and_lines_stand_out(mode):
    grounds = [getattr(ground, mode) for ground in (SURFACE, RAISED)]
    for ground in grounds:
        for text in (INK, MUTED, LINK):
            assert contrast(getattr(text, mode), ground) >= TEXT
        for color in RUNS:
            assert contrast(getattr(color, mode), ground) >= GRAPHIC


def test_black_on_white_is_the_formula_s_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_no_two_roles_share_a_colour_by_which_the_page_tells_them_apart():
    lights = [color.light for color in (*RUNS, SURFACE, RAISED, INK, MUTED, FAINT, LINK)]
    assert len(set(lights)) == len(lights)


def test_sixteen_runs_differ_in_colour_or_marker():
    looks = {(run_color(i), marker_of(i)) for i in range(16)}
    assert len(looks) == 16
