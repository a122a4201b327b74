"""Split prompts by whether the model already solves them: solved ones for rehearsal, the others for exploration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from falign.errors import RolloutError
from falign.rollouts.base import Engine, SampledCompletion, SamplingParams
from falign.seeds import mixed

__all__ = ["Presampled", "Verify", "presampled_chunks"]

Verify = Callable[[list[int], list[SampledCompletion]], list[bool]]
"""Function from the prompt index of each completion, and the completions, to True for each correct one."""


class Presampled(NamedTuple):
    """The result of pre-sampling one prompt.

    Attributes:
        num_correct: Number of its correct completions.
        rehearsal: A further correct completion of a solved prompt; None for prompts to explore.
    """

    num_correct: int
    rehearsal: SampledCompletion | None


def presampled_chunks(
    engine: Engine,
    prompt_ids: Sequence[Sequence[int]],
    verify: Verify,
    *,
    num_completions: int,
    threshold: int,
    params: SamplingParams,
    seed: int,
    version: int = 0,
    start: int = 0,
    chunk_size: int = 32,
) -> Iterator[list[Presampled]]:
    """Sample each prompt, and once more if it is solved.

    A prompt with `threshold` correct completions or more is solved if one further completion is correct too; that one
    is kept. This filters out prompts solved by luck, and the selection of prompts does not bias the sample.

    Args:
        engine: Engine that has published the model.
        prompt_ids: Token ids of each prompt.
        verify: Decides which completions are correct.
        num_completions: Completions per prompt.
        threshold: Number of completions that must be correct.
        params: Sampling parameters; rehearsal requires samples from the model's own distribution.
        seed: Seed of all samples.
        version: Version that the engine has published.
        start: The first prompt, a multiple of `chunk_size`; the number of prompts if an earlier call did all.
        chunk_size: Prompts per chunk.

    Yields:
        The results of one chunk after another; they depend neither on `start` nor on what was yielded before.

    Raises:
        RolloutError: The threshold cannot be reached, or completions would not be drawn from the model itself.

    Source:
        The pre-sampling of DPH-RL (arXiv:2509.07430).
    """
    if not 1 <= threshold <= num_completions:
        raise RolloutError(f"threshold={threshold} must be from 1 to num_completions={num_completions}.")
    if params.truncates or params.temperature != 1:
        raise RolloutError(
            f"temperature={params.temperature}, top_k={params.top_k}, top_p={params.top_p}: what is rehearsed must be "
            "sampled from the model itself, at temperature 1 without top-k and top-p."
        )
    assert start % chunk_size == 0 or start == len(prompt_ids)

    def verified(prompts: list[int], n: int, *, seed: int) -> list[tuple[int, SampledCompletion]]:
        """Return the number of correct completions of each prompt, and the first of them."""
        if not prompts:
            return []
        rollouts = engine.sample([prompt_ids[i] for i in prompts], n, params, version=version, seed=seed)
        flags = verify([i for i in prompts for _ in range(n)], rollouts)
        return [(sum(flags[j : j + n]), rollouts[j]) for j in range(0, len(flags), n)]

    for first in range(start, len(prompt_ids), chunk_size):
        chunk = list(range(first, min(first + chunk_size, len(prompt_ids))))
        chunk_number = first // chunk_size
        counts = [count for count, _ in verified(chunk, num_completions, seed=mixed(seed, "attempts", chunk_number))]
        solved = [i for i, count in zip(chunk, counts, strict=True) if count >= threshold]
        further = dict(zip(solved, verified(solved, 1, seed=mixed(seed, "rehearsed", chunk_number)), strict=True))
        kept = {i: rollout for i, (is_correct, rollout) in further.items() if is_correct}
        yield [Presampled(count, kept.get(i)) for i, count in zip(chunk, counts, strict=True)]
