"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["TrustCode"]

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Run code that the run folder names: functions, divergences, its model's own code."
    ),
]
"""The option of every command that builds what a run folder names."""
