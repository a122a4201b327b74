import pytest
import torch
from matplotlib.figure import Figure

from falign import divergences
from falign.errors import ConfigError
from falign.evaluation.frontier import frontier_point, frontier_summary
from falign.evaluation.frontier_run import check_picture, plot_frontier
from falign.metrics import Interval

METRICS = {
    "reward": Interval(0.8, 0.7, 0.9),
    "divergence/reverse_kl": Interval(0.4, 0.2, 0.6),
    "divergence/reverse_kl/vocabulary": Interval(0.5, 0.4, 0.6),
    "divergence/pearson_chi2": Interval(2.0, 1.0, 3.0),
}


def summary(axis="reverse_kl", size=8):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, size, generator=generator).tolist()
    groups = [[{"reward": reward} for reward in row] for row in rewards]
    names = ("reverse_kl", "pearson_chi2")
    return frontier_summary(
        [frontier_point("mine", METRICS, axis)],
        groups,
        axis=(axis, divergences.get(axis)),
        ideals={name: divergences.get(name) for name in names},
    )


def test_a_point_takes_the_estimate_that_varies_least():
    assert frontier_point("mine", METRICS, "reverse_kl")["divergence"] == 0.5
    point = frontier_point("mine", METRICS, "pearson_chi2")
    assert (point["divergence"], point["divergence_interval"]) == (2.0, [1.0, 3.0])


def test_points_that_lie_infinitely_far_are_left_out():
    lines = summary()
    assert all(len(line) == 57 for line in lines["ideal"].values())
    assert lines["limit"]["num_samples"] == 8
    far = frontier_summary([], [[{"reward": 0.0}, {"reward": 1.0}]], axis=("forward_kl", divergences.get("forward_kl")),
                           ideals={"pearson_chi2": divergences.get("pearson_chi2")})  # fmt: skip
    assert far["limit"]["divergence"] is None
    assert 0 < len(far["ideal"]["pearson_chi2"]) < 57
    assert [point["n"] for point in far["best_of_n"]] == [1, 2]


def test_the_picture_names_the_run_the_lines_and_where_the_samples_end(tmp_path, monkeypatch):
    said, save = [], Figure.savefig

    def keep(self, *arguments, **options):
        axis = self.axes[0]
        said.extend([text.get_text() for text in axis.texts] + axis.get_legend_handles_labels()[1])
        said.append(axis.get_xlabel())
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_frontier(summary(), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert {"mine", "ideal of reverse KL", "ideal of pearson chi2", "best of n (bound)"} <= set(said)
    assert "best of 8 reference samples: the lines end here" in said
    assert said[-1] == "reverse KL to the reference (nats)"


def test_a_policy_alone_is_drawn_too(tmp_path):
    alone = frontier_summary([frontier_point("mine", METRICS, "reverse_kl")], None,
                             axis=("reverse_kl", divergences.get("reverse_kl")), ideals={})  # fmt: skip
    plot_frontier(alone, tmp_path / "alone.svg")
    assert "<svg" in (tmp_path / "alone.svg").read_text()


@pytest.mark.parametrize("name", ["frontier.xyz", "nowhere/frontier.png"])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="give a file in an existing folder"):
        check_picture(tmp_path / name)
