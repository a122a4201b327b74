"""Seeds made of several numbers."""

import hashlib

__all__ = ["mixed"]


def mixed(*numbers: int) -> int:
    """Return a seed that depends on all numbers, so that neighbouring ones share nothing."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:6], "big")
