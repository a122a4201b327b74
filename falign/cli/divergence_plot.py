"""The picture of f and f′."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from falign.divergences import Divergence
from falign.durable import writing
from falign.errors import ConfigError

__all__ = ["plot_divergences"]


def plot_divergences(divergences: Sequence[Divergence], path: Path) -> None:
    """Draw f and f′ over the density ratio u on a logarithmic axis.

    Args:
        divergences: One line each.
        path: The picture; its suffix (.png, .svg, .pdf) says which kind.

    Raises:
        ConfigError: The suffix is not one of a picture, or the folder is not there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    kinds = sorted(figure.canvas.get_supported_filetypes())
    kind = path.suffix.lstrip(".").lower()
    if kind not in kinds or not path.absolute().parent.is_dir():
        plt.close(figure)
        raise ConfigError(
            f"--plot {path}: give a file in an existing folder with one of the suffixes {', '.join(kinds)}."
        )
    log_u = torch.linspace(-4, 4, 801, dtype=torch.float64)
    colors = plt.get_cmap("turbo")(torch.linspace(0.05, 0.95, max(len(divergences), 2)).numpy())
    styles = ("-", "--", "-.", ":")
    for i, divergence in enumerate(divergences):
        look = {"label": divergence.name, "color": colors[i], "linestyle": styles[i % 4], "linewidth": 1.6}
        left.plot(log_u.exp(), divergence.f(log_u), **look)
        right.plot(log_u.exp(), divergence.f_prime(log_u), **look)
    for axis, title, limits in (
        (left, "f(u): what a ratio costs", (0, 4)),
        (right, "f′(u): implicit reward over β", (-5, 5)),
    ):
        axis.set(xscale="log", ylim=limits, xlabel="u = π/π_ref")
        axis.set_title(title, loc="left", fontsize=11)
        axis.axvline(1, color="0.6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    right.axhline(0, color="0.6", linewidth=0.8)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=kind)
    plt.close(figure)
