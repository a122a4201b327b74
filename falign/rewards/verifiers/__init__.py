"""Functions that judge one completion; they run in processes of their own and import nothing of falign."""

__all__ = ["RowError"]


class RowError(Exception):
    """What the row holds for comparison cannot be used: the data's fault, not the completion's."""
