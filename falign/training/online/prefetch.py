"""The rollout after the one that is learnt from, drawn meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from falign.data import PromptRow
from falign.rollouts import Rollout
from falign.rollouts.buffer import Column, RolloutBuffer
from falign.training.online.groups import Draw, Group, rollout_buffer

__all__ = ["Drawn", "RolloutAhead"]

PART = "part "
"""Beginning of the names of columns with the rewards that others were combined of."""


class Drawn(NamedTuple):
    """A rollout as it was drawn.

    Attributes:
        draw: Its groups.
        number: Of the rollout, and of the weights that it was drawn from.
        step: Optimiser steps that these weights had seen.
        position: Prompts that were taken until its end.
    """

    draw: Draw
    number: int
    step: int
    position: int

    def save(self, file: Path, prompts: Sequence[PromptRow]) -> dict[str, Any]:
        """Write all numbers of the completions as tensors.

        Args:
            file: Where they go.
            prompts: All that are trained on; the state names prompts by their places among these.

        Returns:
            The rest as plain values.
        """
        groups, places = self.draw.groups, {id(row): place for place, row in enumerate(prompts)}
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        columns = {
            "rewards": _column([reward for group in groups for reward in group.rewards]),
            **{
                f"{PART}{name}": _column([value for group in groups for value in group.parts[name]])
                for name in groups[0].parts
            },
        }
        buffer = rollout_buffer(groups)
        replace(buffer, columns={**buffer.columns, **columns}).save(file)
        rest = {
            "rows": [places[id(group.row)] for group in groups],
            "texts": [text for group in groups for text in group.texts],
            "finish_reasons": [rollout.finish_reason for rollout in rollouts],
            "policy_versions": [rollout.policy_version for rollout in rollouts],
        }
        return {**self._asdict(), "draw": {**self.draw._asdict(), "groups": rest}}

    @classmethod
    def load(cls, state: Mapping[str, Any], file: Path, prompts: Sequence[PromptRow]) -> Drawn:
        """Return the rollout that :meth:`save` wrote, equal to that one."""
        buffer, rest = RolloutBuffer.load(file), state["draw"]["groups"]
        logprobs = buffer.values("sampler_logprobs").tolist()
        rewards = buffer.values("rewards").tolist()
        found = buffer.columns.items()
        parts = {name.removeprefix(PART): _values(column) for name, column in found if name.startswith(PART)}
        reasons, versions = rest["finish_reasons"], rest["policy_versions"]
        groups, start = [], 0
        for tree, row in zip(buffer.trees, rest["rows"], strict=True):
            own = range(start, start := start + len(tree.completion_ids))
            rollouts = tuple(
                Rollout(tree.prompt_ids, ids, tuple(logprobs[n][: len(ids)]), reasons[n], versions[n])
                for n, ids in zip(own, tree.completion_ids, strict=True)
            )
            of_parts = {name: tuple(values[n] for n in own) for name, values in parts.items()}
            texts, worth = tuple(rest["texts"][n] for n in own), tuple(rewards[n] for n in own)
            groups.append(Group(prompts[row], rollouts, texts, worth, of_parts))
        return cls(**{**state, "draw": Draw(**{**state["draw"], "groups": groups})})


class RolloutAhead:
    """At most one rollout that a thread draws; whoever else needs the engine waits for it first."""

    def __init__(self) -> None:
        self._underway: Future[Drawn] | None = None

    @property
    def is_underway(self) -> bool:
        """Whether the engine is at it."""
        return self._underway is not None and not self._underway.done()

    def start(self, draw: Callable[[], Drawn]) -> None:
        """Have a rollout drawn.

        Args:
            draw: Draws it from weights that are published already, and touches nothing that training changes.
        """
        future: Future[Drawn] = Future()

        def work() -> None:
            try:
                future.set_result(draw())
            except BaseException as error:  # handed to whoever takes the rollout
                future.set_exception(error)

        self._underway = future
        Thread(target=work, name="rollout ahead", daemon=True).start()  # a run that is stopped does not wait for it

    def take(self) -> Drawn | None:
        """Return the rollout once it is there, or None where none was started; what went wrong is raised here."""
        future, self._underway = self._underway, None
        return None if future is None else future.result()

    def wait(self) -> None:
        """Wait until the engine is free."""
        if self._underway is not None:
            wait([self._underway])

    def drawn(self) -> Drawn | None:
        """Wait for the rollout and return it, leaving it to be taken; None where there is none, or it failed."""
        self.wait()
        if self._underway is None or self._underway.exception() is not None:
            return None
        return self._underway.result()

    def put(self, drawn: Drawn) -> None:
        """Have a rollout taken next."""
        self._underway = Future()
        self._underway.set_result(drawn)


def _column(values: Sequence[float | None]) -> Column:
    known = torch.tensor([value is not None for value in values])
    return Column(torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64), known)


def _values(column: Column) -> list[float | None]:
    pairs = zip(column.values.tolist(), column.known.tolist(), strict=True)
    return [value if known else None for value, known in pairs]
