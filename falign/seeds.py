"""The one way of mixing seeds: numbers and purposes into a seed that shares nothing with its neighbours."""

import hashlib

__all__ = ["mixed"]


def mixed(*parts: int | str) -> int:
    """Return a seed below 2^48 that depends on all parts, so that neighbouring ones share nothing.

    A sum of a run's seed and a counter gives run 0 in pass 1 the numbers of run 1 in pass 0.

    Args:
        parts: The run's seed first, then what tells this use of it from others: a purpose, a pass, a number.

    Example:
        >>> mixed(0, 1) == mixed(1, 0)
        False
    """
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")
