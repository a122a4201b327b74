"""Choices by hash: the rows that a mixture draws and the prompts that are held out.

A hash depends only on the row and the seed. So the choice is the same on every machine, and rows added to a file do not
change the choice among the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from falign.errors import ConfigError

__all__ = ["draw", "held_out_prompts"]


def draw(rows: Sequence[Sequence[str]], weights: Sequence[float], *, seed: int) -> list[list[int]]:
    """Return the rows of each source in a weighted mixture: as many as the shares allow, without repetition.

    Args:
        rows: The name of each row within its source, independent of the source's path.
        weights: Share of each source, up to a common factor.
        seed: Another seed takes other rows.

    Returns:
        Row numbers of each source, ascending.

    Example:
        >>> [len(rows) for rows in draw([["a"] * 90, ["b"] * 10], [3.0, 1.0], seed=0)]
        [30, 10]
    """
    # The largest total for which no source runs out.
    total = min(len(names) / weight for names, weight in zip(rows, weights, strict=True))
    drawn = []
    for number, (names, weight) in enumerate(zip(rows, weights, strict=True)):
        keys = [_hash(seed, str(number), name, str(i)) for i, name in enumerate(names)]
        order = sorted(range(len(names)), key=keys.__getitem__)
        drawn.append(sorted(order[: round(total * weight)]))
    return drawn


def held_out_prompts(prompts: Sequence[str], *, fraction: float = 0.0, size: int = 0, seed: int) -> frozenset[str]:
    """Return the prompts that go to evaluation, with all their rows.

    Args:
        prompts: The prompt of each row.
        fraction: Expected share of prompts that is held out.
        size: In place of that, the number of rows held out; slightly fewer if a prompt with several rows does not fit.
        seed: Another seed holds out other prompts.

    Raises:
        ConfigError: One of the two sides would be empty.
    """
    if not 0 <= fraction < 1 or size < 0 or (fraction and size):
        raise ConfigError(
            f"eval_fraction={fraction} must be in [0, 1), eval_size={size} at least 0, and one of them 0."
        )
    if not (fraction or size):
        return frozenset()
    counts = Counter(prompts)
    by_hash = sorted(counts, key=lambda prompt: _hash(seed, prompt))
    if fraction:
        # A threshold on each hash, so that rows added to a file do not move other prompts.
        chosen = {prompt for prompt in by_hash if _hash(seed, prompt) < fraction * 2**64}
    else:
        chosen, room = set(), size
        for prompt in by_hash:  # a prompt with more rows than there is room for is skipped
            if counts[prompt] <= room:
                chosen.add(prompt)
                room -= counts[prompt]
    if not 0 < len(chosen) < len(counts):
        side = "evaluation" if not chosen else "training"
        raise ConfigError(
            f"eval_fraction={fraction}, eval_size={size} leaves nothing for {side}: there are {len(prompts)} rows with "
            f"{len(counts)} different prompts. Choose another value, or name an evaluation source."
        )
    return frozenset(chosen)


def _hash(seed: int, *parts: str) -> int:
    text = "\n".join([str(seed), *parts])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
