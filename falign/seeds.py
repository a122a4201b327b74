"""Seeds that are mixed from numbers and purposes, so that neighboring ones are independent."""

import hashlib

__all__ = ["mixed"]


def mixed(*parts: int | str) -> int:
    """Return a seed below 2^48 that depends on all parts, so that neighboring ones are independent.

    With a sum of a run's seed and a counter, pass 1 of run 0 would equal pass 0 of run 1.

    Args:
        parts: The run's seed first, then a purpose, a pass or a number that identifies this use of it.

    Example:
        >>> mixed(0, 1) == mixed(1, 0)
        False
    """
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")
