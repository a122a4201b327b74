"""Bad rows: each stops the reading, or is left out and counted."""

from __future__ import annotations

from typing import Literal

from falign.choices import require_choice
from falign.errors import DataError

__all__ = ["BadRowPolicy", "BadRows"]

BadRowPolicy = Literal["error", "skip"]


class BadRows:
    """Takes the error of each bad row: raises it, or counts it and keeps the first messages.

    Args:
        policy: ``"error"`` raises; ``"skip"`` counts and continues.
        keep: How many messages are kept.
        skip_by: How the user asks for ``"skip"``, for messages; None if it is not possible.

    Attributes:
        count: Bad rows so far.
        messages: The messages of the first ``keep`` of them.
    """

    def __init__(self, policy: BadRowPolicy = "error", *, keep: int = 5, skip_by: str | None = None) -> None:
        require_choice("bad_rows", policy, BadRowPolicy)
        self._skip_by = skip_by
        self.policy = policy
        self.keep = keep
        self.count = 0
        self.messages: list[str] = []

    def add(self, error: DataError) -> None:
        """Raise or count one bad row.

        Raises:
            DataError: Under the policy ``"error"``.
        """
        if self.policy == "error":
            if self._skip_by is None:
                raise error
            raise DataError(f"{error} ({self._skip_by} leaves such rows out and counts them.)") from error
        self.count += 1
        if len(self.messages) < self.keep:
            self.messages.append(str(error))
