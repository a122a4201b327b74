"""Sampling of the next rollout while the policy trains on the current one."""

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
"""Prefix of the columns with single rewards, before they were combined."""


class Drawn(NamedTuple):
    """A rollout as sampled, before it is scored.

    Attributes:
        draw: Its groups.
        number: Number of the rollout, and version of the weights that sampled it.
        step: Optimizer steps taken by these weights.
        position: Number of prompts used up to its end.
    """

    draw: Draw
    number: int
    step: int
    position: int

    def save(self, file: Path, prompts: Sequence[PromptRow]) -> dict[str, Any]:
        """Write the numbers of all completions as tensors.

        Args:
            file: The file.
            prompts: All training prompts; the state refers to prompts by their index in this list.

        Returns:
            The remaining state, as plain values.
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
        """Return a rollout equal to the one that :meth:`save` wrote."""
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
    """At most one rollout, sampled in a thread; other users of the engine wait for it first."""

    def __init__(self) -> None:
        self._underway: Future[Drawn] | None = None

    @property
    def is_underway(self) -> bool:
        """True while the engine is sampling it."""
        return self._underway is not None and not self._underway.done()

    def start(self, draw: Callable[[], Drawn]) -> None:
        """Start sampling a rollout.

        Args:
            draw: Samples it from weights that are already published, and uses nothing that training changes.
        """
        future: Future[Drawn] = Future()

        def work() -> None:
            try:
                future.set_result(draw())
            except BaseException as error:  # raised again in `take`
                future.set_exception(error)

        self._underway = future
        Thread(
            target=work, name="rollout ahead", daemon=True
        ).start()  # a daemon thread, so that stopping a run does not wait for it

    def take(self) -> Drawn | None:
        """Wait for the rollout and return it, or None if none was started; errors of the thread are raised here."""
        future, self._underway = self._underway, None
        return None if future is None else future.result()

    def wait(self) -> None:
        """Wait until the engine is free."""
        if self._underway is not None:
            wait([self._underway])

    def drawn(self) -> Drawn | None:
        """Wait for the rollout and return it without taking it; None if none was started or it failed."""
        self.wait()
        if self._underway is None or self._underway.exception() is not None:
            return None
        return self._underway.result()

    def put(self, drawn: Drawn) -> None:
        """Set the rollout that `take` returns next."""
        self._underway = Future()
        self._underway.set_result(drawn)


def _column(values: Sequence[float | None]) -> Column:
    known = torch.tensor([value is not None for value in values])
    return Column(torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64), known)


def _values(column: Column) -> list[float | None]:
    pairs = zip(column.values.tolist(), column.known.tolist(), strict=True)
    return [value if known else None for value, known in pairs]
