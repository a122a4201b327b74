"""Completions of prompts, sampled into a file batch by batch, so that a stopped evaluation can continue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from falign.data import PromptRow
from falign.evaluation.sample_scorer import SampleRow, SampleScorer, sample_identity
from falign.evaluation.score_output import ScoreOutput
from falign.terminal import progress
from falign.training.online.groups import Draw, GroupSampler

__all__ = ["sample_progress", "sample_prompts"]


def sample_prompts(
    prompts: Sequence[PromptRow],
    sampler: GroupSampler,
    scorer: SampleScorer,
    output: ScoreOutput,
    *,
    version: int,
    of_reference: bool = False,
    prompts_per_batch: int = 8,
    on_batch: Callable[[int, int, Draw | None], None] | None = None,
) -> list[list[SampleRow]]:
    """Sample, reward and score completions of prompts in order, and return the rows of each prompt.

    The samples of a prompt depend only on the sampler's seed and the prompt. Batches are the same as in a call that was
    never stopped: a batch of which some rows are missing is sampled again as a whole, so that numbers that depend on
    the batch, such as the last digits of log-probabilities, are the same too.

    Args:
        prompts: One or more prompts.
        sampler: Samples completions and computes their rewards.
        scorer: Computes log-probabilities.
        output: Receives the rows, and has those of an earlier call; the caller finishes it.
        version: Version of the engine's weights to sample from.
        of_reference: Whether the engine samples from the reference.
        prompts_per_batch: Number of prompts sampled at once.
        on_batch: Called after each batch with the number of prompts so far, how many of them an earlier call had
            finished, and what was sampled.

    Raises:
        ConfigError: The output has rows of other prompts.
        ModelError: A value is NaN or infinite.
        RewardError: A reward failed.
        RolloutError: A prompt leaves no room for a completion.
    """
    rows: list[list[SampleRow]] = []
    resumed = 0
    for batch, repeats in _batches(prompts, prompts_per_batch):
        finished: list[Any] = []
        for prompt in batch:
            expected = [sample_identity(prompt.place, prompt.prompt)] * sampler.completions
            if (taken := output.take_rows(expected, form=SampleRow)) is None:
                break
            finished.append(taken)
        new: list[list[SampleRow]] = []
        draw: Draw | None = None
        if len(finished) < len(batch):
            draw = sampler.sample_each(batch, version=version, repeats=repeats)
            new = scorer.rows(draw.groups, of_reference=of_reference)[len(finished) :]
            output.append(row for group in new for row in group)
        resumed += len(finished)
        rows += [*finished, *new]
        if on_batch is not None:
            on_batch(len(rows), resumed, draw)
    return rows


def _batches(prompts: Sequence[PromptRow], size: int) -> Iterator[tuple[Sequence[PromptRow], list[int]]]:
    """Yield batches of prompts, with the number of earlier occurrences of each prompt."""
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(0, len(prompts), size):
        batch, repeats = prompts[start : start + size], []
        for prompt in batch:
            repeats.append(seen[prompt.prompt_ids])
            seen[prompt.prompt_ids] += 1
        yield batch, repeats


@contextmanager
def sample_progress(console: Console, total: int) -> Iterator[Callable[[int, int, Draw | None], None]]:
    """Show progress over both rounds, of the policy and of the reference, and the first message of failed rewards.

    Args:
        console: Where it is shown.
        total: Number of prompts in both rounds together.
    """
    last = before = 0
    with progress(console, "prompts", total=total) as show:

        def update(done: int, resumed: int, draw: Draw | None) -> None:
            nonlocal before, last
            if done < last:  # the second round begins
                before += last
            last = done
            show(before + done)
            if draw is not None and draw.message:
                console.print(f"reward: {draw.message}", style="yellow", markup=False)

        yield update
