"""Holding back what other libraries print: what matters falign says itself."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partialmethod
from typing import Any

from tqdm import tqdm

__all__ = ["quiet"]


def quiet() -> None:
    """Silence notices and progress bars of the libraries; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it too
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The conversion of GGUF files asks for a bar by itself. tqdm reads its own variable, TQDM_DISABLE, when it is
    # imported, which torch has done by now.
    bar: Any = tqdm
    bar.__init__ = partialmethod(bar.__init__, disable=True)
    # Reports kernels of a package that is optional, at import and once per process.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
