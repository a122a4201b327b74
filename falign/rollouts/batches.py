"""Which completions are sampled beside each other."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["sampling_batches"]


def sampling_batches(lengths: Sequence[int], n: int, *, max_new_tokens: int, max_batch_tokens: int) -> list[list[int]]:
    """Return the rows of each batch, from the longest prompts to the shortest, so that little is padding.

    Row ``i * n + j`` is completion j of prompt i. The completions of one prompt stay together, so that the prompt is
    computed once, unless there are more of them than a batch has room for.

    Args:
        lengths: Tokens of each prompt.
        n: Completions per prompt.
        max_new_tokens: Longest completion.
        max_batch_tokens: Most tokens whose keys and values are held: rows by the longest prompt and completion. One row
            is always taken.

    Returns:
        Batches of row numbers, every row in one of them.

    Example:
        >>> sampling_batches([3, 9, 4], 2, max_new_tokens=1, max_batch_tokens=20)
        [[2, 3], [4, 5, 0, 1]]
    """
    batches: list[list[int]] = []
    room = 0  # rows
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        most = max(1, max_batch_tokens // (lengths[prompt] + max_new_tokens))
        for start in range(0, n, most):
            part = range(prompt * n + start, prompt * n + min(start + most, n))
            if len(part) > room:
                batches.append([])
                room = most
            batches[-1] += part
            room -= len(part)
    return batches
