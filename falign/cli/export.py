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
    classifier = "classifier"
    gguf = "gguf"


@with_options_named
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    format: Annotated[
        Format, typer.Option("--format", help="Adapter, merged weights, a reward model as classifier, or GGUF.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Target folder. Default: RUN/export/FORMAT.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of merged weights; auto: that of the base checkpoint.")] = "auto",
    base: Annotated[
        str | None,
        typer.Option("--base", help="The 16-bit model to merge into, if the run's base is stored quantized."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target folder.")] = False,
    trust_code: TrustCode = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="NAME", help="Repository of the Hub to upload the folder to.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    license: Annotated[
        str | None, typer.Option(help="License for the model card. Default: that in the card of the base model.")
    ] = None,
) -> None:
    """Write a trained model for use elsewhere, reload it, and verify that it gives the trained model's logits."""
    from falign.runs.export import export as write

    console = Terminal()
    with Terminal(stderr=True).status(f"exporting {escape(run)}"):
        exported = write(
            run,
            format.value,
            out=out,
            dtype=dtype,
            base=base,
            overwrite=overwrite,
            trust_code=trust_code,
            push=push,
            private=private,
            license=license,
        )
    console.print("wrote", Text(str(exported.path), style="bold"))
    (title, *_), *rows = exported.proof.table()
    table = Table(title, "maximum", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if exported.served:
        console.print(exported.served, highlight=False, markup=False)
    if exported.url:
        console.print("pushed to", Text(exported.url, style="bold"))
    if exported.four_bit_base:
        console.print(
            "[yellow]note:[/] the trained model has a quantized base, and the export has the original weights. The "
            "rest of the difference is its rounding, which has no bound: evaluate the export itself, or serve the "
            "adapter on the quantized base."
        )
