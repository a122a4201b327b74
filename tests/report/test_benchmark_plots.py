from pathlib import Path

from falign.evaluation.summaries import RewardSummary
from falign.report.palette import MUTED, RUNS
from falign.report.runs import ReportedRun
from falign.report.sample_plots import reliability_plot, score_plot
from falign.runs import RunFolder
from tests.report.summaries import rewards_summary


def found(*labels, **changes):
    summary = RewardSummary.model_validate(rewards_summary(**changes))
    return [
        (ReportedRun(label, i, RunFolder(Path(label)), {}, {}, [], {}, {}, [], ()), summary)
        for i, label in enumerate(labels)
    ]


def test_runs_come_first_and_baselines_once():
    plot = score_plot("rm_bench", found("a", "b"))
    assert plot.categories == ("a", "b", "length")
    assert [list(series.x) for series in plot.series] == [[0.6173], [0.6173], [0.5432]]
    assert [series.color for series in plot.series] == [RUNS[0].light, RUNS[1].light, MUTED.light]
    assert [list(series.y) for series in plot.series] == [[0], [1], [2]]


def test_empty_bins_are_left_out_and_thin_ones_are_pale():
    bins = [{"confidence": c, "accuracy": a, "count": n} for c, a, n in ((0.55, 0.5, 30), (0.9, 0.2, 9), (0.7, 0, 0))]
    scorers = {"implicit_reward": {"scores": {"score": 0.5}, "calibration": {"ece": 0.1, "brier": 0.2, "bins": bins}}}
    ideal, thin, bin_ = reliability_plot("x", found("a", scorers=scorers)).series
    assert (list(ideal.x), list(ideal.y)) == ([0.5, 1.0], [0.5, 1.0])
    assert (list(thin.x), thin.faint) == ([0.9], True)
    assert (list(bin_.x), list(bin_.y), bin_.faint) == ([0.55], [0.5], False)


def test_without_calibration_nothing_is_drawn():
    assert reliability_plot("x", found("a", scorers={"logprob": {"scores": {"score": 0.5}}})) is None
