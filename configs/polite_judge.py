"""A preference oracle for configs/nash-polite.yaml: polite words first, then fewer words."""

import math
import re

POLITE = re.compile(r"\b(please|thanks?|glad|happy|sorry|appreciate|kindly|would)\b", re.IGNORECASE)


def politer(first: list[str], second: list[str]) -> list[float]:
    """Return the probability that the first completion is preferred to the second, one per pair."""
    return [1 / (1 + math.exp(worth(b) - worth(a))) for a, b in zip(first, second, strict=True)]


def worth(text: str) -> float:
    """Return the worth of a completion, in nats of preference."""
    return 3.0 * bool(POLITE.search(text)) - 0.02 * len(text.split())
