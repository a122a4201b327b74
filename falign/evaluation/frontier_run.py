"""Plots of reward against divergence, from finished sample evaluations."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from falign import divergences
from falign.durable import write_whole, writing
from falign.errors import ConfigError
from falign.evaluation.frontier import frontier_point, frontier_summary, with_ideals
from falign.evaluation.sample_metrics import divergence_metrics, sample_metrics
from falign.evaluation.summaries import Frontier, SampleSummary, check_file, damaged, read_summary
from falign.json_lines import split_lines
from falign.runs.loading import Named, each_named, is_run
from falign.runs.named_code import import_from, require_trust

__all__ = ["Evaluated", "check_picture", "evaluate_frontier", "plot_frontier"]

SAME = ("prompts", "rewards", "max_new_tokens", "temperature", "tokenizer")
"""Settings, besides the reference, that must be equal in all evaluations of one plot."""


class Evaluated(NamedTuple):
    """A finished sample evaluation, read from its folder."""

    folder: Path
    summary: SampleSummary

    def rows(self, name: str) -> list[list[Any]] | None:
        """Return the rows of a file, grouped by prompt; None if the summary names no such file."""
        file = check_file(self.folder, name, self.summary)
        if file is None:
            return None
        try:
            rows = [json.loads(line) for line in split_lines(file.read_text(encoding="utf-8"))]
        except ValueError as error:
            raise damaged(file, str(error)) from error
        size, left = divmod(len(rows), self.summary.num_prompts)
        if left or not rows:
            raise damaged(file, f"{len(rows)} rows for {self.summary.num_prompts} prompts")
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def evaluate_frontier(
    runs: Named | Sequence[Named],
    out: str | Path,
    *,
    name: str | None = None,
    divergence: str = "reverse_kl",
    trust_code: bool = False,
) -> Frontier:
    """Plot reward against divergence, with the best of n and the ideal frontier of each divergence for comparison.

    Args:
        runs: Runs, their folders, or folders of sample evaluations.
        out: A plot (``.png``, ``.svg``, ``.pdf``), or its data (``.json``).
        name: Name of the runs' evaluation; by default all sample evaluations.
        divergence: Divergence on the horizontal axis.
        trust_code: Whether code that the evaluations name as their divergence may be imported.

    Raises:
        ConfigError: There is no such evaluation, one is damaged, or two cannot be compared.
    """
    target = Path(out)
    if target.suffix != ".json":
        check_picture(target)
    elif not target.parent.is_dir():
        raise ConfigError(f"out={target}: the folder {target.parent} does not exist; create it.")
    found = [each for run in each_named(runs, field="runs") for each in _evaluations(run, name)]
    own = {str(each.summary.divergence): each.folder for each in found if each.summary.divergence}
    for named, folder in own.items():
        code = {"summary.divergence": named} if ":" in named else {}
        require_trust(code, place=folder / "summary.json", trust_code=trust_code)
    if any(":" in named for named in (divergence, *own)):
        import_from(Path.cwd())
    axis = divergences.get(divergence, field="divergence")
    ideals = with_ideals(map(divergences.get, own))
    _require_comparable(found)
    points, anchors = [], None
    for each in found:
        groups, of_reference = each.rows("samples.jsonl"), each.rows("reference_samples.jsonl")
        assert groups is not None
        anchors = anchors or of_reference
        names = {axis.name: axis, "reverse_kl": divergences.get("reverse_kl")}
        metrics = sample_metrics(groups) | divergence_metrics(groups, names, reference_groups=of_reference)
        point = frontier_point(each.summary.label, metrics, axis.name)
        points.append({**point, "run": each.summary.model, "folder": str(each.folder)})
    data = frontier_summary(points, anchors, axis=(axis.name, axis), ideals=ideals)
    if target.suffix == ".json":
        write_whole(target, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    else:
        plot_frontier(data, target)
    return Frontier.model_validate(data)


def _evaluations(run: str, name: str | None) -> list[Evaluated]:
    """Return the sample evaluations of a run, in the order of their checkpoints, or the one of a folder."""
    folders = sorted(Path(run).glob(f"evaluation/{name or '*'}")) if is_run(run) else [Path(run)]
    found = []
    for folder in folders:
        if (folder / "summary.json").is_file() and (folder / "samples.jsonl").is_file():
            summary = read_summary(folder / "summary.json")
            if not isinstance(summary, SampleSummary):
                continue
            if summary.reference is None or summary.record["temperature"] != 1:
                raise ConfigError(
                    f"{folder} has no divergences: sample with reference=MODEL and temperature=1, or name another "
                    "evaluation."
                )
            found.append(Evaluated(folder, summary))
    if not found:
        named = f" named {name}" if name else ""
        raise ConfigError(f"{run} has no finished evaluation of samples{named}: evaluate its samples first.")
    return sorted(found, key=lambda each: (each.summary.checkpoint is None, each.summary.checkpoint or 0))


def _require_comparable(found: Sequence[Evaluated]) -> None:
    first = found[0]
    for other in found[1:]:
        records = [_settings_to_compare(each.summary.record) for each in (first, other)]
        if different := [key for key in records[0] if records[0][key] != records[1].get(key)]:
            raise ConfigError(
                f"{first.folder} and {other.folder} differ in {', '.join(different)}, so their rewards or divergences "
                "cannot be compared: evaluate both with the same prompts, rewards, limit, max_new_tokens and reference."
            )


def _settings_to_compare(record: Mapping[str, Any]) -> dict[str, Any]:
    reference = record.get("reference.weights", {k: v for k, v in record.items() if k.startswith("reference.")})
    return {**{key: record[key] for key in SAME}, "reference": reference}


POLICY, BEST, LIMIT = "#c8553d", "#3d405b", "0.55"
LINES = ("#0b7a75", "#5b8e7d", "#b08968", "#7d5ba6", "#4d7ea8", "#8a817c")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
ROOM = 1.15  # width of the plot, relative to the points that it must show
FEW = 5.0  # effective samples per prompt; where an ideal has fewer, its line is faint


def plot_frontier(data: Mapping[str, Any], path: Path) -> None:
    """Draw policies as points with intervals, the best of n, and the ideal frontier of each divergence.

    Args:
        data: See :func:`falign.evaluation.frontier.frontier_summary`.
        path: File of the plot; its suffix determines the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 5.0), layout="constrained")
    for i, (name, line) in enumerate(data["ideal"].items()):
        color, style = LINES[i % len(LINES)], STYLES[i % len(STYLES)]
        reliable = [point for point in line if point["effective_samples"] >= FEW]
        # The last reliable point belongs to both parts, so that the line has no gap.
        for part, alpha in ((reliable, 1.0), (line[max(len(reliable) - 1, 0) :], 0.3)):
            xs, ys = ([point[key] for point in part] for key in ("divergence", "reward"))
            label = f"ideal of {_readable(name)}" if part is reliable else None
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
    axis.set_xlabel(f"{_readable(data['divergence'])} to the reference (nats)")
    axis.set_title("mean reward", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[1]:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    with writing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(figure)


def check_picture(path: Path) -> None:
    """Refuse a plot that cannot be written, before anything is computed.

    Raises:
        ConfigError: The suffix names no format of plots, or the folder does not exist.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in kinds or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"out={path}: give a file in an existing folder, with one of the suffixes json, {', '.join(kinds)}."
        )


def _readable(name: str) -> str:
    return name.replace("_", " ").replace(" kl", " KL")


def _draw_limit(axis: Any, data: Mapping[str, Any]) -> None:
    """Mark the reward of the best samples of the reference, where the lines end."""
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
    # An ideal line can lead far to the right if f punishes dropped completions; do not let it squeeze the points.
    shown = max([limit["divergence"] or 0.0, *far, *(point["divergence"] for point in data["best_of_n"])])
    if max(ends, default=0.0) > ROOM * shown > 0:
        axis.set_xlim(right=ROOM * shown)
