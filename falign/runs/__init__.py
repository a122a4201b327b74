"""Run folders: their files, checkpoints and results, and the check that a resumed run is the same run."""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.runs.folder import RunFolder
    from falign.runs.progress import plot_curves
else:
    __getattr__, __dir__ = lazy_names(
        __name__, {"falign.runs.progress": ("plot_curves",), "falign.runs.folder": ("RunFolder",)}
    )

__all__ = ["RunFolder", "plot_curves"]
