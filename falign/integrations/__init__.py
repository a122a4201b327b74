"""Trainers of other libraries with falign's objectives inside; each library is imported by its own package only."""

__all__: list[str] = []
