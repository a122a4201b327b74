"""The picture of a run over its steps: what it learns, and how far it goes from its reference for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from falign.durable import writing

__all__ = ["plot_curves"]

CHOSEN, REJECTED, PLAIN = "#0b7a75", "#c8553d", "#3d405b"
OFFLINE = {
    "loss": (("loss", PLAIN, ""),),
    "implicit reward": (("rewards/chosen", CHOSEN, "chosen"), ("rewards/rejected", REJECTED, "rejected")),
    "reward accuracy": (("rewards/accuracies", PLAIN, ""),),
    "log-ratio log π/π_ref (nats)": (
        ("logratios/chosen", CHOSEN, "chosen"),
        ("logratios/rejected", REJECTED, "rejected"),
    ),
}
ONLINE = {
    "reward": (("reward", PLAIN, ""),),
    "share of prompts solved": (("pass@1", REJECTED, "pass@1"), ("pass@8", CHOSEN, "pass@8")),
    "reverse KL to the reference (nats)": (("divergence/reverse_kl", PLAIN, ""),),
    "entropy per token (nats)": (("entropy", PLAIN, ""),),
    "length (tokens)": (("completions/length", PLAIN, ""),),
    "different bigrams within a group": (("distinct-2", PLAIN, ""),),
}


def plot_curves(logs: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw training as lines and held-out values as dots.

    Args:
        logs: The lines of ``metrics.jsonl``.
        path: The PNG to write.
        title: What the run is.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = ONLINE if any("eval_reward" in log or "reward" in log for log in logs) else OFFLINE
    columns = len(panels) // 2
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 6.4), layout="constrained", sharex=True)
    for axis, (label, series) in zip(axes.flat, panels.items(), strict=True):
        for name, color, legend in series:
            for key, style in ((name, {"linewidth": 1.8}), (f"eval_{name}", {"linestyle": "", "marker": "o"})):
                points = [(log["step"], log[key]) for log in logs if key in log]
                text = " ".join(part for part in (legend, "held out" if key != name else "training") if part)
                if points:
                    axis.plot(*zip(*points, strict=True), color=color, label=text, **style)
        axis.set_title(label, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    figure.suptitle(title, fontsize=11)
    with writing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(figure)
