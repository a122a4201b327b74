import time
from pathlib import Path

import pytest

from falign.report.curves import MOST_MARKS, MOST_POINTS, curve_plots
from falign.report.runs import ReportedRun
from falign.runs import RunFolder


def run(logs, label="run", index=0):
    return ReportedRun(label, index, RunFolder(Path(label)), {}, {}, logs, {}, {}, [], ())


def drawn(plots):
    return {plot.name: plot for plot in plots}


def test_training_is_a_line_and_held_out_values_are_marks():
    logs = [
        {"step": 0, "eval_loss": 0.7},
        {"step": 1, "loss": 0.6},
        {"step": 2, "loss": 0.5},
        {"step": 2, "eval_loss": 0.4},
    ]
    line, marks = drawn(curve_plots([run(logs)]))["loss"].series
    assert (line.x, line.y, line.marker) == ([1, 2], [0.6, 0.5], "")
    assert (marks.x, marks.y, marks.line) == ([0, 2], [0.7, 0.4], None)


def test_every_divergence_has_a_plot_of_its_own():
    logs = [{"step": i, "divergence/forward_kl": 1.0, "eval_divergence/alpha(0.5)": 2.0} for i in range(2)]
    plots = drawn(curve_plots([run(logs)]))
    assert plots["divergence-forward-kl"].title == "Divergence: forward KL"
    assert plots["divergence-alpha-0-5"].title == "Divergence: α(0.5)"


def test_a_single_step_is_no_curve():
    assert not curve_plots([run([{"step": 0, "eval_reward": 0.1}])])


def test_many_points_are_smoothed_and_stay_behind():
    logs = [{"step": i, "reward": float(i % 2)} for i in range(100)]
    behind, mean = drawn(curve_plots([run(logs)]))["reward"].series
    assert behind.faint
    assert list(behind.y) == [i % 2 for i in range(100)]
    assert mean.y[50] == pytest.approx((0 + 1 + 0 + 1 + 0) / 5)


def test_each_run_keeps_its_colour_in_every_plot():
    logs = [{"step": i, "loss": 1.0, "entropy": 2.0} for i in range(3)]
    plots = curve_plots([run(logs, "a", 0), run(logs, "b", 1)])
    colors = {(series.label.split(",")[0], series.color) for plot in plots for series in plot.series}
    assert len(plots) == 2
    assert len(colors) == 2


def test_held_out_values_alone_are_joined_by_a_line():
    logs = [{"step": i, "eval_divergence/total_variation": 0.1 * i} for i in range(3)]
    (series,) = drawn(curve_plots([run(logs)]))["divergence-total-variation"].series
    assert (series.line, series.marker) == ((), "o")


def test_a_long_run_is_drawn_by_the_extremes_and_means_of_its_parts():
    logs = [{"step": i, "loss": float(i % 7), "eval_loss": float(i)} for i in range(200_000)]
    logs[123_456]["loss"] = 1e30
    start = time.monotonic()
    behind, mean, marks = drawn(curve_plots([run(logs)]))["loss"].series
    assert time.monotonic() - start < 20
    assert len(behind.x) <= 2 * MOST_POINTS
    assert len(mean.x) <= MOST_POINTS
    assert len(marks.x) <= MOST_MARKS
    assert (behind.x[0], marks.x[-1], max(behind.y), min(behind.y)) == (0, 199_999, 1e30, 0.0)
    assert list(behind.x) == sorted(behind.x)
    # A spike is forgotten where its window ends.
    assert mean.y[-1] == pytest.approx(3.0, abs=0.01)
