"""Held-out metrics of several runs side by side, as a table in Markdown, and their curves as a picture.

    python scripts/compare_runs.py runs/fdpg-word runs/fdpg-word-tv --metrics reward divergence/reverse_kl \
        --curves reward entropy --out docs/images/fdpg-word.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from falign.runs import RunFolder

COLORS = ("#0b7a75", "#c8553d", "#3d405b", "#e0a458", "#7b2d8b", "#5b8e7d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; NAME=FOLDER gives one a name")
    parser.add_argument("--metrics", nargs="+", required=True, help="held-out metrics, for the table")
    parser.add_argument("--curves", nargs="*", default=[], help="training metrics, a panel each")
    parser.add_argument("--pass-at-k", action="store_true", help="a panel of held-out pass@k against k")
    parser.add_argument("--smooth", type=int, default=5, help="steps that a point of a curve is the mean of")
    parser.add_argument("--out", type=Path, help="the picture, a PNG")
    arguments = parser.parse_args()
    runs = dict(named(run) for run in arguments.runs)
    print(table(runs, arguments.metrics))
    if arguments.out is not None:
        draw(runs, arguments.curves, pass_at_k=arguments.pass_at_k, smooth=arguments.smooth, out=arguments.out)


def named(run: str) -> tuple[str, RunFolder]:
    name, equals, path = run.partition("=")
    return (name, RunFolder.open(path)) if equals else (Path(run).name, RunFolder.open(run))


def table(runs: dict[str, RunFolder], metrics: list[str]) -> str:
    rows = [["run", *metrics], ["---"] * (len(metrics) + 1)]
    for name, folder in runs.items():
        summary = folder.read_json("summary.json")
        if len(rows) == 2:  # all of them start at the same model
            rows.append(["before", *(shown(summary["before"].get(metric)) for metric in metrics)])
        rows.append([name, *(shown(summary["after"].get(metric)) for metric in metrics)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def draw(runs: dict[str, RunFolder], metrics: list[str], *, pass_at_k: bool, smooth: int, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = len(metrics) + pass_at_k
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.6), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=False):
        for color, (name, folder) in zip(COLORS, runs.items(), strict=False):
            # Held-out values are means over many prompts already.
            points = series(folder.metrics(), metric, 1 if metric.startswith("eval_") else smooth)
            axis.plot(*points, color=color, label=name, linewidth=1.8)
        axis.set_title(metric.replace("eval_", "held-out "), fontsize=10, loc="left")
        axis.set_xlabel("optimizer step")
    if pass_at_k:
        draw_pass_at_k(axes[0][-1], runs)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def draw_pass_at_k(axis: Any, runs: dict[str, RunFolder]) -> None:
    summaries = {name: folder.read_json("summary.json") for name, folder in runs.items()}
    before = next(iter(summaries.values()))["before"]
    lines = [("before", "#8a8a8a", before)]
    lines += [(name, color, summaries[name]["after"]) for color, name in zip(COLORS, summaries, strict=False)]
    for name, color, metrics in lines:
        points = {int(key.removeprefix("pass@")): value for key, value in metrics.items() if key.startswith("pass@")}
        axis.plot(list(points), list(points.values()), color=color, label=name, linewidth=1.8, marker="o", markersize=3)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_title("held-out pass@k", fontsize=10, loc="left")
    axis.set_xlabel("k")


def series(logs: list[dict[str, Any]], metric: str, smooth: int) -> tuple[list[int], list[float]]:
    points = [(log["step"], log[metric]) for log in logs if metric in log]
    means = []
    for i in range(len(points)):
        window = [value for _, value in points[max(0, i + 1 - smooth) : i + 1]]
        means.append(sum(window) / len(window))
    return [step for step, _ in points], means


if __name__ == "__main__":
    main()
