"""The results of a run in the terminal: held-out metrics, and answers before and after training."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from falign.runs.summary import RunSummary

__all__ = ["show"]

MUCH_LESS_LIKELY = 5.0
"""Fall of the log-probability of chosen completions, in nats per completion, from which a note is shown."""


def show(summary: RunSummary, console: Console) -> None:
    """Print held-out metrics and answers before and after training, and where the files are."""
    from falign.models.heads import REWARD_HEAD
    from falign.report import held_out_rows

    if summary.before:
        table = Table("held out", "before", "after", title=escape(str(summary.folder.path)), title_justify="left")
        for label, name, style in held_out_rows(summary.before):
            table.add_row(label, style.format(summary.before[name]), style.format(summary.after[name]))
        console.print(table)
        if summary.after.get("logratios/chosen", 0.0) < -MUCH_LESS_LIKELY:
            fall = -summary.after["logratios/chosen"]
            console.print(
                f"[yellow]note:[/] chosen completions became less likely too, by {fall:.1f} nats, because the loss "
                "sees only the margin. A larger beta or a lower learning rate limits this: see "
                "docs/which-divergence.md."
            )
    for sample in summary.samples:
        answers = Table.grid(padding=(0, 2))
        for name in ("prompt", "before", "after"):
            answers.add_row(f"[bold]{name}", Text(getattr(sample, name)))
        console.print(answers)
    if summary.best is not None:
        console.print(f"kept: the model {summary.best}", highlight=False, markup=False, soft_wrap=True)
    model = summary.folder.adapter if summary.folder.adapter.is_dir() else summary.folder.weights
    bold = "bold"
    console.print(
        "model", Text(str(model), style=bold), " curves", Text(str(summary.folder.path / "curves.png"), style=bold)
    )
    form = "classifier" if (model / REWARD_HEAD).is_file() else "merged"
    command = f"next: falign export {shlex.quote(str(summary.folder.path))} --format {form}"
    console.print(command, highlight=False, markup=False, soft_wrap=True)
