"""``falign export``."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from falign.cli.options import TrustCode
from falign.errors import ConfigError, FalignError
from falign.runs.loading import load_trained
from falign.terminal import Terminal

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Format", "export"]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's --max-lora-rank."""


class Format(StrEnum):
    """The form of an export."""

    adapter = "adapter"
    merged = "merged"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    format: Annotated[Format, typer.Option("--format", help="An adapter in PEFT's layout, or merged weights.")],
    out: Annotated[Path | None, typer.Option("--out", help="Target folder; RUN/export/FORMAT when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="Of merged weights: auto is the base checkpoint's.")] = "auto",
    base: Annotated[
        str | None, typer.Option("--base", help="The 16-bit model to merge into, where the run's is stored in 4 bits.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target folder.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a trained model for other programs, reload it, and prove that it is the trained one."""
    from falign.models import describe, export_adapter, export_merged, verify_export
    from falign.runs import RunFolder

    console, folder = Terminal(), RunFolder.open(run)
    if base is not None and format is Format.adapter:
        raise ConfigError(f"--base {base} applies only to merged weights: use --format merged, or leave it out.")
    target = out or folder.path / "export" / format.value
    with Terminal(stderr=True).status(f"exporting {escape(run)}"):
        _refuse_what_is_no_export(target)
        model, tokenizer, config = load_trained(folder, trust_code=trust_code)
        if format is Format.adapter:
            if config.adapter is None:
                raise ConfigError(f"{run} trained all weights and has no adapter: use --format merged.")
            export_adapter(model, tokenizer, target, overwrite=overwrite)  # pyright: ignore[reportArgumentType]
        else:
            export_merged(
                model,
                tokenizer,
                target,
                base_name_or_path=base,
                dtype=dtype,
                revision=config.model.revision if base is None else None,
                trust_remote_code=config.model.trust_remote_code,
                overwrite=overwrite,
            )
        try:
            proof = verify_export(
                model,
                target,
                tokenizer=tokenizer,
                kind=format.value,
                base_name_or_path=config.model.path if base is None else base,
                revision=config.model.revision if base is None else None,
                trust_remote_code=config.model.trust_remote_code,
            )
        except FalignError:
            shutil.rmtree(target)  # what is not proven does not stay
            raise
    console.print("wrote", Text(str(target), style="bold"))
    table = Table(f"logits on {proof.compared_tokens} tokens, {proof.dtype}", "largest", title_justify="left")
    table.add_row("size", f"{proof.max_abs_logit:.4g}")
    table.add_row("difference to the trained model", f"{proof.max_abs_logit_difference:.3g}")
    accepted = f"{proof.bound * proof.max_abs_logit:.3g}"
    if proof.max_abs_export_error == proof.max_abs_logit_difference:
        table.add_row("accepted", accepted)
    else:
        table.add_row("of this by the export itself", f"{proof.max_abs_export_error:.3g}")
        table.add_row("accepted by the export itself", accepted)
    table.add_row("change against the base model", f"{proof.max_abs_change_against_base:.3g}")
    console.print(table)
    if format is Format.adapter:
        console.print(_serving(model, run), highlight=False, markup=False)
    if format is Format.merged and describe(model).quantization is not None:
        console.print(
            "[yellow]note:[/] the trained model has a 4-bit base, the export its original weights: the rest of the "
            "difference is that base's rounding, which has no bound. Evaluate the export, or serve the adapter on the "
            "4-bit base."
        )


def _serving(model: nn.Module, run: str) -> str:
    """Say how vLLM serves an adapter, or why it does not."""
    from falign.rollouts.vllm_adapters import why_not_servable

    reasons = {rank: why_not_servable(model, max_rank=rank) for rank in VLLM_RANKS}
    if (rank := next((rank for rank, reason in reasons.items() if reason is None), None)) is not None:
        return f"vLLM serves it over the base model with --enable-lora --max-lora-rank {rank}"
    return f"vLLM does not serve it ({reasons[VLLM_RANKS[-1]]}): falign export {run} --format merged has whole weights"


def _refuse_what_is_no_export(target: Path) -> None:
    """Keep --overwrite from replacing a run, a home folder, or anything else that no export wrote."""
    marks = ("config.json", "adapter_config.json")
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).is_file() for mark in marks):
        raise ConfigError(f"--out {target} holds something other than an export: choose another folder.")
