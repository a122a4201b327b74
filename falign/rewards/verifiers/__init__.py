"""Functions that judge one completion; they run in processes of their own and import nothing of falign."""

__all__ = ["RowError"]


class RowError(Exception):
    """The row's own answer cannot be used: an error of the data, not of the completion."""
