"""The command line."""

from falign.cli.main import main

__all__ = ["main"]
