"""``falign export``: write a trained model for use elsewhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from falign.cli.options import TrustCode, with_options_named
from falign.terminal import Terminal

__all__ = ["Format", "export"]


class Format(StrEnum):
    """The form of an export."""

    adapter = "adapter"
    merged = "merged"


@with_options_named
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    format: Annotated[Format, typer.Option("--format", help="A PEFT adapter, or merged weights.")],
    out: Annotated[Path | None, typer.Option("--out", help="Target folder. Default: RUN/export/FORMAT.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of merged weights; auto: that of the base checkpoint.")] = "auto",
    base: Annotated[
        str | None,
        typer.Option("--base", help="The 16-bit model to merge into, if the run's base is stored in 4 bits."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target folder.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a trained model for use elsewhere, reload it, and verify that it gives the trained model's logits."""
    from falign.runs.export import export as write

    console = Terminal()
    with Terminal(stderr=True).status(f"exporting {escape(run)}"):
        exported = write(run, format.value, out=out, dtype=dtype, base=base, overwrite=overwrite, trust_code=trust_code)
    target, proof = exported.path, exported.proof
    console.print("wrote", Text(str(target), style="bold"))
    table = Table(f"logits on {proof.compared_tokens} tokens, {proof.dtype}", "maximum", title_justify="left")
    table.add_row("logit", f"{proof.max_abs_logit:.4g}")
    table.add_row("difference from the trained model", f"{proof.max_abs_logit_difference:.3g}")
    tolerance = f"{proof.bound * proof.max_abs_logit:.3g}"
    if proof.max_abs_export_error == proof.max_abs_logit_difference:
        table.add_row("tolerance", tolerance)
    else:
        table.add_row("difference caused by the export", f"{proof.max_abs_export_error:.3g}")
        table.add_row("tolerance of the export", tolerance)
    table.add_row("difference from the base model", f"{proof.max_abs_change_against_base:.3g}")
    console.print(table)
    if exported.served:
        console.print(exported.served, highlight=False, markup=False)
    if exported.four_bit_base:
        console.print(
            "[yellow]note:[/] the trained model has a 4-bit base, and the export has the original weights. The rest of "
            "the difference is the rounding to 4 bits, which has no bound: evaluate the export itself, or serve the "
            "adapter on the 4-bit base."
        )
