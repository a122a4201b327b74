"""Holding back what other libraries print: what matters falign says itself."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["quiet"]


def quiet() -> None:
    """Silence notices and progress bars of the libraries; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it too
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Reports kernels of a package that is optional, at import and once per process.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
