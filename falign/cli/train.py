"""``falign train``: run a run file, and show the results."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from falign.cli.launch import Launch, launch
from falign.cli.options import with_options_named
from falign.cli.run_summary import show
from falign.errors import ConfigError
from falign.terminal import Terminal

__all__ = ["train"]


@with_options_named(names=("new_rewards", "resume", "skip_bad", "trust_code"))
def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.field=value ...]", help="Fields of the run file to override."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest undamaged checkpoint.")] = False,
    new_rewards: Annotated[
        bool,
        typer.Option("--new-rewards", help="With --resume: accept rewards that have changed, such as a corrected one."),
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Skip and count steps whose loss, gradient or reward is NaN or infinite."),
    ] = False,
    kind: Annotated[
        Launch | None,
        typer.Option("--launch", help="Train in several processes: ddp, or fsdp2 for models too large for one GPU."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", metavar="N", min=1, help="Number of processes, with --launch. Default: one per GPU."
        ),
    ] = None,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code", help="Run code that a run folder's run.yaml names; a run file of your own needs no flag."
        ),
    ] = False,
) -> None:
    """Train as a run file says, and show the results."""
    if kind is not None:
        flags = {"--resume": resume, "--new-rewards": new_rewards, "--skip-bad": skip_bad, "--trust-code": trust_code}
        given = [*(overrides or []), *(flag for flag, is_given in flags.items() if is_given)]
        launch(kind, processes, ["train", run_file, *given])
        return
    if processes is not None:
        raise ConfigError(f"--processes {processes} has no effect without --launch: give --launch ddp or fsdp2.")
    if new_rewards and not resume:
        raise ConfigError("--new-rewards has no effect without --resume: a new run uses its rewards as they are.")
    console = Terminal(quiet=os.environ.get("RANK", "0") != "0")
    with console.status("starting"):
        from falign.runs.named_code import load_own_run_file

        given = [*(overrides or []), *(["training.skip_bad=true"] if skip_bad else [])]
        config = load_own_run_file(run_file, given, trust_code=trust_code)
        config.require_files()
        # Imported last, because it takes seconds: errors in the run file are reported at once.
        from falign.training import train as run
    show(run(config, resume=resume, new_rewards=new_rewards), console)
