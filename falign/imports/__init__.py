"""Run files from configurations of TRL, LLaMA-Factory and axolotl."""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.imports.importing import LIBRARIES, ImportedRun, import_run
else:
    __getattr__, __dir__ = lazy_names(
        __name__, {"falign.imports.importing": ("LIBRARIES", "ImportedRun", "import_run")}
    )

__all__ = ["LIBRARIES", "ImportedRun", "import_run"]
