"""``falign import``, and the answer to ``falign dpo ...``: run files from configurations of other libraries."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from falign.durable import write_whole
from falign.errors import ConfigError, FalignError
from falign.foreign.names import KINDS_OF_METHODS
from falign.foreign.trl_rows import COMMANDS
from falign.terminal import Terminal

__all__ = ["FOREIGN_OPTIONS", "answer_method", "import_"]

FOREIGN_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": False}
"""Context settings of a command that is given another library's options."""

RUN_FILES = {
    "pairwise": "configs/quickstart.yaml",
    "unpaired": "configs/kto-polite.yaml",
    "supervised": "configs/sft-polite.yaml",
    "policy_gradient": "configs/grpo-arithmetic.yaml",
    "token_pairwise": "configs/tdpo-hh.yaml",
    "distribution_matching": "configs/fdpg-word.yaml",
    "hybrid": "configs/dphrl-arithmetic.yaml",
    "distillation": "configs/kd-polite.yaml",
    "sequence_match": "configs/sequence-match-polite.yaml",
    "cloning": "configs/oreal-arithmetic.yaml",
}
"""A run file of each kind of objective that a method's name stands for."""


def import_(
    library: Annotated[str, typer.Argument(metavar="trl|llamafactory|axolotl", help="Library of the configuration.")],
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG",
            help="YAML or JSON file; for trl also a shell script with the command, or the command line itself: "
            "dpo --config dpo.yaml --beta 0.2",
        ),
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="RUN.yaml", help="The run file. Default: it is printed.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="dpo|kto|sft|grpo|rloo", help="Command of TRL, if CONFIG does not name it."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", min=1, help="Processes of their run, for sizes of online rollouts."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace RUN.yaml.")] = False,
) -> None:
    """Write a run file from a configuration of TRL, LLaMA-Factory or axolotl; what has no counterpart is refused."""
    from falign.imports import import_run

    if out is not None and Path(out).exists() and not overwrite:
        raise ConfigError(f"--out {out} exists: give another name, or --overwrite.")
    words = source[0] if len(source) == 1 else source
    run = import_run(library, words, method=method, processes=processes, out=out or "run.yaml")
    if out is None:
        sys.stdout.write(run.text)
        return
    write_whole(Path(out), run.text)
    console = Terminal(stderr=True, highlight=False, soft_wrap=True)
    for difference in run.differences:
        console.print(f"differs: {difference}", style="yellow", markup=False)
    if run.unused:
        console.print(f"left out, without effect on the result: {', '.join(run.unused)}", markup=False)
    console.print(f"{out} is written. Train with: {run.command}", markup=False)


def answer_method(name: str) -> Callable[[list[str] | None], None]:
    """Return the command that answers a method's name with the line to type.

    Args:
        name: The method, as in ``falign dpo``.
    """
    kind = KINDS_OF_METHODS[name]

    def answer(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        words = arguments or []
        if words and Path(words[0]).suffix in (".yaml", ".yml") and "--config" not in words:
            raise ConfigError(f"falign {name} is not a command. Type: falign train {shlex.join(words)}")
        if not words or name not in COMMANDS:
            raise ConfigError(
                f"falign {name} is not a command: falign trains from run files, here with objective.kind: {kind}, as "
                f"{RUN_FILES[kind]} does. Type: falign train RUN.yaml"
            )
        from falign.imports import import_run

        line = f"falign import trl {shlex.join([name, *words])} --out run.yaml"
        try:
            run = import_run("trl", [name, *words])
        except FalignError as error:
            raise ConfigError(
                f"falign {name} is not a command. TRL's arguments become a run file by\n  {line}\nwhich refuses these "
                f"now: {error}"
            ) from error
        raise ConfigError(
            f"falign {name} is not a command. TRL's arguments become a run file, and that is trained, by\n  {line}\n"
            f"  {run.command}"
        )

    answer.__doc__ = f"Answer `falign {name}` with the line to type."
    return answer
