"""Completions of the policy during a run, with their rewards: ``completions.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path

from falign.durable import naming
from falign.training.online.groups import Draw

__all__ = ["CompletionsTable"]


class CompletionsTable:
    """A line for each completion, with the step before which it was sampled, or, if drawn ahead, first learnt from.

    Args:
        path: The file; None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, step: int, draw: Draw, *, held_out: bool = False) -> None:
        """Append the completions of a rollout."""
        if self.path is None:
            return
        lines = [
            json.dumps(
                {
                    "step": step,
                    "held_out": held_out,
                    "place": group.row.place,
                    "prompt": group.row.prompt,
                    "completion": text,
                    "reward": reward,
                    "parts": {name: values[i] for name, values in group.parts.items()},
                    "tokens": len(rollout.completion_ids),
                    "finish_reason": rollout.finish_reason,
                },
                ensure_ascii=False,
            )
            for group in draw.groups
            for i, (rollout, text, reward) in enumerate(zip(group.rollouts, group.texts, group.rewards, strict=True))
        ]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
