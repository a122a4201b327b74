"""The section of the run file that says what the policy is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from falign.training.base_config import FrozenModel

__all__ = ["ReferenceConfig"]


class ReferenceConfig(FrozenModel):
    """What the policy is held to."""

    kind: Literal["auto", "adapter_off", "frozen"] = "auto"
    """``adapter_off``: the policy without its adapter; ``frozen``: a model of its own; ``auto``: the former with an
    adapter, else the latter."""
    path: str | None = None
    """The frozen model, if not the one that is trained."""
    cache: Path | None = None
    """Folder of log-probabilities computed once before training; shared by all runs with the same reference."""
