"""``falign train`` and ``falign report``: run, and show what became better."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from falign.training import RunSummary

__all__ = ["report", "train"]

MUCH_LESS_LIKELY = 5.0  # nats of a whole completion

ROWS = {
    "reward": ("reward", "{:.4f}"),
    "reward, best of 8": ("reward/best_of_8", "{:.4f}"),
    "pass@1": ("pass@1", "{:.1%}"),
    "pass@8": ("pass@8", "{:.1%}"),
    "reverse KL to the reference": ("divergence/reverse_kl", "{:.3f}"),
    "different bigrams": ("distinct-2", "{:.3f}"),
    "tokens": ("completions/length", "{:.1f}"),
    "reward accuracy": ("rewards/accuracies", "{:.1%}"),
    "mean margin": ("rewards/margins", "{:+.3f}"),
    "loss": ("loss", "{:.4f}"),
    "log-ratio of chosen": ("logratios/chosen", "{:+.2f}"),
    "log-ratio of rejected": ("logratios/rejected", "{:+.2f}"),
    "entropy per token": ("entropy", "{:.3f}"),
}


def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value ...]", help="Fields to set otherwise.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train what a run file describes, and show what became better."""
    console = Console()
    # A divergence of one's own (module:attribute) lies beside the run file or in the working folder.
    sys.path[:0] = [str(Path.cwd()), str(Path(run_file).absolute().parent)]
    with console.status("starting"):
        from falign.training import load_run_file
        from falign.training import train as run

        config = load_run_file(run_file, overrides or [])
    show(run(config, resume=resume), console)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN ...", help="Run folders.")],
) -> None:
    """Show held-out metrics and answers of finished runs, before and after training."""
    from falign.training import RunFolder, RunSummary

    for run in runs:
        folder = RunFolder.open(run)
        metrics = folder.read_json("summary.json")
        show(RunSummary(folder, metrics["before"], metrics["after"], folder.read_json("samples.json")), Console())


def show(summary: RunSummary, console: Console) -> None:
    """Print held-out metrics and answers before and after."""
    if summary.before:
        table = Table("held out", "before", "after", title=escape(str(summary.folder.path)), title_justify="left")
        for label, (name, style) in ROWS.items():
            if name in summary.before:
                table.add_row(label, style.format(summary.before[name]), style.format(summary.after[name]))
        console.print(table)
        if summary.after.get("logratios/chosen", 0.0) < -MUCH_LESS_LIKELY:
            fall = -summary.after["logratios/chosen"]
            console.print(
                f"[yellow]note:[/] chosen completions became less likely too, by {fall:.1f} nats: only the margin is "
                "trained. A larger beta or a lower learning rate holds them; see docs/which-divergence.md."
            )
    for sample in summary.samples:
        answers = Table.grid(padding=(0, 2))
        for name in ("prompt", "before", "after"):
            answers.add_row(f"[bold]{name}", Text(sample[name]))
        console.print(answers)
    model = summary.folder.adapter if summary.folder.adapter.is_dir() else summary.folder.weights
    bold = "bold"
    console.print(
        "model", Text(str(model), style=bold), " curves", Text(str(summary.folder.path / "curves.png"), style=bold)
    )
    command = f"next: falign export {shlex.quote(str(summary.folder.path))} --format merged"
    console.print(command, highlight=False, markup=False, soft_wrap=True)
