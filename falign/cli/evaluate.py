"""``falign evaluate``: what a model is worth, measured in the same way for every method."""

from __future__ import annotations

import typer

from falign.cli import evaluate_frontier, evaluate_rewards, evaluate_samples

__all__ = ["app"]

app = typer.Typer(
    name="evaluate",
    help="Measure a run or a model: reward benchmarks, samples, the frontier.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command("rewards")(evaluate_rewards.rewards)
app.command("samples")(evaluate_samples.samples)
app.command("frontier")(evaluate_frontier.frontier)
