"""``falign evaluate samples``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import CommandTerminal, TrustCode, with_options_named
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.summaries import SampleSummary

__all__ = ["samples"]

SHARES = ("pass@", "clipped", "unique")
PROMPTS, LINES = "Prompts and rewards", "Divergences and frontier"


@with_options_named
def samples(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or any model.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file, folder or Hub name, as in a run file; if left out, the run's own held-out prompts.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of --prompts.", rich_help_panel=PROMPTS)] = "train",
    template: Annotated[
        str | None,
        typer.Option(help="The prompt, with a row's columns in braces: '{question}'.", rich_help_panel=PROMPTS),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Whether a plain prompt of --prompts is a user's turn. Default: the run's; else with a template.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many prompts, the first ones.", rich_help_panel=PROMPTS)
    ] = None,
    rewards: Annotated[
        str | None,
        typer.Option(
            help="A YAML file with the section rewards of a run file, or a run: an online run's rewards, an offline "
            "run's implicit reward. If left out, the run's own.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    pass_reward: Annotated[
        float | None,
        typer.Option(
            help="What a completion needs to pass, for pass@k; an online run has its own.", rich_help_panel=PROMPTS
        ),
    ] = None,
    num_completions: Annotated[
        int | None, typer.Option(min=1, help="Per prompt; if left out, as the run evaluates, or 8.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="If left out, the run's own, or 128.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily; divergences need 1.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and intervals.")] = 0,
    reference: Annotated[
        str | None,
        typer.Option(help="What the policy is compared with; if left out, the run's own.", rich_help_panel=LINES),
    ] = None,
    divergence: Annotated[
        list[str] | None,
        typer.Option(help="Measured besides the usual ones; may be given several times.", rich_help_panel=LINES),
    ] = None,
    anchors: Annotated[
        bool, typer.Option(help="Also sample the reference, for the frontier's lines.", rich_help_panel=LINES)
    ] = True,
    num_reference_completions: Annotated[
        int | None,
        typer.Option(
            min=2, help="Of the reference per prompt; if left out, as many as the policy's.", rich_help_panel=LINES
        ),
    ] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Of a run, the step of a checkpoint.")] = None,
    prompts_per_batch: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 8,
    dtype: Annotated[str | None, typer.Option(help="Of a model, the checkpoint's if left out.")] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Results go to RUN/evaluation/NAME; samples, or samples-STEP, if left out."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for the results, needed for a model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing samples, complete or not.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Sample completions and measure reward, divergence, diversity and pass@k; a stopped call continues if repeated."""
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
    """Print each metric with its interval, and beside it what the reference has.

    Args:
        summary: The results.
        folder: Where it lies.
    """
    console, metrics = Terminal(highlight=False), summary.metrics
    title = f"{summary.num_prompts:,} prompts, {summary.num_completions} completions each"
    table = Table("", title=title, title_justify="left")
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
