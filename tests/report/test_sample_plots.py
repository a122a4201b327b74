from pathlib import Path

import pytest

from falign.evaluation.summaries import Estimate, SampleSummary
from falign.report.palette import MUTED, RUNS
from falign.report.runs import ReportedRun
from falign.report.sample_plots import BEFORE, frontier_plot, pass_plot
from falign.runs import RunFolder
from tests.report.summaries import samples_summary


def run(label, index=0):
    return ReportedRun(label, index, RunFolder(Path(label)), {}, {}, [], {}, {}, [], ())


def measured(label, index=0, **frontier):
    summary = samples_summary()
    summary["frontier"] |= frontier
    found = SampleSummary.model_validate(summary)
    return run(label, index), found, found.frontier


def test_pass_at_k_rises_with_k_in_order_and_is_dashed_before():
    metrics = {name: Estimate(value=value) for name, value in {"pass@8": 0.8, "pass@1": 0.2, "pass@16": 0.9}.items()}
    after, before = pass_plot("t", [(run("a"), metrics, ""), (run("a"), metrics, BEFORE)]).series
    assert list(after.x) == [1, 8, 16]
    assert list(after.y) == [0.2, 0.8, 0.9]
    assert after.line == ()
    assert before.line


def test_a_single_k_is_no_plot():
    assert pass_plot("t", [(run("a"), {"pass@1": Estimate(value=0.2), "reward": Estimate(value=1)}, "")]) is None


def test_the_ideal_of_a_run_s_own_divergence_has_its_colour_and_infinite_points_are_left_out():
    points = [{"beta": b, "divergence": d, "reward": r} for b, d, r in ((1, 0.2, 0.5), (0.1, 1.0, 0.8))]
    ideal = {"jensen_shannon": [*points, {"beta": 0, "divergence": float("inf"), "reward": 1}], "forward_kl": points}
    best, forward, own, trained = frontier_plot("p", [measured("a", ideal=ideal)]).series
    assert (best.label, forward.color, own.color) == ("best of n", MUTED.light, RUNS[0].light)
    assert list(own.x) == [0.2, 1.0]
    assert (trained.label, trained.x, trained.line) == ("a", [pytest.approx(2.8465)], None)


def test_an_ideal_that_few_samples_carry_is_pale_there():
    points = [
        {"beta": b, "divergence": d, "reward": 0.5, "effective_samples": n} for b, d, n in ((1, 0.2, 9), (0.1, 1.0, 2))
    ]
    series = frontier_plot("p", [measured("a", ideal={"reverse_kl": points}, best_of_n=[])]).series
    carried, whole, _ = series
    assert (list(carried.x), carried.faint) == ([0.2], False)
    assert (list(whole.x), whole.faint) == ([0.2, 1.0], True)


def test_checkpoints_of_a_run_are_one_line_by_divergence_and_lines_are_of_the_first_reference():
    late, early = ([{"divergence": d, "reward": r}] for d, r in ((2.0, 0.7), (0.5, 0.4)))
    found = [measured("a", points=late), measured("b", 1), measured("a", points=early, best_of_n=[])]
    plot = frontier_plot("p", [found[0], found[1], (found[0][0], *found[2][1:])])
    labels = [series.label for series in plot.series]
    assert labels == ["best of n", "ideal, Jensen–Shannon", "a", "b"]
    assert (plot.series[2].x, plot.series[2].y) == ([0.5, 2.0], [0.4, 0.7])
    assert "lines from a's reference" in plot.caption
