"""Prompts answered into a file, a few at a time, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from falign.data import PromptRow
from falign.evaluation.sample_scorer import SampleRow, SampleScorer, sample_identity
from falign.evaluation.score_output import ScoreOutput
from falign.training.online.groups import Draw, GroupSampler

__all__ = ["sample_prompts"]


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
    """Sample, reward and score completions of prompts in their order, and return the rows of all.

    The samples of a prompt depend on the sampler's seed and the prompt alone. Batches are those of an evaluation that
    was never stopped: where one was left half written, it is sampled again as a whole.

    Args:
        prompts: One or more.
        sampler: What samples and rewards.
        scorer: What computes log-probabilities.
        output: Where rows go, and where those of an earlier call are; the caller gives it its name.
        version: Which of the engine's weights answer.
        of_reference: Whether the engine samples from the reference.
        prompts_per_batch: Prompts that are answered at once.
        on_batch: Called after each batch with the prompts so far, how many of them an earlier call had answered, and
            what was sampled.

    Raises:
        ConfigError: The prompts are not those of the rows that are there.
        ModelError: A value is not finite.
        RewardError: A reward failed.
        RolloutError: A prompt leaves no room for a completion.
    """
    rows: list[list[SampleRow]] = []
    resumed = 0
    for batch, repeats in _batches(prompts, prompts_per_batch):
        there: list[Any] = []
        for prompt in batch:
            expected = [sample_identity(prompt.place, prompt.prompt)] * sampler.completions
            if (taken := output.take_rows(expected, form=SampleRow)) is None:
                break
            there.append(taken)
        new: list[list[SampleRow]] = []
        draw: Draw | None = None
        if len(there) < len(batch):
            draw = sampler.sample_each(batch, version=version, repeats=repeats)
            new = scorer.rows(draw.groups, of_reference=of_reference)[len(there) :]
            output.append(row for group in new for row in group)
        resumed += len(there)
        rows += [*there, *new]
        if on_batch is not None:
            on_batch(len(rows), resumed, draw)
    return rows


def _batches(prompts: Sequence[PromptRow], size: int) -> Iterator[tuple[Sequence[PromptRow], list[int]]]:
    """Yield prompts with how often each has come before."""
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(0, len(prompts), size):
        batch, repeats = prompts[start : start + size], []
        for prompt in batch:
            repeats.append(seen[prompt.prompt_ids])
            seen[prompt.prompt_ids] += 1
        yield batch, repeats
