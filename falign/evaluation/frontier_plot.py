"""The picture of reward against divergence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falign.durable import writing
from falign.errors import ConfigError

__all__ = ["check_picture", "plot_frontier"]

POLICY, BEST, LIMIT = "#c8553d", "#3d405b", "0.55"
LINES = ("#0b7a75", "#5b8e7d", "#b08968", "#7d5ba6", "#4d7ea8", "#8a817c")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
ROOM = 1.15
FEW = 5.0  # samples of a prompt that share the weight of an ideal; below, its line is faint


def plot_frontier(data: Mapping[str, Any], path: Path) -> None:
    """Draw policies as dots with their intervals, the best of n, and the ideal of each divergence.

    Args:
        data: As :func:`falign.evaluation.frontier_summary.frontier_summary` returns it.
        path: The picture; its suffix says which kind.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 5.0), layout="constrained")
    for i, (name, line) in enumerate(data["ideal"].items()):
        color, style = LINES[i % len(LINES)], STYLES[i % len(STYLES)]
        known = [point for point in line if point["effective_samples"] >= FEW]
        # The last point that is known belongs to both parts.
        for part, alpha in ((known, 1.0), (line[max(len(known) - 1, 0) :], 0.3)):
            xs, ys = ([point[key] for point in part] for key in ("divergence", "reward"))
            label = f"ideal of {_spoken(name)}" if part is known else None
            axis.plot(xs, ys, color=color, linestyle=style, linewidth=1.6, alpha=alpha, label=label)
    if best := data["best_of_n"]:
        xs, ys = ([point[key] for point in best] for key in ("divergence", "reward"))
        axis.plot(xs, ys, color=BEST, linewidth=1.0, marker="o", markersize=3.5, label="best of n (bound)")
        for point in best:
            axis.annotate(
                str(point["n"]), (point["divergence"], point["reward"]), (3, -9), textcoords="offset points",
                fontsize=7, color=BEST,
            )  # fmt: skip
    _draw_limit(axis, data)
    runs: defaultdict[str, list[Any]] = defaultdict(list)
    for point in data["points"]:
        runs[point.get("run", point["label"])].append(point)
    for number, points in enumerate(runs.values()):
        xs, ys = ([point[key] for point in points] for key in ("divergence", "reward"))
        axis.plot(xs, ys, color=POLICY, linewidth=1.0, alpha=0.6)
        for point in points:
            x, y = point["divergence"], point["reward"]
            spans = [[[v - low], [high - v]] for v, (low, high) in
                     ((x, point["divergence_interval"]), (y, point["reward_interval"]))]  # fmt: skip
            axis.errorbar([x], [y], xerr=spans[0], yerr=spans[1], color=POLICY, marker="D", markersize=5, linewidth=0.9)
            axis.annotate(
                point["label"], (x, y), (7, (5, -12)[number % 2]), textcoords="offset points", fontsize=8, color=POLICY
            )
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{_spoken(data['divergence'])} to the reference (nats)")
    axis.set_title("mean reward", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[1]:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    with writing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(figure)


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be written, before anything is computed.

    Raises:
        ConfigError: The suffix is not one of a picture, or the folder is not there.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in kinds or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"out={path}: give a file in an existing folder with one of the suffixes json, {', '.join(kinds)}."
        )


def _spoken(name: str) -> str:
    return name.replace("_", " ").replace(" kl", " KL")


def _draw_limit(axis: Any, data: Mapping[str, Any]) -> None:
    """Say where samples of the reference end, beyond which the lines know nothing."""
    limit = data["limit"]
    if limit is None:
        return
    axis.axhline(limit["reward"], color=LIMIT, linewidth=0.8, linestyle=(0, (2, 3)))
    axis.annotate(
        f"best of {limit['num_samples']} reference samples: the lines end here",
        (0.01, limit["reward"]), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=7, color="0.4",
    )  # fmt: skip
    far = [point["divergence"] for point in data["points"]]
    ends = [line[-1]["divergence"] for line in data["ideal"].values() if line]
    # As β falls, the ideal line is unbounded for a divergence that penalizes lost support.
    shown = max([limit["divergence"] or 0.0, *far, *(point["divergence"] for point in data["best_of_n"])])
    if max(ends, default=0.0) > ROOM * shown > 0:
        axis.set_xlim(right=ROOM * shown)
