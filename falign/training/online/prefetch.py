"""The rollout after the one that is learnt from, drawn meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from threading import Thread
from typing import Any, NamedTuple

from falign.data import PromptRow
from falign.rollouts import Rollout
from falign.training.online.groups import Draw, Group

__all__ = ["Drawn", "RolloutAhead"]


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

    def state_dict(self, prompts: Sequence[PromptRow]) -> dict[str, Any]:
        """Return plain values that :meth:`from_state` takes; prompts are named by their places among all."""
        places = {id(row): place for place, row in enumerate(prompts)}
        groups = [
            {
                "row": places[id(group.row)],
                "rollouts": [asdict(rollout) for rollout in group.rollouts],
                "texts": group.texts,
                "rewards": group.rewards,
                "parts": dict(group.parts),
            }
            for group in self.draw.groups
        ]
        return {**self._asdict(), "draw": {**self.draw._asdict(), "groups": groups}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], prompts: Sequence[PromptRow]) -> Drawn:
        """Return the rollout of a state, equal to the one that it was taken of."""
        groups = [
            Group(
                prompts[group["row"]],
                tuple(_rollout(rollout) for rollout in group["rollouts"]),
                tuple(group["texts"]),
                tuple(group["rewards"]),
                {name: tuple(values) for name, values in group["parts"].items()},
            )
            for group in state["draw"]["groups"]
        ]
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

    def state_dict(self, prompts: Sequence[PromptRow]) -> dict[str, Any] | None:
        """Wait for the rollout and return it as plain values; None where there is none, or it failed."""
        self.wait()
        if self._underway is None or self._underway.exception() is not None:
            return None
        return self._underway.result().state_dict(prompts)

    def put(self, drawn: Drawn) -> None:
        """Have a rollout taken next."""
        self._underway = Future()
        self._underway.set_result(drawn)


def _rollout(state: Mapping[str, Any]) -> Rollout:
    ids = {name: tuple(state[name]) for name in ("prompt_ids", "completion_ids", "logprobs")}
    return Rollout(**{**state, **ids})
