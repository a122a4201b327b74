"""``falign evaluate samples``: reward, divergence, diversity and pass@k of sampled completions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from falign.cli.options import CommandTerminal, TrustCode, with_options_named
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.summaries import SampleSummary

__all__ = ["samples"]

SHARES = ("pass@", "clipped", "unique")
"""Prefixes of metrics that are shown in percent."""

PROMPTS, LINES = "Prompts and rewards", "Divergences and frontier"
"""Headings of the help."""


@with_options_named
def samples(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or any model.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="File, folder or Hub dataset. Default: the run's held-out prompts.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --prompts.", rich_help_panel=PROMPTS)] = "train",
    template: Annotated[
        str | None,
        typer.Option(help="The prompt, with columns in braces: '{question}'.", rich_help_panel=PROMPTS),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Read plain prompts as a user's turn, or as they are. Default: as the run did; for a model, as a turn "
            "if it has a chat template.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use only the first N prompts.", rich_help_panel=PROMPTS)
    ] = None,
    rewards: Annotated[
        str | None,
        typer.Option(
            help="A YAML file with the section rewards of a run file; or a run, for the rewards of an online run or "
            "the implicit reward of an offline one. Default: the run's own.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    pass_reward: Annotated[
        float | None,
        typer.Option(
            help="Reward from which a completion passes, for pass@k. Default: the online run's.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    num_completions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Completions per prompt. Default: as the run evaluates, or 8."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Maximum tokens per completion. Default: the run's, or 128.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="0 decodes greedily; divergences require 1.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of sampling and intervals.")] = 0,
    reference: Annotated[
        str | None,
        typer.Option(help="Reference of the divergences. Default: the run's.", rich_help_panel=LINES),
    ] = None,
    divergence: Annotated[
        list[str] | None,
        typer.Option(help="Also measure this divergence; may be repeated.", rich_help_panel=LINES),
    ] = None,
    anchors: Annotated[
        bool,
        typer.Option(help="Also sample the reference, for the comparison lines of the frontier."),
    ] = True,
    num_reference_completions: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Reference completions per prompt. Default: as for the policy.",
            rich_help_panel=LINES,
        ),
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Step of the run's checkpoint to evaluate. Default: the trained model.")
    ] = None,
    prompts_per_batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts sampled at once; fewer need less memory.")
    ] = 8,
    dtype: Annotated[str | None, typer.Option(help="Dtype of a model. Default: the checkpoint's.")] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Write results to RUN/evaluation/NAME. Default: samples, or samples-STEP."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; required for a model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, and replace existing samples.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Sample completions; measure reward, divergence, diversity, pass@k. If stopped, continues when run again."""
    from falign.evaluation.sample_evaluation import evaluate_samples
    from falign.evaluation.sample_options import samples_folder

    summary = evaluate_samples(
        model,
        prompts,
        split=split,
        template=template,
        chat=chat,
        limit=limit,
        rewards=rewards,
        pass_reward=pass_reward,
        num_completions=num_completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        reference=reference,
        divergence=divergence or (),
        anchors=anchors,
        num_reference_completions=num_reference_completions,
        checkpoint=checkpoint,
        prompts_per_batch=prompts_per_batch,
        dtype=dtype,
        name=name,
        out=out,
        overwrite=overwrite,
        trust_code=trust_code,
        console=CommandTerminal(stderr=True, highlight=False, soft_wrap=True),
    )
    _show(summary, samples_folder(model, name=name, checkpoint=checkpoint, out=out))


def _show(summary: SampleSummary, folder: Path) -> None:
    """Print each metric with its interval, next to the reference's value.

    Args:
        summary: The results.
        folder: The folder that holds them.
    """
    console, metrics = Terminal(highlight=False), summary.metrics
    title = f"{summary.num_prompts:,} prompts, {summary.num_completions} completions each"
    table = Table(Column(overflow="fold"), title=title, title_justify="left")
    table.add_column("policy", justify="right")
    with_reference = any(name.startswith("reference/") for name in metrics)
    if with_reference:
        table.add_column("reference", justify="right")
    for name, metric in metrics.items():
        if name.startswith("reference/"):
            continue
        style = "{:.1%}" if name.startswith(SHARES) else "{:.4g}"
        value, low, high = (style.format(number) for number in (metric.value, metric.low, metric.high))
        cells = [f"{value} ({low} to {high})"]
        if with_reference:
            other = metrics.get(f"reference/{name}")
            cells.append("" if other is None else style.format(other.value))
        table.add_row(escape(name), *cells)
    console.print(table)
    console.print("wrote", escape(str(folder)), soft_wrap=True)
