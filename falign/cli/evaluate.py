"""``falign evaluate``: benchmarks of rewards, samples, answers before a judge, and reward against divergence."""

from __future__ import annotations

import typer

from falign.cli import evaluate_frontier, evaluate_judge, evaluate_rewards, evaluate_samples

__all__ = ["app"]

app = typer.Typer(
    name="evaluate",
    help="Evaluate a run or a model: reward benchmarks, samples, LLM judges, reward against divergence.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command("rewards")(evaluate_rewards.rewards)
app.command("samples")(evaluate_samples.samples)
app.command("judge")(evaluate_judge.judge)
app.command("frontier")(evaluate_frontier.frontier)
