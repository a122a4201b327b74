"""Source of rollouts: order and difficulty of prompts, publishing of weights, and sampling ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import nn

from falign.data import PromptRow
from falign.errors import EngineError, NonFiniteRewardError, RewardError, RolloutError
from falign.rewards.groups import TOLERANCE, outside
from falign.rollouts import SampledCompletion
from falign.rollouts.buffer import Column, RolloutBuffer
from falign.runfile.prompts_config import DifficultyConfig, RolloutConfig
from falign.seeds import mixed
from falign.training.online.groups import DividedSampler, Draw, Group, rollout_buffer

__all__ = ["Drawn", "PromptOrder", "RolloutAhead", "RolloutSource", "sample_within"]


MOST_DRAWS = 8
"""Rounds of sampling to find completions that differ in reward."""

AHEAD = "rollout_ahead.safetensors"
"""File of a checkpoint with the rollout that was sampled ahead."""


class RolloutSource:
    """Draw rollouts, each from the current policy or, if sampling ahead, from the policy one rollout earlier.

    Args:
        sampler: The sampler.
        prompts: The training prompts.
        rollout: Sizes of rollouts.
        compares: True if completions of a prompt are compared, so that groups of equal rewards are useless.
        seed: Seed of the order of prompts.
        keep: Called with the step and draws without completions to compare, before the error.
    """

    def __init__(
        self,
        sampler: DividedSampler,
        prompts: Sequence[PromptRow],
        rollout: RolloutConfig,
        *,
        compares: bool,
        seed: int,
        keep: Callable[[int, Draw], None],
    ) -> None:
        self.sampler, self.prompts, self.rollout, self.compares, self.keep = sampler, prompts, rollout, compares, keep
        self.order, self.ahead = PromptOrder(len(prompts), seed=seed), RolloutAhead()
        self.number = 0  # of the next rollout
        # Prompts used by the rollouts taken so far. A rollout that fails or is sampled ahead has moved order.position
        # further; this number is what a retry or a resume goes back to.
        self.position = 0

    def take(self, policy: nn.Module, step: int, *, goes_on: bool) -> Drawn:
        """Return the next rollout; if sampling ahead, start sampling the one after it.

        Args:
            policy: The policy to publish.
            step: Optimizer steps taken so far.
            goes_on: True if another rollout follows.

        Raises:
            EngineError: The source is unchanged; or, if the next rollout could not be started, this one is returned by
                the next call.
            NonFiniteRewardError: The rollout is skipped; the next call continues with the one after it.
            RewardError: The source is unchanged.
        """
        try:
            drawn = self.ahead.take() or self._publish(policy, step)()
        except EngineError:
            # The next call samples the same prompts under the same number, so it gives the same rollout.
            self.order.position = self.position
            raise
        except NonFiniteRewardError:
            # Move on to the next prompts: these would give the same bad reward again.
            self.sampler.engine.retire(self.number)
            self.number, self.position = self.number + 1, self.order.position
            raise
        except RewardError:
            self.order.position = self.position
            raise
        self.sampler.engine.retire(drawn.number)
        self.number, self.position = drawn.number + 1, drawn.position
        if self.rollout.ahead and goes_on:
            try:
                self.ahead.start(self._publish(policy, step))
            except EngineError:
                self.ahead.put(drawn)
                raise
        return drawn

    def groups(self, draw: Draw) -> list[Group]:
        """Return the useful groups: all, or, if completions are compared, those with different rewards."""
        return [group for group in draw.groups if not self.compares or len(set(group.rewards)) > 1]

    def save(self, folder: Path, *, writes: bool = True) -> dict[str, Any]:
        """Wait for the rollout being sampled, write it into a folder, and return the remaining state as plain values.

        Args:
            folder: Folder of the checkpoint.
            writes: False if another process writes the same.
        """
        drawn = self.ahead.drawn()
        order = self.position if drawn is None else drawn.position
        ahead = None if drawn is None or not writes else drawn.save(folder / AHEAD, self.prompts)
        return {"order": order, "number": self.number, "position": self.position, "ahead": ahead}

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """Restore the state of another source."""
        self.order.position, self.number, self.position = state["order"], state["number"], state["position"]
        if state["ahead"] is not None:
            self.ahead.put(Drawn.load(state["ahead"], folder / AHEAD, self.prompts))

    def _publish(self, policy: nn.Module, step: int) -> Callable[[], Drawn]:
        """Publish the current policy; return a function that samples a rollout from it in any thread."""
        number = self.number
        self.sampler.engine.publish(policy, number)
        draw = self._draw_to_compare if self.compares else self._draw
        return lambda: Drawn(draw(number, number, step), number, step, self.order.position)

    def _draw_to_compare(self, version: int, number: int, step: int) -> Draw:
        """Sample until there is at least one prompt for each minibatch."""
        draw, found = Draw([], 0), 0
        for attempt in range(MOST_DRAWS):
            draw += self._draw(version, mixed(number, attempt) if attempt else number, step)
            if (found := len(self.groups(draw))) >= self.rollout.minibatches:
                return draw
        self.keep(step, draw)
        raise RolloutError(
            f"Step {step + 1}: of {draw.num_sampled} prompts, drawn in {MOST_DRAWS} rounds, "
            f"{found} have completions of different rewards, fewer than rollout.minibatches="
            f"{self.rollout.minibatches}, and the others give no gradient. Raise rollout.completions, or "
            "look at the rewards in completions.jsonl."
        )

    def _draw(self, version: int, number: int, step: int) -> Draw:
        draw = self._drawn(version, number, step)
        self.sampler.require_judged(draw, f"Step {step + 1}")
        return draw

    def _drawn(self, version: int, number: int, step: int) -> Draw:
        count, rows = self.rollout.prompts, self.prompts
        sampler = self.sampler if self.rollout.horizon is None else self.sampler.with_tokens(self.rollout.tokens(step))
        if self.rollout.difficulty is None:
            return sampler.sample([rows[i] for i in self.order.take(count)], version=version, number=number)
        return sample_within(
            sampler,
            rows,
            self.order,
            count,
            difficulty=self.rollout.difficulty,
            pass_reward=self.rollout.pass_reward,
            version=version,
            number=number,
        )


class PromptOrder:
    """The order of prompts, shuffled anew for each epoch; it depends only on the seed and the number of the epoch."""

    def __init__(self, num_prompts: int, *, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self.position = 0

    def take(self, count: int) -> list[int]:
        """Return the next prompts; all are used before any is repeated."""
        places = [divmod(position, self.num_prompts) for position in range(self.position, self.position + count)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        self.position += count
        return [orders[epoch][place] for epoch, place in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self.num_prompts, generator=generator).tolist()


def sample_within(
    sampler: DividedSampler,
    rows: Sequence[PromptRow],
    order: PromptOrder,
    count: int,
    *,
    difficulty: DifficultyConfig,
    pass_reward: float,
    version: int,
    number: int,
) -> Draw:
    """Return groups whose pass rate is within a range; groups outside it are replaced by groups of other prompts.

    If there are too few after ``difficulty.max_rounds`` rounds, the groups nearest to the range fill the rest.
    """
    fit: list[Group] = []
    unfit: list[tuple[float, Group]] = []
    drawn = Draw([], 0)
    for attempt in range(difficulty.max_rounds):
        chosen = [rows[i] for i in order.take(count - len(fit))]
        draw = sampler.sample(chosen, version=version, number=mixed(number, attempt))
        drawn += draw
        for group in draw.groups:
            rate = group.num_passed(pass_reward, outcome=sampler.outcome) / len(group.rewards)
            distance = outside(torch.tensor(rate, dtype=torch.float64), difficulty.low, difficulty.high).item()
            if distance > TOLERANCE:
                unfit.append((distance, group))
            else:
                fit.append(group)
        if len(fit) >= count:
            break
    missing = count - len(fit)
    nearest = [group for _, group in sorted(unfit, key=lambda pair: pair[0])[:missing]]
    return drawn._replace(groups=fit + nearest, num_unfit=len(nearest))


PART = "part "
"""Prefix of the columns with the single rewards before they were combined."""


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
        # Rows hold mappings, so they cannot be keys themselves.
        groups, places = self.draw.groups, {id(row): place for place, row in enumerate(prompts)}
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        columns = {
            **({"rewards": _column([r for group in groups for r in group.rewards])} if groups[0].rewards else {}),
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
        rewards = buffer.values("rewards").tolist() if "rewards" in buffer.columns else None
        found = buffer.columns.items()
        parts = {name.removeprefix(PART): _values(column) for name, column in found if name.startswith(PART)}
        reasons, versions = rest["finish_reasons"], rest["policy_versions"]
        groups, start = [], 0
        for tree, row in zip(buffer.trees, rest["rows"], strict=True):
            own = range(start, start := start + len(tree.completion_ids))
            rollouts = tuple(
                SampledCompletion(tree.prompt_ids, ids, tuple(logprobs[n][: len(ids)]), reasons[n], versions[n])
                for n, ids in zip(own, tree.completion_ids, strict=True)
            )
            own_parts = {name: tuple(values[n] for n in own) for name, values in parts.items()}
            own_texts = tuple(rest["texts"][n] for n in own)
            own_rewards = () if rewards is None else tuple(rewards[n] for n in own)
            groups.append(Group(prompts[row], rollouts, own_texts, own_rewards, own_parts))
        return cls(**{**state, "draw": Draw(**{**state["draw"], "groups": groups})})


class RolloutAhead:
    """At most one rollout, sampled in a thread; other users of the engine must wait for it."""

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
        # A daemon thread, so that a run that is stopped does not wait for it.
        Thread(target=work, name="rollout ahead", daemon=True).start()

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
    # A tensor cannot hold None: NaN takes its place, and `known` marks it.
    known = torch.tensor([value is not None for value in values])
    return Column(torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64), known)


def _values(column: Column) -> list[float | None]:
    pairs = zip(column.values.tolist(), column.known.tolist(), strict=True)
    return [value if known else None for value, known in pairs]
